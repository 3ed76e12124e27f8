"""A backend that is opened when it can be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from lmcache_kit.errors import BackendError, ConfigError, KitError
from lmcache_kit.interfaces import Backend, Blob, BlobRecord, OpenBlob, StoreUsage
from lmcache_kit.interfaces.backend import ReportsMetrics

AGAIN_S = 0.5
"""An attempt that failed this shortly ago stands for the next one."""


class ReopeningBackend(Backend):
    """The backend that ``make`` opens, once that succeeds; each call before tries it.

    Whatever ``make`` raises, calls raise BackendError with its cause. A caller never waits for an
    attempt of another thread. ``shared``: what the backend is until it is known.
    """

    def __init__(
        self,
        make: Callable[[], Backend],
        *,
        shared: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._shared = shared
        self._clock = clock
        self._opening = threading.Lock()
        self._backend: Backend | None = None
        self._closed = False
        self._failure: Exception | None = None
        self._failed_at = 0.0

    @property
    def shared(self) -> bool:  # type: ignore[override]  # a class knows, this may not know yet
        return self._backend.shared if self._backend else self._shared

    def open(self) -> None:
        """Open the backend unless it is open.

        Raises ConfigError that ``make`` raises, and BackendError.
        """
        if not self._opening.acquire(blocking=False):
            raise BackendError("it is still being opened")
        try:
            if self._backend is None and not self._closed:
                self._try()
        finally:
            self._opening.release()

    def _try(self) -> None:
        if self._failure and self._clock() - self._failed_at < AGAIN_S:
            raise _known(self._failure)
        try:
            self._backend = self._make()
        # A backend is third-party code: whatever it raises, it is not open.
        except Exception as error:
            self._failure, self._failed_at = error, self._clock()
            raise _known(error) from error
        if self._closed:  # meanwhile
            self._backend.close()

    def put(self, key: bytes, meta: bytes, data: Sequence[memoryview]) -> bool:
        return self._opened().put(key, meta, data)

    def get(self, key: bytes) -> Blob | OpenBlob | None:
        return self._opened().get(key)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return self._opened().contains(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        self._opened().remove(keys)

    def scan(self) -> Iterator[BlobRecord]:
        return self._opened().scan()

    def usage(self) -> StoreUsage:
        return self._opened().usage()

    def metrics(self) -> Mapping[str, float]:
        """See :class:`~lmcache_kit.interfaces.ReportsMetrics`; none before it is open."""
        return self._backend.metrics() if isinstance(self._backend, ReportsMetrics) else {}

    def close(self) -> None:
        self._closed = True
        if self._backend:
            self._backend.close()

    def _opened(self) -> Backend:
        if self._backend is None:
            try:
                self.open()
            except ConfigError as error:
                raise BackendError(error.message, hint=error.hint) from error
        if self._backend is None:
            raise BackendError("the backend is closed")
        return self._backend


def _known(error: Exception) -> ConfigError | BackendError:
    if isinstance(error, ConfigError):
        return ConfigError(error.message, hint=error.hint)
    if isinstance(error, KitError):
        return BackendError(error.message, hint=error.hint)
    return BackendError(f"it cannot be opened: {type(error).__name__}: {error}")
