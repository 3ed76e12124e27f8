"""One move: transfers begun one after another, and regions named as they land."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from lmcache_kit.errors import TransferTimeout
from lmcache_kit.interfaces.memory import Region
from lmcache_kit.interfaces.transport import ReadResult
from lmcache_kit_nixl_transport.agent import Agent
from lmcache_kit_nixl_transport.batches import Batch, pieces_of
from lmcache_kit_nixl_transport.transfer import Transfer

AT_ONCE = 4
"""Transfers under way, where they take their time; by CMA each is over when it has begun."""

_SPIN_S = 0.0002
_LONGEST_PAUSE_S = 0.0002


class Reading:
    """Iterate once. ``check`` raises TransportError when there is no sense in going on.

    What was begun is waited for, also after a failure, until ``deadline`` (``time.monotonic``):
    what has not settled by then leaves as a TransferTimeout that tells when it has.
    """

    def __init__(
        self,
        agent: Agent,
        peer: str,
        *,
        into: Sequence[Region],
        batches: Iterator[Batch],
        check: Callable[[], None],
        deadline: float,
    ) -> None:
        self._agent = agent
        self._peer = peer
        self._batches = batches
        self._check = check
        self._deadline = deadline
        self._missing = [pieces_of(region) for region in into]
        self._flying: dict[Transfer, list[int]] = {}

    def __iter__(self) -> Iterator[ReadResult]:
        try:
            yield from (ReadResult(number) for number, left in enumerate(self._missing) if not left)
            more = True
            while more or self._flying:
                if more and len(self._flying) < AT_ONCE:
                    self._give_up_if_late()
                    more = self._begin()
                yield from self._landed(patient=not more or len(self._flying) == AT_ONCE)
        finally:
            self._settle()

    def _begin(self) -> bool:
        """The next transfer; False if there is none."""
        self._check()
        batch = next(self._batches, None)
        if batch is not None:
            transfer = self._agent.read(self._peer, batch.copies)
            self._flying[transfer] = batch.numbers
        return batch is not None

    def _landed(self, *, patient: bool) -> Iterator[ReadResult]:
        """What has landed by now; ``patient``: wait for one transfer at least."""
        pause = Pause()
        while True:
            landed = [transfer for transfer in self._flying if self._agent.landed(transfer)]
            for transfer in landed:
                for number in self._flying.pop(transfer):
                    self._missing[number] -= 1
                    if not self._missing[number]:
                        yield ReadResult(number)
            if landed or not patient or not self._flying:
                return
            self._check()
            self._give_up_if_late()
            pause()

    def _give_up_if_late(self) -> None:
        if time.monotonic() >= self._deadline:
            raise self._late()

    def _late(self) -> TransferTimeout:
        there = sum(not left for left in self._missing)
        flying = tuple(self._flying)
        return TransferTimeout(
            f"{there} of {len(self._missing)} regions came in time",
            settled=lambda: all(self._agent.settled(transfer) for transfer in flying),
        )

    def _settle(self) -> None:
        """Leave nothing under way, or say so."""
        pause = Pause()
        while flying := [each for each in self._flying if not self._agent.settled(each)]:
            if time.monotonic() >= self._deadline:
                for transfer in flying:
                    transfer.abandoned = True
                raise self._late()
            pause()


class Pause:
    """Ever longer: nothing for a moment, then up to 200 us."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._pause_s = 0.00002

    def __call__(self) -> None:
        if time.monotonic() - self._since < _SPIN_S:
            time.sleep(0)
            return
        time.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 1.5, _LONGEST_PAUSE_S)


def wait(agent: Agent, transfer: Transfer, deadline: float) -> bool:
    """It has landed; False if not by ``deadline``. Raises TransportError if it failed."""
    pause = Pause()
    while not agent.landed(transfer):
        if time.monotonic() >= deadline:
            return False
        pause()
    return True
