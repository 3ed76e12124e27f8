"""The side that takes: it carries out moves.

Copy, verify, keep, let the controller know, and only then have the source forget. A crash at any
step leaves two copies, never none.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lmcache_kit.cache.descriptors import ChunkRef, DeleteResult
from lmcache_kit.errors import ControlError, InvalidQuery, KitError
from lmcache_kit.interfaces.operations import Accepted, Move, Outcome, Peer, Progress, Transfer
from lmcache_kit.keys import ChunkKey
from lmcache_kit.peer.chunk_receiver import ChunkReceiver, Destination
from lmcache_kit.peer.compatibility import difference
from lmcache_kit.peer.priority import lower_priority
from lmcache_kit.peer.report import Stopped, outcome
from lmcache_kit.peer.source_client import Connect, SourceClient
from lmcache_kit.protocol import peer as wire
from lmcache_kit.protocol.capability import Capability

if TYPE_CHECKING:
    from lmcache_kit.cache.namespaces import NamespaceRegistry
    from lmcache_kit.peer.link_pool import LinkPool, PooledLink

log = logging.getLogger(__name__)

MAX_MOVES = 8
WINDOW_TOKENS = 1024 * 1024
CONNECT_S = 10.0
CONFIRM_S = 15.0
AGAIN_S = 0.1
TRIES_AGAIN = 5

Report = Callable[[Progress], None]
Finish = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class MoveContext:
    """What moves work with. ``dial`` connects to a peer's ``HOST:PORT`` within so many seconds;
    ``confirm`` waits for so long until the controller knows all that is at a location here."""

    instance_id: str
    place: Destination
    namespaces: NamespaceRegistry
    links: LinkPool
    dial: Callable[[str, float], socket.socket]
    confirm: Callable[[str, float], bool]


class MoveExecutor:
    """Carries out up to ``MAX_MOVES`` moves at a time; others wait their turn."""

    def __init__(self, tools: MoveContext) -> None:
        self._tools = tools
        self._pool = ThreadPoolExecutor(
            MAX_MOVES, thread_name_prefix="lmcache-kit-move", initializer=lower_priority
        )
        self._jobs: set[RunningMove] = set()

    def begin(
        self, order: Move, *, deadline_s: float, report: Report, finish: Finish
    ) -> RunningMove:
        """See :class:`~lmcache_kit.interfaces.operations.Operator`."""
        if order.peer is None:
            raise InvalidQuery("a move without a peer to take from")
        job = RunningMove(self._tools, order, order.peer, deadline_s, report, finish)
        self._jobs.add(job)
        self._pool.submit(self._run, job)
        return job

    def close(self) -> None:
        """Stop what runs, and wait for it."""
        for job in list(self._jobs):
            job.cancel()
        self._pool.shutdown()

    def _run(self, job: RunningMove) -> None:
        try:
            job.run()
        finally:
            self._jobs.discard(job)


class RunningMove:
    """One move. The owner of what it brings here, until it has ended."""

    def __init__(  # noqa: PLR0917 - what begin was told
        self,
        tools: MoveContext,
        order: Move,
        peer: Peer,
        deadline_s: float,
        report: Report,
        finish: Finish,
    ) -> None:
        self.accepted: Accepted | None = None
        self._tools = tools
        self._order = order
        self._peer = peer
        self._name = f"instance {order.source!r}"
        self._deadline = time.monotonic() + deadline_s
        self._report = report
        self._finish = finish
        self._cancelled = threading.Event()
        self._remote: SourceClient | None = None
        self._intake: ChunkReceiver | None = None
        self._wanted: dict[bytes, ChunkRef] = {}
        self._unfit: dict[str, int] = {}
        self._forgotten = DeleteResult()
        self._why = ""
        self._goal = tools.place.engine.locations[order.location]

    def cancel(self) -> None:
        """See :class:`~lmcache_kit.interfaces.operations.Job`."""
        self._cancelled.set()
        if remote := self._remote:
            remote.close()
        if intake := self._intake:
            intake.link.link.close()

    def run(self) -> None:
        """All of it; tells the end."""
        try:
            self._move()
        except KitError as error:
            self._why = str(error)
        # The thread's boundary: whatever went wrong, the event is to end and say so.
        except Exception as error:
            log.exception("a move from %s failed", self._name)
            self._why = f"{type(error).__name__}: {error}"
        finally:
            self._tools.place.engine.references.release(self)
            self._goal.references.release(self)
            if self._remote:
                self._remote.close()
        ended = self._outcome()
        self._finish(ended)
        transfer = ended.progress.transfer
        log.log(
            logging.INFO if ended.state == "done" else logging.WARNING,
            "event %s, move of %d tokens from %s%s: %s%s",
            self._peer.event_id,
            ended.tokens,
            self._name,
            f" by {transfer.transport} ({transfer.how})" if transfer else "",
            ended.state,
            f", {ended.message}" if ended.message else "",
        )

    def _move(self) -> None:
        self._check()
        connect = partial(self._tools.dial, self._peer.url)
        self._remote = remote = self._open(connect)
        holdings = self._fitting(remote.holdings())
        self._wanted = {holding.key: holding for holding in holdings}
        self._accept()
        if not holdings:
            return
        link = self._link(remote, connect)
        self._intake = intake = ChunkReceiver(
            self._tools.place,
            remote,
            link,
            lambda: self._link(remote, connect, fresh=True),
            self,
        )
        try:
            self._take_all(intake, holdings)
        except BaseException:
            intake.link.link.close()
            raise
        self._tools.links.give(intake.link)
        if not self._order.copy:
            self._hand_over(remote)

    def _open(self, connect: Connect) -> SourceClient:
        claim = Capability.of(self._order, self._peer.event_id, self._tools.instance_id)
        opened = wire.Open(
            wire.VERSION,
            claim,
            self._peer.seal,
            self._peer.incarnation,
            self._tools.namespaces.bases,
        )
        return SourceClient.open(connect, self._name, opened, self._left_s())

    def _link(self, remote: SourceClient, connect: Connect, *, fresh: bool = False) -> PooledLink:
        timeout_s = min(CONNECT_S, self._left_s())
        return self._tools.links.take(
            remote, self._peer.incarnation, connect, timeout_s=timeout_s, fresh=fresh
        )

    def _fitting(self, holdings: Sequence[ChunkRef]) -> list[ChunkRef]:
        """Those that workers here can use."""
        assert self._remote is not None
        welcome = self._remote.welcome
        ours = self._tools.namespaces.bases
        unfit = {
            space.digest: why
            for space in welcome.spaces
            if (why := difference(space, welcome.namespaces, ours))
        }
        known = {space.digest for space in welcome.spaces}
        for holding in holdings:
            if why := unfit.get(holding.namespace, ""):
                self._unfit[why] = self._unfit.get(why, 0) + 1
        fitting = [h for h in holdings if h.namespace in known and h.namespace not in unfit]
        if holdings and not fitting:
            raise ControlError(
                f"{self._name} holds what is of no use here: {'; '.join(self._unfit)}"
            )
        return fitting

    def _accept(self) -> None:
        self.accepted = Accepted(
            sum(holding.tokens for holding in self._wanted.values()), len(self._wanted)
        )
        self._report(self._progress())

    def _take_all(self, intake: ChunkReceiver, holdings: Sequence[ChunkRef]) -> None:
        for window in self._windows(holdings):
            self._check()
            self._take(intake, window)
            self._report(self._progress())
            if intake.tally.full:
                return
        for _ in range(TRIES_AGAIN):
            again, intake.tally.again = intake.tally.again, []
            if not again:
                return
            self._cancelled.wait(AGAIN_S)
            for window in self._windows([self._wanted[key] for key in again]):
                self._check()
                self._take(intake, window)

    def _take(self, intake: ChunkReceiver, window: Sequence[ChunkKey]) -> None:
        """Into memory, and from there to the tier that is meant, if one is."""
        goal, engine = self._goal, self._tools.place.engine
        if goal is engine or engine.lower_tiers is None:
            intake.take(window, self._left_s())
            return
        wanted = goal.references.acquire(window, self)
        absent = set(wanted)
        intake.keep([key for key in window if key not in absent])
        intake.take(wanted, self._left_s())
        come = [key for key in wanted if key in intake.tally.here]
        try:
            engine.lower_tiers.offload(goal, come, self)
        finally:
            for key in goal.references.acquire(come, self):
                del intake.tally.here[key]
                intake.tally.why_not[f"{goal.location} did not take it"] += 1

    def _windows(self, holdings: Sequence[ChunkRef]) -> Iterator[list[bytes]]:
        assert self._remote is not None
        welcome, memory = self._remote.welcome, self._tools.place.engine.memory.memory
        sizes = {space.digest: space.chunk_size for space in welcome.spaces}
        most_bytes = min(welcome.window_bytes, wire.window_bytes(len(memory)))
        window, nbytes, tokens = list[bytes](), 0, 0
        for holding in holdings:
            nbytes += holding.nbytes
            tokens += sizes[holding.namespace]
            too_much = nbytes > most_bytes or tokens > WINDOW_TOKENS
            if window and (too_much or len(window) >= wire.MAX_LENT):
                yield window
                window, nbytes, tokens = [], holding.nbytes, sizes[holding.namespace]
            window.append(holding.key)
        if window:
            yield window

    def _hand_over(self, remote: SourceClient) -> None:
        """Once the controller knows of what is here, the source need not keep it."""
        arrived = partial(self._goal.references.findable, self, self._wanted)
        if not arrived():
            return
        self._check()
        if not self._tools.confirm(self._order.location, min(CONFIRM_S, self._left_s())):
            raise ControlError("the controller did not confirm it in time, so the source keeps all")
        # What was dropped here meanwhile must stay there; children go before their parents.
        keys = arrived()[::-1]
        for start in range(0, len(keys), wire.MAX_HOLDINGS):
            self._check()
            some = remote.forget(keys[start : start + wire.MAX_HOLDINGS])
            self._forgotten = DeleteResult(
                *(a + b for a, b in zip(self._forgotten, some, strict=True))
            )

    def _check(self) -> None:
        """Raises _Stopped when there is no use in going on."""
        if self._cancelled.is_set():
            raise _Stopped("cancelled")
        if time.monotonic() >= self._deadline:
            raise _Stopped("its time was over")

    def _left_s(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _progress(self) -> Progress:
        if self._intake is None:
            return Progress(0, len(self._wanted))
        tally, link = self._intake.tally, self._intake.link
        return Progress(
            len(tally.here),
            len(self._wanted),
            transfer=Transfer(link.transport, link.how, tally.nbytes, tally.seconds),
        )

    def _outcome(self) -> Outcome:
        tally = self._intake.tally if self._intake else None
        here = tally.here if tally else {}
        tokens = sum(holding.tokens for key, holding in self._wanted.items() if key in here)
        stopped: Stopped = ""
        if self._why and self._cancelled.is_set():
            stopped, self._why = "cancelled", ""
        elif self._why and time.monotonic() >= self._deadline:
            stopped = "expired"
        return outcome(
            tokens,
            self._progress(),
            tally,
            why=self._why,
            stopped=stopped,
            unfit=self._unfit,
            forgotten=self._forgotten,
        )


class _Stopped(ControlError):
    """Cancelled, or out of time."""
