"""Pins: long holds by operators."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from lmcache_kit.cache.index.entries import PartialChunk, big_endian
from lmcache_kit.interfaces.operations import PinInfo
from lmcache_kit.keys import TOKEN_BYTES

MAX_PINS = 1 << 14


@dataclass(slots=True)
class _Pin:
    pin_id: str
    owner: str
    partial_chunks: list[PartialChunk]
    expires: float | None

    @property
    def left(self) -> list[PartialChunk]:
        """What is still stored: a pinned chunk goes when it is corrupt, or cleared by force."""
        return [partial for partial in self.partial_chunks if partial.entry.linked]


class Pins:
    """Who keeps what for how long. Pinned chunks never weigh more than ``budget_bytes``."""

    def __init__(self, budget_bytes: int, clock: Callable[[], float]) -> None:
        self.budget_bytes = budget_bytes
        self._clock = clock
        self._pins: dict[str, _Pin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def pinned_bytes(self) -> int:
        """What all pinned chunks weigh now, each counted once."""
        entries = {
            id(partial.entry): partial.entry for pin in self._pins.values() for partial in pin.left
        }
        return sum(entry.nbytes for entry in entries.values())

    def add(
        self, pin_id: str, owner: str, ttl_s: float | None, partial_chunks: Sequence[PartialChunk]
    ) -> list[PartialChunk]:
        """Pin as many of these chunks as fit, in order; an earlier pin of this id ends.

        Raises ValueError when there are too many pins.
        """
        self.remove([pin_id])
        if len(self._pins) >= MAX_PINS:
            raise ValueError(f"there are {MAX_PINS} pins already; unpin some")
        left_bytes = self.budget_bytes - self.pinned_bytes
        kept: list[PartialChunk] = []
        for partial in partial_chunks:
            cost_bytes = 0 if partial.entry.pins else partial.entry.nbytes
            if cost_bytes > left_bytes:
                break
            left_bytes -= cost_bytes
            partial.entry.pins += 1
            kept.append(partial)
        if kept:
            expires = None if ttl_s is None else self._clock() + ttl_s
            self._pins[pin_id] = _Pin(pin_id, owner, kept, expires)
        return kept

    def remove(self, pin_ids: Iterable[str]) -> list[PartialChunk]:
        """End these pins; returns what they held, each chunk once."""
        freed: dict[int, PartialChunk] = {}
        for pin_id in pin_ids:
            pin = self._pins.pop(pin_id, None)
            for partial in pin.partial_chunks if pin else ():
                partial.entry.pins -= 1
                before = freed.get(id(partial.entry))
                if partial.entry.linked and (before is None or before.tokens < partial.tokens):
                    freed[id(partial.entry)] = partial
        return list(freed.values())

    def within(self, digests: Collection[bytes] | None, tokens: bytes | None) -> list[str]:
        """Ids of the pins that hold nothing but first tokens of packed ``tokens`` (None: any) in
        these namespaces (None: any)."""
        sort_key = None if tokens is None else big_endian(tokens)
        return [pin.pin_id for pin in self._pins.values() if _is_within(pin, digests, sort_key)]

    def expire(self) -> int:
        """End the pins whose time is over; returns how many."""
        now = self._clock()
        late = [p.pin_id for p in self._pins.values() if p.expires is not None and p.expires <= now]
        self.remove(late)
        return len(late)

    def infos(self, location: str) -> list[PinInfo]:
        """All pins, the oldest first."""
        now = self._clock()
        return [
            PinInfo(
                pin_id=pin.pin_id,
                location=location,
                tokens=sum(partial.tokens for partial in pin.left),
                chunks=len(pin.left),
                nbytes=sum(partial.entry.nbytes for partial in pin.left),
                owner=pin.owner,
                expires_in_s=None if pin.expires is None else max(0.0, pin.expires - now),
            )
            for pin in self._pins.values()
        ]


def _is_within(pin: _Pin, digests: Collection[bytes] | None, sort_key: bytes | None) -> bool:
    texts: dict[bytes, bytes] = {}
    for entry, tokens in pin.partial_chunks:
        text = texts.get(entry.namespace.digest, b"")
        texts[entry.namespace.digest] = text + entry.sort_key[: tokens * TOKEN_BYTES]
    return all(
        (digests is None or digest in digests) and (sort_key is None or sort_key.startswith(text))
        for digest, text in texts.items()
    )
