"""The backend: one table in one file."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from acme_sqlite.options import SQLiteOptions
from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces import Backend, Blob, BlobRecord, StoreUsage

_GIB = 1 << 30
_PAGE_BYTES = 16384
_SCAN_ROWS = 256
_WAIT_S = 3.0
_SETUP = f"""
PRAGMA page_size = {_PAGE_BYTES};
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS blobs (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, meta BLOB NOT NULL, data BLOB NOT NULL
);
"""


class SQLiteBackend(Backend):
    """Blobs in one SQLite file, open in one process, written by transactions, under one lock."""

    def __init__(self, options: SQLiteOptions | None = None) -> None:
        """Open or create the file. Raises BackendError."""
        options = options or SQLiteOptions()
        self._path = options.path
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # KV reveals prompts: only the owner may read the file.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(self._path, timeout=_WAIT_S, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise BackendError(f"{self._path} cannot be opened: {error}") from error
        try:
            with self._session() as db:
                db.executescript(_SETUP)
                self._page_bytes = self._pragma("page_size")
                pages = max(1, int(options.max_size_gib * _GIB) // self._page_bytes)
                self._max_pages = self._pragma(f"max_page_count = {pages}")
        except BackendError:
            self.close()
            raise

    def put(self, key: bytes, meta: bytes, data: Sequence[memoryview]) -> bool:
        row = (key, meta, b"".join(data))
        try:
            with self._session() as db:
                db.execute("REPLACE INTO blobs (key, meta, data) VALUES (?, ?, ?)", row)
        except BackendError as error:
            if getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                return False
            raise
        return True

    def get(self, key: bytes) -> Blob | None:
        with self._session() as db:
            row = db.execute("SELECT meta, data FROM blobs WHERE key = ?", (key,)).fetchone()
        return Blob(*row) if row else None

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        query = "SELECT 1 FROM blobs WHERE key = ?"
        with self._session() as db:
            return [db.execute(query, (key,)).fetchone() is not None for key in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        with self._session() as db:
            db.executemany("DELETE FROM blobs WHERE key = ?", [(key,) for key in keys])

    def scan(self) -> Iterator[BlobRecord]:
        """Yield blobs in the order of their puts.

        A blob that is put again during the scan gets a number beyond ``last``, and is not repeated.
        """
        query = (
            "SELECT number, key, meta, length(data) FROM blobs "
            "WHERE number > ? AND number <= ? ORDER BY number LIMIT ?"
        )
        with self._session() as db:
            last = db.execute("SELECT max(number) FROM blobs").fetchone()[0] or 0
        number = 0
        while number < last:
            with self._session() as db:
                rows = db.execute(query, (number, last, _SCAN_ROWS)).fetchall()
            yield from (BlobRecord(key, meta, nbytes) for _, key, meta, nbytes in rows)
            number = rows[-1][0] if rows else last

    def usage(self) -> StoreUsage:
        with self._session() as db:
            entries = db.execute("SELECT count(*) FROM blobs").fetchone()[0]
            pages = self._pragma("page_count") - self._pragma("freelist_count")
        return StoreUsage(entries, pages * self._page_bytes, self._max_pages * self._page_bytes)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _session(self) -> Iterator[sqlite3.Connection]:
        """Run a transaction under the lock. Raises BackendError for SQLite's errors."""
        try:
            with self._lock, self._db as db:
                yield db
        except sqlite3.Error as error:
            raise BackendError(f"{self._path}: {error}") from error

    def _pragma(self, text: str) -> int:
        return int(self._db.execute(f"PRAGMA {text}").fetchone()[0])
