"""The wire between a cache process (DEALER) and the controller (ROUTER).

One outbound connection per cache process carries everything: registration, changes and
heartbeats one way, commands with correlation ids the other way. A message is one msgpack frame,
``[version, message]``. A frame that does not decode is counted and dropped.

**Registration.** A connection begins unregistered: its first message is :class:`Register`, and
anything else is answered by :class:`NotRegistered`. :class:`Registered` names the sequence number
from which each location goes on. :class:`Fenced` and :class:`Refused` reject a registration; the
cache process then asks again, slowly.

**Changes.** Each location numbers its changes from 1. A :class:`Batch` names only keys whose state
changed, as one blob of 16-byte keys. A gap makes the controller ask with :class:`Resync`, and the
later batches follow, or a snapshot in :class:`SnapshotPart`. A :class:`Heartbeat` carries a digest
of each location, so that even an index that differs without a gap is noticed.

**Operations.** The operation id names an operation on every connection of a cache process.
:class:`StartOperation` is repeated until :class:`OperationStarted`, :class:`OperationRejected` or
:class:`OperationEnded` answers, and :class:`OperationEnded` until :class:`OperationAcknowledged`.
Each takes effect once, however often it arrives, so that an operation starts at most once.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, TypeVar

import msgspec

from lmcache_kit.errors import ProtocolError
from lmcache_kit.interfaces.operations import (
    OperationRequest,
    OperationStatus,
    Progress,
    Scope,
)
from lmcache_kit.keys import KEY_BYTES, ChunkKey, Namespace
from lmcache_kit.protocol import framing

VERSION = 2
MAX_FRAME_BYTES = 8 * 1024 * 1024
MAX_KEYS_PER_MESSAGE = 16_384
MAX_TEXT = 2000
_MAX_NAME = 256
_MAX_KNOWN = 100
MAX_NAMESPACES = 64


class PartialChunkEntry(NamedTuple):
    """A partial chunk: enough to find it for a longer prompt that starts with it."""

    key: ChunkKey
    parent: ChunkKey
    tokens: int


class Position(NamedTuple):
    """The sequence number of a location's last change, and a digest of all its keys.

    ``keys`` counts them. ``xor`` is the XOR of the first 8 bytes of each, read as a little-endian
    integer.
    """

    location: str
    seq: int
    keys: int
    xor: int


class WorkerPort(NamedTuple):
    """One rank, and the port configured for it (0: none)."""

    rank: int
    port: int


# Cache process to controller.


class Register(msgspec.Struct, frozen=True, tag="register"):
    """The first message of a connection, sent again whenever something in it changes.

    ``incarnation``: 16 bytes. ``started``: seconds since the epoch; of two incarnations that claim
    the same instance the later one wins. ``peer_key`` is the secret that signs capabilities for
    the KV behind ``peer_url`` (:mod:`lmcache_kit.protocol.capability`).
    """

    instance_id: str
    incarnation: bytes
    started: float
    host: str
    heartbeat_s: float
    locations: tuple[str, ...]
    workers: tuple[WorkerPort, ...]
    namespaces: tuple[Namespace, ...]
    peer_url: str | None = None
    peer_key: bytes = b""

    def __repr__(self) -> str:
        return f"Register({self.instance_id!r}, {self.incarnation.hex()})"


class Batch(msgspec.Struct, frozen=True, tag="batch"):
    """The keys that a location has got and lost since ``seq - 1``; no key stands in both."""

    location: str
    seq: int
    added: bytes
    removed: bytes
    partial_chunks: tuple[PartialChunkEntry, ...] = ()


class SnapshotPart(msgspec.Struct, frozen=True, tag="snapshot"):
    """Part ``part`` (from 0) of all keys at a location as of ``seq``.

    The controller builds a snapshot aside, and swaps it in when the ``last`` part has arrived.
    """

    location: str
    seq: int
    part: int
    last: bool
    keys: bytes
    partial_chunks: tuple[PartialChunkEntry, ...] = ()


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The cache process is alive. ``positions`` tell how far each location has come."""

    positions: tuple[Position, ...]


class Confirm(msgspec.Struct, frozen=True, tag="confirm"):
    """Ask whether the index holds everything at ``location`` up to ``seq``.

    Repeated until :class:`Confirmed` answers.
    """

    location: str
    seq: int


class Result(msgspec.Struct, frozen=True, tag="result"):
    """Answer to a :class:`Command`; ``error`` is empty when it went well."""

    correlation: int
    error: str = ""
    values: dict[str, int | float | str] = {}


class OperationStarted(msgspec.Struct, frozen=True, tag="operation_started"):
    """The request is accepted."""

    operation_id: str
    scope: Scope


class OperationRejected(msgspec.Struct, frozen=True, tag="operation_rejected"):
    """The request cannot be carried out; nothing was done.

    ``reason`` is "unknown" for a ``name`` of a ``kind`` that is not among ``known``, "invalid",
    "refused", or "failed" for a defect of the cache process.
    """

    operation_id: str
    reason: Literal["unknown", "invalid", "refused", "failed"]
    message: str
    hint: str = ""
    kind: str = ""
    name: str = ""
    known: tuple[str, ...] = ()

    def cut(self) -> OperationRejected:
        """Return the same with texts of bounded length."""
        return OperationRejected(
            self.operation_id,
            self.reason,
            self.message[:MAX_TEXT],
            self.hint[:MAX_TEXT],
            self.kind[:_MAX_NAME],
            self.name[:_MAX_NAME],
            tuple(name[:_MAX_NAME] for name in self.known[:_MAX_KNOWN]),
        )


