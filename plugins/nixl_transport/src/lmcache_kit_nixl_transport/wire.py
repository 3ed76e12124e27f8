"""What peers tell each other, in msgpack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from lmcache_kit.errors import TransportError
from lmcache_kit.interfaces.memory import Region
from lmcache_kit.interfaces.transport import MAX_ADDRESS_BYTES, ReadableRegion

NONCE_BYTES = 1 << 20
"""So many that they are seldom all there before NIXL's call returns, but by CMA."""

T = TypeVar("T")
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Pointer = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Word = Annotated[str, Meta(max_length=128)]


class Span(msgspec.Struct, frozen=True):
    """Registered bytes of some process."""

    address: Pointer
    nbytes: Count


class Address(msgspec.Struct, frozen=True):
    """One incarnation of a cache process.

    ``metadata`` is NIXL's. At ``nonce`` lie NONCE_BYTES random bytes, registered, with the SHA-256
    ``digest``, for a peer to see that it reaches this process and no other. ``cma``: UCX may
    use it on that side. ``rdma`` names active devices.
    """

    agent: Annotated[str, Meta(min_length=1, max_length=64)]
    metadata: Annotated[bytes, Meta(max_length=MAX_ADDRESS_BYTES)]
    slab: Span
    nonce: Pointer
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]
    pid: Annotated[int, Meta(ge=1, lt=1 << 31)]
    boot_id: Word
    cma: bool
    rdma: Annotated[tuple[Word, ...], Meta(max_length=64)]


def encode(message: Address) -> bytes:
    return _limited(msgspec.msgpack.encode(message), "this process's address")


def decode_address(data: bytes) -> Address:
    return _decode(data, Address, "a peer's address")


def encode_offer(regions: Sequence[ReadableRegion]) -> bytes:
    """``[[offset, nbytes], ...]``."""
    spans = [(offered.region.offset, offered.region.nbytes) for offered in regions]
    return _limited(msgspec.msgpack.encode(spans), f"an offer of {len(spans)} regions")


def decode_offer(data: bytes) -> list[Region]:
    """Of any numbers: see :func:`check_inside`."""
    return _decode(data, list[Region], "a peer's offer")


def check_inside(regions: Sequence[Region], slab_bytes: int, whose: str) -> None:
    """Raises TransportError if one of them is not all within a slab of that size."""
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
        raise TransportError(f"{what} means nothing: {error}") from error
