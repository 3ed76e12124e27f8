"""The blob reader: the data of one blob, out of a store."""

from __future__ import annotations

import logging

from lmcache_kit.cache.tiers.circuit_breaker import CircuitBreaker
from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces.backend import Blob, OpenBlob

logger = logging.getLogger(__name__)


class BlobReader:
    """Reads a blob once, from first to last byte, by one thread at a time.

    Failures are counted by ``breaker``. ``nbytes`` is None where only the end of the data tells it.
    """

    def __init__(self, blob: Blob | OpenBlob, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._file = blob.file if isinstance(blob, OpenBlob) else None
        self._rest = memoryview(b"" if isinstance(blob, OpenBlob) else blob.data).cast("B")
        self.nbytes = None if self._file else len(self._rest)

    def read_into(self, target: memoryview) -> None:
        """Fill all of ``target``. Raises EOFError when there is less, and BackendError."""
        while target:
            count = self._breaker.call(self._read_some, target)
            if not count:
                raise EOFError(f"it ends {len(target)} bytes too early")
            target = target[count:]

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        try:
            if self._file is not None:
                self._file.close()
        # A backend is third-party code: what was read is checked, however it ends.
        except Exception as error:  # noqa: BLE001
            logger.warning("what was read cannot be closed: %r", error)

    def _read_some(self, target: memoryview) -> int:
        if self._file is None:
            count = min(len(target), len(self._rest))
            target[:count] = self._rest[:count]
            self._rest = self._rest[count:]
            return count
        count = self._file.readinto(target) or 0
        if not 0 <= count <= len(target):
            raise BackendError(f"a read of {len(target)} bytes came to {count}")
        return count
