"""An operation that takes its time: one function over many chunks, a few at a time."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Literal

from lmcache_kit.errors import KitError
from lmcache_kit.interfaces.operations import (
    OperationListener,
    OperationStatus,
    Progress,
    Scope,
)

if TYPE_CHECKING:
    from lmcache_kit.cache.records import Transcoded
    from lmcache_kit.keys import ChunkKey

GRACE_S = 2.0
"""How long an operation that is to end waits for the chunks under way."""
_MAX_REASONS = 3


class ChunkOperation:
    """Applies ``work`` to ``chunks``, each a key and the number of its tokens that are meant.

    Each turn in the pool does one chunk, so that operations share the pool. ``done_word`` says in
    messages what a chunk is afterwards. After a cancel
    or the deadline the operation ends with the chunks under way, or without them after a grace.
    """

    def __init__(
        self,
        chunks: Sequence[tuple[ChunkKey, int]],
        work: Callable[[ChunkKey], Transcoded],
        *,
        done_word: str,
        listener: OperationListener,
    ) -> None:
        self._scope = Scope(sum(tokens for _, tokens in chunks), len(chunks))
        self._work = work
        self._done_word = done_word
        self._listener = listener
        self._lock = threading.Lock()
        self._left = deque(chunks)
        self._active = 0
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._stopped: Literal["", "cancelled", "expired", "failed"] = ""
        self._timers: list[threading.Timer] = []
        self._finished = False

    def start(self, pool: Executor, width: int, deadline_s: float) -> None:
        """Accept the operation and start, ``width`` chunks at a time. No chunks: end at once."""
        self._listener.accepted(self._scope)
        self._after(deadline_s, lambda: self._stop("expired"))
        if not self._left:
            self._close()
        for _ in range(min(width, len(self._left))):
            pool.submit(self._turn, pool)

    def cancel(self) -> None:
        """Begin no more chunks."""
        self._stop("cancelled")

    def _turn(self, pool: Executor) -> None:
        with self._lock:
            if not self._left:
                return
            key, tokens = self._left.popleft()
            self._active += 1
        try:
            result = self._work(key)
        except KitError as error:  # without the codec no chunk can be done
            with self._lock:
                self._active -= 1
                self._reasons[str(error)] += 1
            self._stop("failed")
            return
        with self._lock:
            self._active -= 1
            self._count(result, tokens)
            progress = self._progress()
            last = not self._left and not self._active
            finished = self._finished
            if self._left:
                pool.submit(self._turn, pool)
        if not finished:
            self._listener.progressed(progress)
        if last:
            self._close()

    def _count(self, result: Transcoded, tokens: int) -> None:
        counts = self._counts
        counts["chunks"] += 1
        counts[result.status] += 1
        if result.status == "done":
            counts["tokens"] += tokens
            counts["before"] += result.bytes_before
            counts["after"] += result.bytes_after
        elif result.status == "failed":
            self._reasons[result.why] += 1

    def _stop(self, state: Literal["cancelled", "expired", "failed"]) -> None:
        with self._lock:
            self._stopped = self._stopped or state
            self._left.clear()
            under_way = self._active
        if under_way:
            self._after(GRACE_S, self._close)
        else:
            self._close()

    def _close(self) -> None:
        """End the operation, once."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
            timers, self._timers = self._timers, []
            status = self._status()
        for timer in timers:
            timer.cancel()
        self._listener.ended(status)

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(max(0.0, min(seconds, threading.TIMEOUT_MAX)), call)
        timer.daemon = True
        with self._lock:
            if not self._finished:
                self._timers.append(timer)
                timer.start()

    def _progress(self) -> Progress:
        counts = self._counts
        return Progress(counts["chunks"], self._scope.chunks, counts["before"], counts["after"])

    def _status(self) -> OperationStatus:
        counts = self._counts
        message = "; ".join(self._remarks())
        if self._stopped == "failed":
            return OperationStatus("failed", counts["tokens"], self._progress(), message)
        if self._stopped and counts["chunks"] < self._scope.chunks:
            return OperationStatus(self._stopped, counts["tokens"], self._progress(), message)
        if not counts["failed"]:
            return OperationStatus("done", counts["tokens"], self._progress(), message)
        state: Literal["partial", "failed"] = "failed"
        if counts["done"] or counts["already"]:
            state = "partial"
        return OperationStatus(state, counts["tokens"], self._progress(), message)

    def _remarks(self) -> list[str]:
        counts, chunks = self._counts, self._scope.chunks
        remarks = []
        if not chunks:
            remarks.append("nothing of this is stored")
        if counts["already"]:
            remarks.append(f"{counts['already']} of {chunks} chunks were {self._done_word} already")
        if counts["gone"]:
            remarks.append(f"{counts['gone']} of {chunks} chunks had gone meanwhile")
        if untouched := chunks - counts["chunks"]:
            remarks.append(f"{untouched} of {chunks} chunks were not reached")
        if counts["failed"]:
            remarks.append(f"{counts['failed']} of {chunks} chunks stay as they were")
        most = self._reasons.most_common(_MAX_REASONS)
        return remarks + [f"{why} ({count} times)" if count > 1 else why for why, count in most]
