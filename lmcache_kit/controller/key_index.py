"""The inverted index: chunk key to the set of its holders, as the bits of an integer.

A holder is one location of one incarnation of a cache process. A holder owns a bit until it is
closed. Closing only takes the bit out of the visible ones, and :meth:`KeyIndex.sweep` clears the
bit from the keys piece by piece before another holder may own it. So a lookup costs the same
however many holders there are, dead or alive, and nothing stops the event loop for long: keys lie
in 256 dictionaries by their first byte, which bounds both a step of a sweep and the growth of a
dictionary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from typing import NamedTuple

from lmcache_kit.keys import ChunkKey
from lmcache_kit.protocol.control import PartialChunkEntry

_SHARDS = 256
_LOW_64 = (1 << 64) - 1
_SHARED_MASKS = 65_536


class Owner(NamedTuple):
    """The instance and location of a holder."""

    instance_id: str
    location: str


class Holder:
    """One bit of the index, and a digest of the keys that carry the bit."""

    __slots__ = ("bit", "keys", "mask", "owner", "xor")

    def __init__(self, bit: int, owner: Owner) -> None:
        self.bit = bit
        self.owner = owner
        self.mask = 1 << bit
        self.keys = 0
        self.xor = 0


class KeyIndex:
    """Keys and their holders. Not thread-safe; belongs to the controller's event loop."""

    def __init__(self) -> None:
        self.visible = 0
        self._shards: list[dict[ChunkKey, int]] = [{} for _ in range(_SHARDS)]
        self._shared: dict[int, int] = {}
        self._free: list[int] = []
        self._owners: list[Owner] = []
        self._dead = 0
        self._sweeping = 0
        self._next_shard = 0
        self._partial: dict[ChunkKey, tuple[ChunkKey, int]] = {}
        self._partial_lengths: dict[ChunkKey, dict[int, int]] = {}

    def __len__(self) -> int:
        """Count distinct keys, those of dead holders included until these are swept."""
        return sum(map(len, self._shards))

    @property
    def holders(self) -> int:
        """Number of open holders, visible or not."""
        return len(self._owners) - len(self._free) - self._dead.bit_count()

    @property
    def dead(self) -> int:
        """Number of closed holders that are not swept yet."""
        return self._dead.bit_count()

    # Holders.

    def open(self, owner: Owner) -> Holder:
        """Make a holder without keys, not visible yet."""
        if self._free:
            bit = heappop(self._free)
            self._owners[bit] = owner
        else:
            bit = len(self._owners)
            self._owners.append(owner)
        return Holder(bit, owner)

    def owner(self, bit: int) -> Owner:
        """Return the owner of an open holder."""
        return self._owners[bit]

    def show(self, holder: Holder) -> None:
        """Make a holder visible to lookups."""
        self.visible |= holder.mask

    def hide(self, holder: Holder) -> None:
        """Hide a holder from lookups, and keep its keys."""
        self.visible &= ~holder.mask

    def close(self, holder: Holder) -> None:
        """Hide a holder for good; its keys are swept later. Close each holder once."""
        self.hide(holder)
        if holder.keys:
            self._dead |= holder.mask
        else:
            heappush(self._free, holder.bit)

    def replace(self, old: Holder, new: Holder) -> None:
        """Close ``old``, and make ``new`` visible if ``old`` was."""
        if self.visible & old.mask:
            self.show(new)
        self.close(old)

    # Keys.

    def add(
        self,
        holder: Holder,
        keys: Iterable[ChunkKey],
        partial_chunks: Iterable[PartialChunkEntry] = (),
    ) -> None:
        """Add keys to a holder; skip those that it has. ``partial_chunks`` are among them."""
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
        for entry in partial_chunks:
            self._add_partial(entry)

    def remove(self, holder: Holder, keys: Iterable[ChunkKey]) -> None:
        """Remove keys from a holder; skip those that it lacks."""
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
        """Return the visible holders of a key, as a mask."""
        return self._shards[key[0]].get(key, 0) & self.visible

    def partial_lengths(self, parent: ChunkKey) -> Iterable[int]:
        """Return the token counts of the partial chunks stored after ``parent``."""
        return self._partial_lengths.get(parent, ())

    def keys_of(self, holder: Holder) -> Iterator[ChunkKey]:
        """Iterate over the keys of a holder. Walks the whole index: for tests and tools."""
        for shard in self._shards:
            for key, held in shard.items():
                if held & holder.mask:
                    yield key

    # Dead holders.

    def sweep(self) -> bool:
        """Clear dead holders from one part of the index. Return False when none is left."""
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
        """Build a new dictionary, because one that only loses keys keeps its memory."""
        kept = {key: held for key, held in shard.items() if not held & gone}
        if len(kept) == len(shard):
            return shard
        for key, held in shard.items():
            if held & gone:
                if rest := held & ~gone:
                    kept[key] = self._share(rest)
                elif key in self._partial:
                    self._remove_partial(key)
        return kept

    def _put(self, shard: dict[ChunkKey, int], key: ChunkKey, held: int) -> None:
        if held:
            shard[key] = self._share(held)
        else:
            del shard[key]
            self._remove_partial(key)

    def _share(self, mask: int) -> int:
        """Keep one object for equal masks: masks of many bits are large, and few differ."""
        if len(self._shared) >= _SHARED_MASKS:
            self._shared.clear()
        return self._shared.setdefault(mask, mask)

    def _add_partial(self, entry: PartialChunkEntry) -> None:
        if entry.key in self._partial or entry.key not in self._shards[entry.key[0]]:
            return
        self._partial[entry.key] = (entry.parent, entry.tokens)
        lengths = self._partial_lengths.setdefault(entry.parent, {})
        lengths[entry.tokens] = lengths.get(entry.tokens, 0) + 1

    def _remove_partial(self, key: ChunkKey) -> None:
        known = self._partial.pop(key, None)
        if known is None:
            return
        parent, tokens = known
        lengths = self._partial_lengths[parent]
        lengths[tokens] -= 1
        if not lengths[tokens]:
            del lengths[tokens]
            if not lengths:
                del self._partial_lengths[parent]


def bits(mask: int) -> Iterator[int]:
    """Iterate over the numbers of the bits that are set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
