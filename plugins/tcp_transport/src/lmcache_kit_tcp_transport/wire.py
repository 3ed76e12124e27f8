"""Wire format: requests of 32 bytes from the reader, frames of 32 bytes from the server."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import msgspec
from xxhash import xxh32_intdigest

from lmcache_kit.errors import TransportError

VERSION = 1
OFFER_TOKEN_BYTES = 16
HEADER_BYTES = 32
MAX_REGIONS = 1 << 20
MAX_REASON_BYTES = 1024

_REQUEST_MAGIC = b"LKTq"
_FRAME_MAGIC = b"LKTa"
# Magic and version come first in every version of the protocol, so that peers can tell them apart.
_PREFIX = struct.Struct("!4sH")
_REQUEST = struct.Struct("!4sHHI16s")
_FRAME = struct.Struct("!4sHHIQQ")
_OFFER = struct.Struct("!16sI")
_CHECK = struct.Struct("!I")


class Op(IntEnum):
    """Operation of a request."""

    HELLO = 1
    READ = 2


class Kind(IntEnum):
    """Kind of a frame."""

    HELLO = 1
    READING = 2
    REGION = 3
    REFUSED = 4


class Request(NamedTuple):
    """A request; ``regions`` is the number of regions that the reader expects in the offer."""

    op: Op
    regions: int = 0
    token: bytes = bytes(OFFER_TOKEN_BYTES)


class Frame(NamedTuple):
    """A frame.

    ``nbytes`` bytes follow a REGION (its bytes) and a REFUSED (its reason in UTF-8); ``checksum``
    is their xxh3-64. ``number`` is the number of the region, in READING the count of regions.
    """

    kind: Kind
    number: int = 0
    nbytes: int = 0
    checksum: int = 0


class UnsupportedVersion(TransportError):
    """The peer speaks another version of this protocol."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"the peer speaks version {version} of the transport tcp, this side {VERSION}",
            hint="Install the same lmcache-kit-tcp-transport on both hosts",
        )


class Address(msgspec.Struct, frozen=True):
    """Address of a transport; later versions may add fields."""

    version: int


def pack_request(request: Request) -> bytes:
    return with_checksum(
        _REQUEST.pack(_REQUEST_MAGIC, VERSION, request.op, request.regions, request.token)
    )


def unpack_request(header: bytes) -> Request:
    """Unpack a request. Raises TransportError, UnsupportedVersion for another version's."""
    _, _, op, regions, token = _REQUEST.unpack(_body(header, _REQUEST_MAGIC, "request"))
    if op not in set(Op):
        raise TransportError(f"the peer requests {op}; known are {list(map(int, Op))}")
    return Request(Op(op), regions, token)


def pack_frame(frame: Frame) -> bytes:
    return with_checksum(_FRAME.pack(_FRAME_MAGIC, VERSION, *frame))


def unpack_frame(header: bytes) -> Frame:
    """Unpack a frame. Raises TransportError, UnsupportedVersion for another version's."""
    _, _, kind, number, nbytes, checksum = _FRAME.unpack(_body(header, _FRAME_MAGIC, "frame"))
    if kind not in set(Kind):
        raise TransportError(f"the peer sends kind {kind}; known are {list(map(int, Kind))}")
    return Frame(Kind(kind), number, nbytes, checksum)


def pack_offer(token: bytes, count: int) -> bytes:
    return _OFFER.pack(token, count)


def unpack_offer(offer: bytes) -> tuple[bytes, int]:
    """Return the offer's token and its number of regions. Raises TransportError."""
    if len(offer) != _OFFER.size:
        raise TransportError(
            f"{len(offer)} bytes are no offer of the transport tcp, which has {_OFFER.size}"
        )
    token, count = _OFFER.unpack(offer)
    return token, count


def unpack_address(address: bytes) -> Address:
    """Decode an address. Raises TransportError, UnsupportedVersion for another version's."""
    try:
        peer = msgspec.msgpack.decode(address, type=Address)
    except msgspec.DecodeError as error:
        raise TransportError(f"the peer's address is no address of tcp: {error}") from error
    if peer.version != VERSION:
        raise UnsupportedVersion(peer.version)
    return peer


def with_checksum(body: bytes) -> bytes:
    return body + _CHECK.pack(xxh32_intdigest(body))


def _body(header: bytes, magic: bytes, what: str) -> bytes:
    found, version = _PREFIX.unpack_from(header)
    if found != magic:
        raise TransportError(f"the peer sends {header[:8].hex()}..., which begins no {what}")
    if version != VERSION:
        raise UnsupportedVersion(version)
    body = header[: -_CHECK.size]
    if with_checksum(body) != header:
        raise TransportError(f"a {what} from the peer is corrupt: its xxh32 does not match")
    return body
