"""Read the controller's replies on events and pins, and describe these in words."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from lmcache_kit.errors import ControlError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_S = TypeVar("_S", bound=msgspec.Struct)


class Transfer(msgspec.Struct, frozen=True):
    """How the bytes of a move come: the transport, and its ``description``."""

    transport: str
    description: str
    bytes: int
    gb_per_s: float


class Part(msgspec.Struct, frozen=True):
    """Progress at one location, or the sum over some. ``transfer`` is set for moves."""

    chunks_done: int
    chunks: int
    bytes_before: int
    bytes_after: int
    transfer: Transfer | None = None


class Event(msgspec.Struct, frozen=True):
    """One operation. ``ended`` is None while it goes on.

    ``old_position`` is the instance and location that a move takes from.
    """

    event_id: str
    operation: str
    instance_id: str
    location: str
    state: str
    num_tokens: int
    progress: list[Part]
    message: str
    ratio: float | None
    created: float
    ended: float | None
    old_position: tuple[str, str] | None = None

    @property
    def done(self) -> Part:
        """The sum over all locations."""
        done, chunks, before, after = (
            sum(getattr(part, name) for part in self.progress) for name in _SUMMED
        )
        transfers = (part.transfer for part in self.progress if part.transfer)
        return Part(done, chunks, before, after, next(transfers, None))


class Pin(msgspec.Struct, frozen=True):
    """One pin; ``expires_in_s`` is None for one without an end."""

    pin_id: str
    instance_id: str
    location: str
    num_tokens: int
    bytes: int
    owner: str
    expires_in_s: float | None


_SUMMED = ("chunks_done", "chunks", "bytes_before", "bytes_after")


def read(kind: type[_S], answer: Any) -> _S:
    """Convert a reply. Raise ControlError for one that does not come from a controller."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise ControlError(f"what answered is no controller: {error}") from error


def describe(event: Event) -> str:
    """Describe the progress or the end of an operation in one line."""
    done = event.done
    if event.ended is None:
        line = f"{event.state}: {done.chunks_done} of {done.chunks} chunks"
        return f"{line}; {size}" if (size := describe_transfer(done.transfer)) else line
    words = [f"{event.state}: {_counted(event.num_tokens, 'token')}"]
    if done.chunks:
        words.append(f"{done.chunks_done} of {_counted(done.chunks, 'chunk')}")
    if event.ratio is not None and done.bytes_before != done.bytes_after:
        words.append(f"{describe_sizes(done)}, ratio {event.ratio:.2f}")
    if size := describe_transfer(done.transfer, described=True):
        words.append(size)
    if event.message:
        words.append(event.message)
    return "; ".join(words)


def describe_transfer(transfer: Transfer | None, *, described: bool = False) -> str:
    """``270.0 KiB by NIXL (CMA on one host), 1.2 GB/s``; empty before anything has come."""
    if transfer is None or not transfer.bytes:
        return ""
    details = f" ({transfer.description})" if described and transfer.description else ""
    speed = f", {_speed(transfer.gb_per_s)}" if transfer.gb_per_s else ""
    return f"{shown_bytes(transfer.bytes)} by {transfer.transport}{details}{speed}"


def describe_sizes(done: Part) -> str:
    """``5.8 MiB became 1.0 MiB``."""
    return f"{shown_bytes(done.bytes_before)} became {shown_bytes(done.bytes_after)}"


def shown_bytes(number: float) -> str:
    """``1.5 MiB``."""
    for unit in _UNITS:
        if abs(number) < 1024 or unit == _UNITS[-1]:
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def _speed(gb_per_s: float) -> str:
    return f"{gb_per_s:.1f} GB/s" if gb_per_s >= 0.1 else f"{gb_per_s * 1000:.1f} MB/s"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
