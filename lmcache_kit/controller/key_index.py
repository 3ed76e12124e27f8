"""The inverted index: chunk key to the set of its holders, as the bits of an integer.

A holder is one location of one cache process in one life. It owns a bit until it is closed;
closing only takes the bit out of the visible ones, and :meth:`KeyIndex.sweep` clears it from the
keys piece by piece before another holder may have it. So a lookup costs the same however many
holders there are, dead or alive, and no operation stops the event loop for long: keys lie in 256
dictionaries by their first byte, which bounds both a sweep's step and a dictionary's growth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from typing import NamedTuple

from lmcache_kit.keys import ChunkKey
from lmcache_kit.protocol.control import Tail

_SHARDS = 256
_LOW_64 = (1 << 64) - 1
_SHARED_MASKS = 65_536


class Owner(NamedTuple):
    """Whom a holder stands for."""

    instance_id: str
    location: str


class Holder:
    """One bit of the index, and the digest of the keys that carry it."""

    __slots__ = ("bit", "keys", "mask", "owner", "xor")

    def __init__(self, bit: int, owner: Owner) -> None:
        self.bit = bit
        self.owner = owner
        self.mask = 1 << bit
        self.keys = 0
        self.xor = 0


class KeyIndex:
    """Not thread-safe; belongs to the controller's event loop."""

    def __init__(self) -> None:
        self.visible = 0
        self._shards: list[dict[ChunkKey, int]] = [{} for _ in range(_SHARDS)]
        self._shared: dict[int, int] = {}
        self._free: list[int] = []
        self._owners: list[Owner] = []
        self._dead = 0
        self._sweeping = 0
        self._next_shard = 0
        self._tail_of: dict[ChunkKey, tuple[ChunkKey, int]] = {}
        self._tails: dict[ChunkKey, dict[int, int]] = {}

    def __len__(self) -> int:
        """Distinct keys, those of dead holders included until they are swept."""
        return sum(map(len, self._shards))

    @property
    def holders(self) -> int:
        """Holders that are open, visible or not."""
        return len(self._owners) - len(self._free) - self._dead.bit_count()

    @property
    def dead(self) -> int:
        """Closed holders that are not swept yet."""
        return self._dead.bit_count()

    # Holders.

    def open(self, owner: Owner) -> Holder:
        """A new holder of nothing, not visible yet."""
        if self._free:
            bit = heappop(self._free)
            self._owners[bit] = owner
        else:
            bit = len(self._owners)
            self._owners.append(owner)
        return Holder(bit, owner)

    def owner(self, bit: int) -> Owner:
        """Whom an open holder stands for."""
        return self._owners[bit]

    def show(self, holder: Holder) -> None:
        """Let lookups see it."""
        self.visible |= holder.mask

    def hide(self, holder: Holder) -> None:
        """Let lookups not see it, and keep what it holds."""
        self.visible &= ~holder.mask

    def close(self, holder: Holder) -> None:
        """It holds nothing any more, at once; close a holder only once."""
        self.hide(holder)
        if holder.keys:
            self._dead |= holder.mask
        else:
            heappush(self._free, holder.bit)

    def replace(self, old: Holder, new: Holder) -> None:
        """``new`` takes the place of ``old``, seen or unseen as that was."""
        if self.visible & old.mask:
            self.show(new)
        self.close(old)

    # Keys.

    def add(self, holder: Holder, keys: Iterable[ChunkKey], tails: Iterable[Tail] = ()) -> None:
        """Keys that it holds already are passed over. ``tails`` tell of keys among them."""
        mask, shards = holder.mask, self._shards
        count = xor = 0
        for key in keys:
            shard = shards[key[0]]
            held = shard.get(key)
            if held is None:
                shard[key] = mask
            elif held & mask:
                continue
            else:
                shard[key] = self._share(held | mask)
            count += 1
            xor ^= int.from_bytes(key, "little")
        holder.keys += count
        holder.xor ^= xor & _LOW_64
        for tail in tails:
            self._note_tail(tail)

    def remove(self, holder: Holder, keys: Iterable[ChunkKey]) -> None:
        """Keys that it does not hold are passed over."""
        mask, shards = holder.mask, self._shards
        count = xor = 0
        for key in keys:
            shard = shards[key[0]]
            held = shard.get(key, 0)
            if not held & mask:
                continue
            self._put(shard, key, held ^ mask)
            count += 1
            xor ^= int.from_bytes(key, "little")
        holder.keys -= count
        holder.xor ^= xor & _LOW_64

    def held(self, key: ChunkKey) -> int:
        """The visible holders of a key, as a mask."""
        return self._shards[key[0]].get(key, 0) & self.visible

    def tail_lengths(self, parent: ChunkKey) -> Iterable[int]:
        """Token counts of the partial chunks stored after ``parent``."""
        return self._tails.get(parent, ())

    def keys_of(self, holder: Holder) -> Iterator[ChunkKey]:
        """Everything that it holds; walks the whole index, for tests and tools."""
        for shard in self._shards:
            for key, held in shard.items():
                if held & holder.mask:
                    yield key

    # Dead holders.

    def sweep(self) -> bool:
        """Clear dead holders from one part of the index; False when none is left."""
        if not self._sweeping:
            if not self._dead:
                return False
            self._sweeping, self._next_shard = self._dead, 0
        gone = self._sweeping
        self._shards[self._next_shard] = self._without(gone, self._shards[self._next_shard])
        self._next_shard += 1
        if self._next_shard == _SHARDS:
            # Only bits that were dead before the first part was swept are clean everywhere.
            self._dead ^= gone
            self._sweeping = 0
            for bit in bits(gone):
                heappush(self._free, bit)
        return bool(self._dead)

    def _without(self, gone: int, shard: dict[ChunkKey, int]) -> dict[ChunkKey, int]:
        """A new dictionary: one that only loses keys keeps its memory."""
        kept = {key: held for key, held in shard.items() if not held & gone}
        if len(kept) == len(shard):
            return shard
        for key, held in shard.items():
            if held & gone:
                if rest := held & ~gone:
                    kept[key] = self._share(rest)
                elif key in self._tail_of:
                    self._forget_tail(key)
        return kept

    def _put(self, shard: dict[ChunkKey, int], key: ChunkKey, held: int) -> None:
        if held:
            shard[key] = self._share(held)
        else:
            del shard[key]
            self._forget_tail(key)

    def _share(self, mask: int) -> int:
        """Masks of many bits are large, and the same few are everywhere: keep one object each."""
        if len(self._shared) >= _SHARED_MASKS:
            self._shared.clear()
        return self._shared.setdefault(mask, mask)

    def _note_tail(self, tail: Tail) -> None:
        if tail.key in self._tail_of or tail.key not in self._shards[tail.key[0]]:
            return
        self._tail_of[tail.key] = (tail.parent, tail.tokens)
        lengths = self._tails.setdefault(tail.parent, {})
        lengths[tail.tokens] = lengths.get(tail.tokens, 0) + 1

    def _forget_tail(self, key: ChunkKey) -> None:
        known = self._tail_of.pop(key, None)
        if known is None:
            return
        parent, tokens = known
        lengths = self._tails[parent]
        lengths[tokens] -= 1
        if not lengths[tokens]:
            del lengths[tokens]
            if not lengths:
                del self._tails[parent]


def bits(mask: int) -> Iterator[int]:
    """Numbers of the bits that are set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
