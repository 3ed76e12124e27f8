"""The backend ``LocalDiskBackend``."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces import Backend, Blob, BlobRecord, OpenBlob, StoreUsage
from lmcache_kit.interfaces.backend import MAX_META_BYTES
from lmcache_kit_disk_backend.blob_directory import BlobDirectory, backend_error
from lmcache_kit_disk_backend.blob_file import (
    BlobHeader,
    DamagedFile,
    MissingFile,
    open_for_reading,
    read_blob,
    read_header,
    write_file,
)
from lmcache_kit_disk_backend.options import DiskOptions

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class LocalDiskBackend(Backend):
    """Blobs in files, one each, which outlive the process however it ends.

    A file gets its name by rename, when it is complete. A reader that has opened a file reads it to
    its end, even when another file takes the name meanwhile. Readers therefore never wait: the lock
    guards names and sizes only. Disk space is reserved before a file is written, and released when
    the file is removed.

    Nothing is flushed to the disk. Files that are lost or damaged in a power failure are detected
    here, by their header, or by the cache process, by the checksum of their data: a miss.

    Raises BackendError when the folder cannot be used, or another process uses it.
    """

    def __init__(self, options: DiskOptions | None = None) -> None:
        options = options or DiskOptions()
        self._capacity = options.capacity_bytes
        self._changed = threading.Condition()
        self._disk_bytes_of: dict[bytes, int] = {}  # key -> bytes in whole blocks; the oldest first
        self._used = 0  # the sum of these, and what is being written
        self._newest_ns = 0
        self._damaged = 0
        self._calls = 0
        self._open = True
        self._directory = BlobDirectory(options.path, options.subfolder)
        try:
            self._recover()
        except BaseException:
            self._directory.close()
            raise
        logger.info(
            "blobs are in %s: %d of them, %.1f GiB at most",
            self._directory.path, len(self._disk_bytes_of), options.max_size_gib,
        )  # fmt: skip

    def put(self, key: bytes, meta: bytes, data: Sequence[memoryview]) -> bool:
        if len(meta) > MAX_META_BYTES:
            raise ValueError(f"meta has {len(meta)} bytes; at most {MAX_META_BYTES}")
        header = BlobHeader(meta, sum(part.nbytes for part in data))
        nbytes = self._disk_bytes(header.file_bytes)
        with self._call():
            self._heal()
            with self._changed:
                if self._used + nbytes > self._capacity:
                    return False
                self._used += nbytes
            temporary = self._directory.temporary(key)
            try:
                write_file(temporary, [header.pack(key), *data])
                self._publish(temporary, key, nbytes)
            except OSError as error:
                self._discard(temporary, nbytes)
                raise backend_error("write", self._directory.file(key), error) from error
            except BaseException:
                self._discard(temporary, nbytes)
                raise
            return True

    def get(self, key: bytes) -> Blob | OpenBlob | None:
        return self._read(key, lambda fd: read_blob(fd, read_header(fd, key)))

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        with self._call():
            return [key in self._disk_bytes_of for key in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        with self._call():
            self._heal()
            for key in keys:
                path = self._directory.file(key)
                try:
                    with self._changed:
                        if key in self._disk_bytes_of:
                            path.unlink(missing_ok=True)
                            self._drop_from_index(key)
                except OSError as error:
                    raise backend_error("remove", path, error) from error

    def scan(self) -> Iterator[BlobRecord]:
        with self._call(), self._changed:
            keys = list(self._disk_bytes_of)
        return (found for key in keys if (found := self._describe(key)))

    def usage(self) -> StoreUsage:
        with self._call(), self._changed:
            self._heal()
            return StoreUsage(len(self._disk_bytes_of), self._used, self._capacity)

    def damaged_blobs(self) -> int:
        """See :class:`~lmcache_kit.interfaces.CountsDamage`."""
        return self._damaged

    def close(self) -> None:
        with self._changed:
            first, self._open = self._open, False
            self._changed.wait_for(lambda: not self._calls)
        if first:
            self._directory.close()

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Count a call that ``close`` must wait for. Raises BackendError once closed."""
        with self._changed:
            if not self._open:
                raise BackendError(f"the backend {self._directory.path} is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def _heal(self) -> None:
        """Begin anew where the folder was removed or replaced. Raises BackendError."""
        if self._directory.is_intact():
            return
        with self._changed:
            if self._directory.is_intact():  # another thread has healed it meanwhile
                return
            self._directory.reopen()
            self._used -= sum(self._disk_bytes_of.values())
            lost = len(self._disk_bytes_of)
            self._disk_bytes_of.clear()
            self._recover()
            logger.warning(
                "%s was removed or replaced: %d blobs are gone, and %d lie there now",
                self._directory.path,
                lost,
                len(self._disk_bytes_of),
            )

    def _recover(self) -> None:
        for found in self._directory.recover():
            self._disk_bytes_of[found.key] = nbytes = self._disk_bytes(found.nbytes)
            self._used += nbytes
            self._newest_ns = found.written_ns
        before = len(self._disk_bytes_of)
        for key in list(self._disk_bytes_of):
            if self._used <= self._capacity:
                break
            self.remove([key])
        if gone := before - len(self._disk_bytes_of):
            logger.warning(
                "%s held more than max_size_gib; removed the oldest %d of %d blobs",
                self._directory.path,
                gone,
                before,
            )

    def _publish(self, temporary: Path, key: bytes, nbytes: int) -> None:
        """Rename the complete file to the key's name, in the place of an older blob."""
        with self._changed:
            # Make the time unique and the latest, so that a restart lists files in this order.
            newest_ns = max(time.time_ns(), self._newest_ns + 1)
            os.utime(temporary, ns=(newest_ns, newest_ns))
            temporary.replace(self._directory.file(key))
            self._newest_ns = newest_ns
            self._drop_from_index(key)
            self._disk_bytes_of[key] = nbytes

    def _discard(self, temporary: Path, nbytes: int) -> None:
        """Remove an unfinished file; if that fails, its space stays reserved until a restart."""
        try:
            temporary.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot remove %s: %s", temporary, error.strerror)
            return
        with self._changed:
            self._used -= nbytes

    def _describe(self, key: bytes) -> BlobRecord | None:
        def read(fd: int) -> BlobRecord:
            header = read_header(fd, key)
            return BlobRecord(key, header.meta, header.data_bytes)

        return self._read(key, read)

    def _read(self, key: bytes, read: Callable[[int], _T]) -> _T | None:
        """Call ``read`` with the blob's open file; return None if it is missing or damaged."""
        with self._call():
            if key not in self._disk_bytes_of:
                return None
            path = self._directory.file(key)
            try:
                try:
                    with open_for_reading(path) as fd:
                        return read(fd)
                except DamagedFile as damage:
                    if isinstance(damage, MissingFile):
                        self._heal()
                    self._remove_damaged(key, path)
                    return None
            except OSError as error:
                raise backend_error("read", path, error) from error

    def _remove_damaged(self, key: bytes, path: Path) -> None:
        """Remove a damaged file, unless a complete one has taken its place meanwhile.

        An entry that is no regular file is left alone, since this backend did not create it.
        """
        with self._changed:
            if key not in self._disk_bytes_of:
                return
            try:
                with open_for_reading(path) as fd:
                    read_header(fd, key)
                    return
            except MissingFile:
                self._drop_from_index(key)
                logger.info("%s: the file is gone; its chunk is a miss", path)
            except DamagedFile as damage:
                self._damaged += 1
                if path.is_file() and not path.is_symlink():
                    try:
                        path.unlink()
                    except OSError as error:
                        logger.warning("%s: %s; cannot remove it: %s", path, damage, error.strerror)
                        return
                self._drop_from_index(key)
                logger.warning("%s: %s; its chunk is a miss", path, damage)

    def _drop_from_index(self, key: bytes) -> None:
        self._used -= self._disk_bytes_of.pop(key, 0)

    def _disk_bytes(self, nbytes: int) -> int:
        """Return the disk space of a file of ``nbytes``, in bytes."""
        block = self._directory.block_bytes
        return -(-nbytes // block) * block