class OperationProgressed(msgspec.Struct, frozen=True, tag="operation_progressed"):
    """Progress of an operation; only the last message counts."""

    operation_id: str
    progress: Progress


class OperationEnded(msgspec.Struct, frozen=True, tag="operation_ended"):
    """The end of an operation. Repeated until :class:`OperationAcknowledged` answers."""

    operation_id: str
    status: OperationStatus

    def __post_init__(self) -> None:
        """Raise ValueError for a state that is not final."""
        if not self.status.ended:
            raise ValueError(f"an operation does not end in state {self.status.state!r}")


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """The cache process ends on purpose."""


# Controller to cache process.


class Registered(msgspec.Struct, frozen=True, tag="registered"):
    """The registration is accepted.

    ``resume`` has the last ``seq`` of each location that the index holds; 0 for none.
    """

    resume: tuple[tuple[str, int], ...]


class NotRegistered(msgspec.Struct, frozen=True, tag="not_registered"):
    """A message arrived on a connection that has not registered. Register first."""


class Resync(msgspec.Struct, frozen=True, tag="resync"):
    """Send the changes after ``after_seq`` again, or a snapshot; ``snapshot`` insists on one."""

    location: str
    after_seq: int
    snapshot: bool = False


class Confirmed(msgspec.Struct, frozen=True, tag="confirmed"):
    """The index holds everything at ``location`` up to ``seq``."""

    location: str
    seq: int


class Fenced(msgspec.Struct, frozen=True, tag="fenced"):
    """A later incarnation, which runs at ``by_host``, serves this instance."""

    by_host: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The registration cannot be used, for the ``reason`` given. Try again, slowly."""

    reason: str


class Command(msgspec.Struct, frozen=True, tag="command"):
    """Carry out ``name`` and answer with the same ``correlation`` within ``deadline_s`` seconds."""

    correlation: int
    name: str
    deadline_s: float
    values: dict[str, int | float | str] = {}


class StartOperation(msgspec.Struct, frozen=True, tag="start_operation"):
    """Carry a request out within ``deadline_s`` seconds. Repeated until it is answered."""

    operation_id: str
    deadline_s: float
    request: OperationRequest


class CancelOperation(msgspec.Struct, frozen=True, tag="cancel_operation"):
    """Stop an operation. Answered by :class:`OperationEnded`, even if it never started."""

    operation_id: str


class OperationAcknowledged(msgspec.Struct, frozen=True, tag="operation_acknowledged"):
    """The controller knows the end of this operation; forget the operation."""

    operation_id: str


OperationReport: TypeAlias = (
    OperationStarted | OperationRejected | OperationProgressed | OperationEnded
)
OperationCommand: TypeAlias = StartOperation | CancelOperation | OperationAcknowledged
FromAgent: TypeAlias = (
    Register | Batch | SnapshotPart | Heartbeat | Confirm | Result | OperationReport | Goodbye
)
FromController: TypeAlias = (
    Registered | NotRegistered | Resync | Confirmed | Fenced | Refused | Command | OperationCommand
)

_M = TypeVar("_M")

_encoder = msgspec.msgpack.Encoder()
_from_agent = msgspec.msgpack.Decoder(tuple[int, FromAgent])
_from_controller = msgspec.msgpack.Decoder(tuple[int, FromController])


def encode(message: FromAgent | FromController) -> bytes:
    """Encode a message as one frame."""
    return _encoder.encode((VERSION, message))


def decode_from_agent(frame: bytes | memoryview) -> FromAgent:
    """Decode a frame. Raise ProtocolError for anything but a message of this version."""
    return _decode(_from_agent, frame)


def decode_from_controller(frame: bytes | memoryview) -> FromController:
    """Decode a frame. Raise ProtocolError for anything but a message of this version."""
    return _decode(_from_controller, frame)


def split_keys(blob: bytes) -> list[ChunkKey]:
    """Return the keys of a blob. Raise ProtocolError for a part of a key, or for too many keys."""
    count, rest = divmod(len(blob), KEY_BYTES)
    if rest or count > MAX_KEYS_PER_MESSAGE:
        raise ProtocolError(
            f"a blob of {len(blob)} bytes is no list of up to {MAX_KEYS_PER_MESSAGE} keys"
        )
    return [blob[i : i + KEY_BYTES] for i in range(0, len(blob), KEY_BYTES)]


def check_partial_chunks(entries: tuple[PartialChunkEntry, ...]) -> None:
    """Raise ProtocolError for an impossible entry, or for too many entries."""
    if len(entries) > MAX_KEYS_PER_MESSAGE:
        raise ProtocolError(
            f"{len(entries)} partial chunks are over the {MAX_KEYS_PER_MESSAGE} allowed"
        )
    for entry in entries:
        if len(entry.key) != KEY_BYTES or len(entry.parent) != KEY_BYTES or entry.tokens < 1:
            raise ProtocolError(f"not a partial chunk: {entry!r:.200}")


def _decode(decoder: msgspec.msgpack.Decoder[tuple[int, _M]], frame: bytes | memoryview) -> _M:
    version, message = framing.decode(decoder, frame, MAX_FRAME_BYTES)
    if why := framing.version_mismatch(version, VERSION):
        raise ProtocolError(why)
    return message
