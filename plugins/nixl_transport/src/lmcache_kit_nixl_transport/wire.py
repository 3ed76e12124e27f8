"""Addresses and offers of peers, in msgpack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from lmcache_kit.errors import TransportError
from lmcache_kit.interfaces.memory import Region
from lmcache_kit.interfaces.transport import MAX_ADDRESS_BYTES, ReadableRegion

NONCE_BYTES = 1 << 20
"""So large that only CMA delivers all bytes before NIXL's call returns, with rare exceptions."""

T = TypeVar("T")
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Pointer = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
ShortText = Annotated[str, Meta(max_length=128)]


class Span(msgspec.Struct, frozen=True):
    """Registered memory of a process."""

    address: Pointer
    nbytes: Count


class Address(msgspec.Struct, frozen=True):
    """Address of one incarnation of a cache process.

    ``metadata`` is NIXL's. NONCE_BYTES random bytes at ``nonce`` are registered and have the
    SHA-256 ``digest``: a peer that reads them knows that it reads this process. ``cma``: UCX may
    use CMA on that side. ``rdma`` names active devices.
    """

    agent: Annotated[str, Meta(min_length=1, max_length=64)]
    metadata: Annotated[bytes, Meta(max_length=MAX_ADDRESS_BYTES)]
    slab: Span
    nonce: Pointer
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]
    pid: Annotated[int, Meta(ge=1, lt=1 << 31)]
    boot_id: ShortText
    cma: bool
    rdma: Annotated[tuple[ShortText, ...], Meta(max_length=64)]


def encode(message: Address) -> bytes:
    return _limited(msgspec.msgpack.encode(message), "this process's address")


def decode_address(data: bytes) -> Address:
    return _decode(data, Address, "a peer's address")


def encode_offer(regions: Sequence[ReadableRegion]) -> bytes:
    """Encode the regions of an offer as ``[[offset, nbytes], ...]``."""
    spans = [(offered.region.offset, offered.region.nbytes) for offered in regions]
    return _limited(msgspec.msgpack.encode(spans), f"an offer of {len(spans)} regions")


def decode_offer(data: bytes) -> list[Region]:
    """Decode an offer; its numbers are unchecked, see :func:`check_inside`."""
    return _decode(data, list[Region], "a peer's offer")


def check_inside(regions: Sequence[Region], slab_bytes: int, whose: str) -> None:
    """Raise TransportError unless all regions lie within a slab of ``slab_bytes``."""
    for number, (offset, nbytes) in enumerate(regions):
        if offset < 0 or nbytes < 0 or offset + nbytes > slab_bytes:
            raise TransportError(
                f"region {number} ({nbytes} bytes at {offset}) is outside {whose} memory "
                f"of {slab_bytes} bytes"
            )


def _limited(data: bytes, what: str) -> bytes:
    if len(data) > MAX_ADDRESS_BYTES:
        raise TransportError(f"{what} takes {len(data)} bytes, more than {MAX_ADDRESS_BYTES}")
    return data


def _decode(data: bytes, kind: type[T], what: str) -> T:
    _limited(data, what)
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise TransportError(f"{what} cannot be decoded: {error}") from error
