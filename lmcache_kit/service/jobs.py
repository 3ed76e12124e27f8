"""Orders that take time: a codec at work on many chunks, a few at a time."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Literal

from lmcache_kit.errors import KitError
from lmcache_kit.interfaces.operations import Accepted, Outcome, Progress

if TYPE_CHECKING:
    from lmcache_kit.cache.records import Transcoded
    from lmcache_kit.keys import ChunkKey

GRACE_S = 2.0
"""How long an order that is to end waits for the chunks that it is at work on."""
_MAX_REASONS = 3


class RecodeJob:
    """Applies ``recode`` to ``chunks``, each a key and the number of its tokens that are meant.

    Each turn in the pool does one chunk, so that orders share it. ``done_word`` is what a chunk
    is afterwards, for messages. Ends as soon as the chunks at work allow when it is cancelled or
    its time is over, and without them after a grace.
    """

    def __init__(
        self,
        chunks: Sequence[tuple[ChunkKey, int]],
        recode: Callable[[ChunkKey], Transcoded],
        *,
        done_word: str,
        report: Callable[[Progress], None],
        finish: Callable[[Outcome], None],
    ) -> None:
        self.accepted = Accepted(sum(tokens for _, tokens in chunks), len(chunks))
        self._recode = recode
        self._done_word = done_word
        self._report = report
        self._finish = finish
        self._lock = threading.Lock()
        self._left = deque(chunks)
        self._active = 0
        self._counts: Counter[str] = Counter()
        self._why_not: Counter[str] = Counter()
        self._end: Literal["", "cancelled", "expired", "failed"] = ""
        self._timers: list[threading.Timer] = []
        self._finished = False

    def start(self, pool: Executor, width: int, deadline_s: float) -> None:
        """Begin, ``width`` chunks at a time. With no chunks it ends here."""
        self._after(deadline_s, lambda: self._stop("expired"))
        if not self._left:
            self._close()
        for _ in range(min(width, len(self._left))):
            pool.submit(self._turn, pool)

    def cancel(self) -> None:
        """See :class:`~lmcache_kit.interfaces.operations.Job`."""
        self._stop("cancelled")

    def _turn(self, pool: Executor) -> None:
        with self._lock:
            if not self._left:
                return
            key, tokens = self._left.popleft()
            self._active += 1
        try:
            result = self._recode(key)
        except KitError as error:  # there is no codec, so none of the chunks can be done
            with self._lock:
                self._active -= 1
                self._why_not[str(error)] += 1
            self._stop("failed")
            return
        with self._lock:
            self._active -= 1
            self._count(result, tokens)
            progress = self._progress()
            last = not self._left and not self._active
            over = self._finished
            if self._left:
                pool.submit(self._turn, pool)
        if not over:
            self._report(progress)
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
            self._why_not[result.why] += 1

    def _stop(self, end: Literal["cancelled", "expired", "failed"]) -> None:
        with self._lock:
            self._end = self._end or end
            self._left.clear()
            at_work = self._active
        if at_work:
            self._after(GRACE_S, self._close)
        else:
            self._close()

    def _close(self) -> None:
        """Tell the end, once."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
            timers, self._timers = self._timers, []
            outcome = self._outcome()
        for timer in timers:
            timer.cancel()
        self._finish(outcome)

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(max(0.0, min(seconds, threading.TIMEOUT_MAX)), call)
        timer.daemon = True
        with self._lock:
            if not self._finished:
                self._timers.append(timer)
                timer.start()

    def _progress(self) -> Progress:
        counts = self._counts
        return Progress(counts["chunks"], self.accepted.chunks, counts["before"], counts["after"])

    def _outcome(self) -> Outcome:
        counts = self._counts
        message = "; ".join(self._remarks())
        if self._end == "failed":
            return Outcome("failed", counts["tokens"], self._progress(), message)
        if self._end and counts["chunks"] < self.accepted.chunks:
            return Outcome(self._end, counts["tokens"], self._progress(), message)
        if not counts["failed"]:
            return Outcome("done", counts["tokens"], self._progress(), message)
        state: Literal["partial", "failed"] = "failed"
        if counts["done"] or counts["already"]:
            state = "partial"
        return Outcome(state, counts["tokens"], self._progress(), message)

    def _remarks(self) -> list[str]:
        counts, chunks = self._counts, self.accepted.chunks
        said = []
        if not chunks:
            said.append("nothing of this is stored")
        if counts["already"]:
            said.append(f"{counts['already']} of {chunks} chunks were {self._done_word} already")
        if counts["gone"]:
            said.append(f"{counts['gone']} of {chunks} chunks had gone meanwhile")
        if untouched := chunks - counts["chunks"]:
            said.append(f"{untouched} of {chunks} chunks were not reached")
        if counts["failed"]:
            said.append(f"{counts['failed']} of {chunks} chunks stay as they were")
        most = self._why_not.most_common(_MAX_REASONS)
        return said + [f"{why} ({count} times)" if count > 1 else why for why, count in most]
