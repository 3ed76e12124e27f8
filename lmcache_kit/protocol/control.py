"""The wire between a cache process (DEALER) and the controller (ROUTER).

One outbound connection per cache process carries everything: registration, events and
heartbeats one way, commands with correlation ids the other way. A message is one msgpack frame,
``[version, message]``. A frame that does not decode is counted and dropped.

Index events are numbered per location from 1; a :class:`Batch` names only keys whose state
changed, as one blob of 16-byte keys. A gap is healed by replay or by a snapshot.

Orders are named by the id of their event: :class:`Begin` is repeated until it is answered and
:class:`Ended` until it is acknowledged, over as many connections as it takes, and either of them
takes effect once.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, TypeVar

import msgspec

from lmcache_kit.errors import ProtocolError
from lmcache_kit.interfaces.operations import Accepted, Order, Outcome, Progress
from lmcache_kit.keys import KEY_BYTES, ChunkKey, Namespace

VERSION = 1
MAX_FRAME_BYTES = 8 * 1024 * 1024
MAX_KEYS_PER_MESSAGE = 16_384
MAX_TEXT = 2000
_MAX_NAME = 256
_MAX_KNOWN = 100
MAX_NAMESPACES = 64


class Tail(NamedTuple):
    """A partial chunk: enough to find it for a longer prompt that starts with it."""

    key: ChunkKey
    parent: ChunkKey
    tokens: int


class Position(NamedTuple):
    """Where a location's event stream stands, and what the whole of it sums up to.

    ``xor`` is the XOR of the first 8 bytes of all keys, read as little-endian integers.
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
    """First message of a connection, and again whenever something in it changes.

    ``incarnation``: 16 bytes that name this life. ``started``: seconds since the epoch; of two
    that claim the same instance the later one wins. ``peer_key``: what claims on the KV behind
    ``peer_url`` are sealed with (:mod:`lmcache_kit.protocol.capability`); a secret.
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
    """Keys that came to and went from a location since ``seq - 1``; no key stands in both."""

    location: str
    seq: int
    added: bytes
    removed: bytes
    tails: tuple[Tail, ...] = ()


class SnapshotPart(msgspec.Struct, frozen=True, tag="snapshot"):
    """Part ``part`` (from 0) of everything at a location as of ``seq``; built aside until
    ``last``."""

    location: str
    seq: int
    part: int
    last: bool
    keys: bytes
    tails: tuple[Tail, ...] = ()


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Alive, and where each location stands."""

    positions: tuple[Position, ...]


class Confirm(msgspec.Struct, frozen=True, tag="confirm"):
    """Does the index hold everything at ``location`` up to ``seq``? Said again until
    :class:`Confirmed` comes."""

    location: str
    seq: int


class Result(msgspec.Struct, frozen=True, tag="result"):
    """Answer to a :class:`Command`; ``error`` is empty when it went well."""

    correlation: int
    error: str = ""
    values: dict[str, int | float | str] = {}


class Began(msgspec.Struct, frozen=True, tag="began"):
    """Answer to a :class:`Begin`."""

    event_id: str
    accepted: Accepted


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """Answer to a :class:`Begin` that cannot be carried out; nothing was done.

    ``why``: "unknown" for a ``name`` of a ``kind`` that is not among ``known``, "invalid",
    "refused", or "failed" for a defect on this side.
    """

    event_id: str
    why: Literal["unknown", "invalid", "refused", "failed"]
    message: str
    hint: str = ""
    kind: str = ""
    name: str = ""
    known: tuple[str, ...] = ()

    def cut(self) -> Rejected:
        """The same, no longer than anybody reads."""
        return Rejected(
            self.event_id,
            self.why,
            self.message[:MAX_TEXT],
            self.hint[:MAX_TEXT],
            self.kind[:_MAX_NAME],
            self.name[:_MAX_NAME],
            tuple(name[:_MAX_NAME] for name in self.known[:_MAX_KNOWN]),
        )


class Progressed(msgspec.Struct, frozen=True, tag="progressed"):
    """How far an order has come; only the last one matters."""

    event_id: str
    progress: Progress


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """How an order ended. Said again until :class:`Settled` comes."""

    event_id: str
    outcome: Outcome


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """This cache process ends on purpose."""


# Controller to cache process.


