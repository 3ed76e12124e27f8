"""A circuit breaker: a store that fails is not called for a while."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lmcache_kit.errors import BackendError

FIRST_REST_S = 1.0
LONGEST_REST_S = 30.0

_P = ParamSpec("_P")
_T = TypeVar("_T")
logger = logging.getLogger(__name__)


class CircuitBreaker:
    """Calls a store called ``name``.

    After a failure the store rests: calls are refused for a second, for twice as long after each
    further failure, and for half a minute at most. The first call after a rest shows whether the
    store works again.
    """

    def __init__(self, name: str, counters: Counter[str], clock: Callable[[], float]) -> None:
        self._name = name
        self._counters = counters
        self._clock = clock
        self._lock = threading.Lock()
        self._rest_s = 0.0
        self._until = 0.0
        self._why = ""
        self._worked_before = False

    @property
    def resting(self) -> bool:
        """Whether calls are refused now."""
        return self._clock() < self._until

    @property
    def why_down(self) -> str:
        """Why the last call failed; empty when it worked."""
        return self._why if self._rest_s else ""

    def call(self, method: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what the method returns.

        Raises BackendError when it fails, whatever it raises, and at once while the store rests.
        """
        if self.resting:
            raise BackendError(f"{self._name} is left alone for a while: {self._why}")
        try:
            result = method(*args, **kwargs)
        # A backend is third-party code: whatever it raises, it has failed, and serving goes on.
        except Exception as error:
            self._failed(error)
            if isinstance(error, BackendError):
                raise
            raise BackendError(f"{self._name}: {type(error).__name__}: {error}") from error
        self._worked()
        return result

    def late(self) -> None:
        """Count a call as failed that its caller could not wait for."""
        self._failed(BackendError(f"{self._name} did not answer in time"))

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self._counters["failures_total"] += 1
            first = not self._rest_s
            self._why = str(error) or type(error).__name__
            if not self.resting:  # several calls may fail of the same cause
                self._rest_s = min(2 * self._rest_s or FIRST_REST_S, LONGEST_REST_S)
                self._until = self._clock() + self._rest_s
        if first:
            expected = isinstance(error, BackendError)
            logger.log(
                # A store that never worked is set up wrongly, and does not mend itself.
                logging.WARNING if self._worked_before else logging.ERROR,
                "%s does not work; serving goes on without it, and it is tried again every "
                "%g s at the latest: %s",
                self._name,
                LONGEST_REST_S,
                error if expected else repr(error),
                exc_info=None if expected else error,
            )

    def _worked(self) -> None:
        if self._rest_s:
            with self._lock:
                self._rest_s = self._until = 0.0
            logger.info("%s works %s", self._name, "again" if self._worked_before else "now")
        self._worked_before = True
