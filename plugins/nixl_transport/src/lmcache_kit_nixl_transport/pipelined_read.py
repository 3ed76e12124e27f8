"""One read: up to four transfers in flight, and regions reported as they arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from lmcache_kit.errors import TransferTimeout
from lmcache_kit.interfaces.memory import Region
from lmcache_kit.interfaces.transport import ReadResult
from lmcache_kit_nixl_transport.agent import Agent
from lmcache_kit_nixl_transport.batches import Batch, part_count
from lmcache_kit_nixl_transport.transfer import Transfer

AT_ONCE = 4
"""Transfers in flight at once; over CMA a transfer is finished when it has begun."""

_SPIN_S = 0.0002
_LONGEST_PAUSE_S = 0.0002


class PipelinedRead:
    """Iterate once over the regions of one read, in the order in which they arrive.

    ``check`` raises TransportError when the link is closed or lost. ``deadline`` is a time of
    ``time.monotonic``. The end of the iteration, a failure included, waits for transfers in flight
    until the deadline. Transfers that have not settled by then are abandoned: the TransferTimeout's
    ``settled`` tells when they have.
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
        self._missing = [part_count(region) for region in into]
        self._in_flight: dict[Transfer, list[int]] = {}

    def __iter__(self) -> Iterator[ReadResult]:
        try:
            yield from (ReadResult(number) for number, left in enumerate(self._missing) if not left)
            more = True
            while more or self._in_flight:
                if more and len(self._in_flight) < AT_ONCE:
                    self._check_deadline()
                    more = self._begin()
                yield from self._finished_regions(wait=not more or len(self._in_flight) == AT_ONCE)
        finally:
            self._settle()

    def _begin(self) -> bool:
        """Begin the next transfer; return False if there is none."""
        self._check()
        batch = next(self._batches, None)
        if batch is not None:
            transfer = self._agent.read(self._peer, batch.copies)
            self._in_flight[transfer] = batch.numbers
        return batch is not None

    def _finished_regions(self, *, wait: bool) -> Iterator[ReadResult]:
        """Yield regions that have arrived; ``wait`` for at least one transfer."""
        pause = Pause()
        while True:
            done = [transfer for transfer in self._in_flight if self._agent.is_done(transfer)]
            for transfer in done:
                for number in self._in_flight.pop(transfer):
                    self._missing[number] -= 1
                    if not self._missing[number]:
                        yield ReadResult(number)
            if done or not wait or not self._in_flight:
                return
            self._check()
            self._check_deadline()
            pause()

    def _check_deadline(self) -> None:
        if time.monotonic() >= self._deadline:
            raise self._timeout()

    def _timeout(self) -> TransferTimeout:
        there = sum(not left for left in self._missing)
        in_flight = tuple(self._in_flight)
        return TransferTimeout(
            f"{there} of {len(self._missing)} regions came in time",
            settled=lambda: all(self._agent.settled(transfer) for transfer in in_flight),
        )

    def _settle(self) -> None:
        """Wait until no transfer is in flight, or raise TransferTimeout at the deadline."""
        pause = Pause()
        while in_flight := [each for each in self._in_flight if not self._agent.settled(each)]:
            if time.monotonic() >= self._deadline:
                for transfer in in_flight:
                    transfer.abandoned = True
                raise self._timeout()
            pause()


class Pause:
    """Back-off between polls: yield the processor for 200 us, then sleep up to 200 us."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._pause_s = 0.00002

    def __call__(self) -> None:
        if time.monotonic() - self._since < _SPIN_S:
            time.sleep(0)
            return
        time.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 1.5, _LONGEST_PAUSE_S)


def wait_for(agent: Agent, transfer: Transfer, deadline: float) -> bool:
    """Wait for the transfer; return False at the deadline. Raises TransportError if it failed."""
    pause = Pause()
    while not agent.is_done(transfer):
        if time.monotonic() >= deadline:
            return False
        pause()
    return True