class Registered(msgspec.Struct, frozen=True, tag="registered"):
    """``resume``: for each location the last ``seq`` that the index holds (0: nothing)."""

    resume: tuple[tuple[str, int], ...]


class NotRegistered(msgspec.Struct, frozen=True, tag="who_are_you"):
    """Something came from a connection that has not registered here: register."""


class Resync(msgspec.Struct, frozen=True, tag="resync"):
    """Send what came after ``after_seq`` again, or a snapshot; ``snapshot`` insists on one."""

    location: str
    after_seq: int
    snapshot: bool = False


class Confirmed(msgspec.Struct, frozen=True, tag="confirmed"):
    """The index holds everything at ``location`` up to ``seq``."""

    location: str
    seq: int


class Fenced(msgspec.Struct, frozen=True, tag="fenced"):
    """A later incarnation holds this instance id; it runs at ``by_host``."""

    by_host: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The registration cannot be used; ``reason`` is for the log. Try again, slowly."""

    reason: str


class Command(msgspec.Struct, frozen=True, tag="command"):
    """Do something and answer with the same ``correlation`` within ``deadline_s`` seconds."""

    correlation: int
    name: str
    deadline_s: float
    values: dict[str, int | float | str] = {}


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Carry an order out within ``deadline_s`` seconds. Said again until it is answered."""

    event_id: str
    deadline_s: float
    order: Order


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop the order of this event. Answered by :class:`Ended`, also when it never came."""

    event_id: str


class Settled(msgspec.Struct, frozen=True, tag="settled"):
    """The end of this event is known; forget it."""

    event_id: str


AboutOrders: TypeAlias = Began | Rejected | Progressed | Ended
AboutKeys: TypeAlias = Batch | SnapshotPart | Heartbeat | Confirm
FromAgent: TypeAlias = Register | AboutKeys | Result | AboutOrders | Goodbye
FromController: TypeAlias = (
    Registered
    | NotRegistered
    | Resync
    | Confirmed
    | Fenced
    | Refused
    | Command
    | Begin
    | Cancel
    | Settled
)

_M = TypeVar("_M")

_encoder = msgspec.msgpack.Encoder()
_from_agent = msgspec.msgpack.Decoder(tuple[int, FromAgent])
_from_controller = msgspec.msgpack.Decoder(tuple[int, FromController])


def encode(message: FromAgent | FromController) -> bytes:
    """One frame."""
    return _encoder.encode((VERSION, message))


def decode_from_agent(frame: bytes | memoryview) -> FromAgent:
    """Raises ProtocolError for anything that is not a message of this version."""
    return _decode(_from_agent, frame)


def decode_from_controller(frame: bytes | memoryview) -> FromController:
    """Raises ProtocolError for anything that is not a message of this version."""
    return _decode(_from_controller, frame)


def split_keys(blob: bytes) -> list[ChunkKey]:
    """Keys of a blob. Raises ProtocolError when it is no whole number of keys, or too many."""
    count, rest = divmod(len(blob), KEY_BYTES)
    if rest or count > MAX_KEYS_PER_MESSAGE:
        raise ProtocolError(
            f"a blob of {len(blob)} bytes is no list of up to {MAX_KEYS_PER_MESSAGE} keys"
        )
    return [blob[i : i + KEY_BYTES] for i in range(0, len(blob), KEY_BYTES)]


def check_tails(tails: tuple[Tail, ...]) -> tuple[Tail, ...]:
    """The same tails. Raises ProtocolError when one cannot be meant, or when there are too many."""
    if len(tails) > MAX_KEYS_PER_MESSAGE:
        raise ProtocolError(f"{len(tails)} tails are over the {MAX_KEYS_PER_MESSAGE} allowed")
    for tail in tails:
        if len(tail.key) != KEY_BYTES or len(tail.parent) != KEY_BYTES or tail.tokens < 1:
            raise ProtocolError(f"no partial chunk: {tail!r:.200}")
    return tails


def _decode(decoder: msgspec.msgpack.Decoder[tuple[int, _M]], frame: bytes | memoryview) -> _M:
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(frame)} bytes is over the {MAX_FRAME_BYTES} allowed")
    try:
        version, message = decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The last two are what msgspec lets through for bad UTF-8 and for deep nesting.
        raise ProtocolError(f"not a message: {error}") from error
    if version != VERSION:
        raise ProtocolError(f"wire version {version}; this side speaks {VERSION}")
    return message
