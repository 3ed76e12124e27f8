"""Moves from one location of a cache process to another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from lmcache_kit.cache.memory.transcoding import Transcoded
from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces.operations import Outcome, Transfer
from lmcache_kit.peer.report import kept_chunks

if TYPE_CHECKING:
    from lmcache_kit.cache.descriptors import ChunkRef
    from lmcache_kit.cache.tier_base import Tier
    from lmcache_kit.cache.tiers.lower_tiers import LowerTiers
    from lmcache_kit.keys import ChunkKey

CONFIRM_S = 15.0
Confirm = Callable[[str, float], bool]
"""Waits for so many seconds until the controller knows what is at a location."""


class LocalMove:
    """Of ``holdings`` from ``source`` to ``goal``, chunk by chunk; what lies in a tier goes through
    memory. The source forgets what has come once the controller knows, unless it is a ``copy``."""

    def __init__(
        self,
        tiers: LowerTiers,
        source: Tier,
        goal: Tier,
        holdings: Sequence[ChunkRef],
        *,
        copy: bool,
        confirm: Confirm,
    ) -> None:
        self._tiers = tiers
        self._source = source
        self._goal = goal
        self._sizes = {holding.key: holding.nbytes for holding in holdings}
        self._copy = copy
        self._confirm = confirm
        self._come: dict[ChunkKey, None] = {}
        self._begun = time.monotonic()

    def shift(self, key: ChunkKey) -> Transcoded:
        """Have one chunk at the goal, and keep it there until the end."""
        try:
            self._tiers.promote(self._source, [key], self)
            self._tiers.offload(self._goal, [key], self)
        except BackendError as error:
            return Transcoded("failed", str(error))
        if not self._goal.references.acquire([key], self):
            self._come[key] = None
            return Transcoded("done")
        if self._source.contains(key):
            return Transcoded("failed", "there is no room for it")
        return Transcoded("gone")

    def end(self, outcome: Outcome) -> Outcome:
        """Have the source forget what has come; how it all ended."""
        try:
            why = "" if self._copy or not self._come else self._hand_over()
        finally:
            self._tiers.release(self)
            self._goal.references.release(self)
        nbytes = sum([self._sizes[key] for key in self._come])
        transfer = Transfer("local", "within the host", nbytes, time.monotonic() - self._begun)
        return msgspec.structs.replace(
            outcome,
            progress=msgspec.structs.replace(outcome.progress, transfer=transfer),
            message="; ".join([each for each in (outcome.message, why) if each]),
        )

    def _hand_over(self) -> str:
        if not self._confirm(self._goal.location, CONFIRM_S):
            return "the controller did not confirm it in time, so the source keeps all"
        arrived = self._goal.references.findable(self, self._sizes)
        return kept_chunks(self._source.delete(arrived))
