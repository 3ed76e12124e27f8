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
from lmcache_kit_disk_backend.blob_file import Damaged, Head, create, opened, read_blob, read_head
from lmcache_kit_disk_backend.folder import Folder, failure
from lmcache_kit_disk_backend.options import DiskOptions

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class LocalDiskBackend(Backend):
    """Blobs in files, one each, which outlive the process however it ends.

    A file gets its name when it is whole; who has opened it reads it to its end, whatever takes
    the name meanwhile. So readers wait for nobody: the lock orders names and accounts alone. Room
    is taken before a file is written, and given back when the file is gone.

    Nothing is flushed to the disk: what is lost with the machine's power is found damaged, here or
    by whoever checks the data, and is a miss.

    Raises BackendError when the folder cannot be used, or another process uses it.
    """

    def __init__(self, options: DiskOptions | None = None) -> None:
        options = options or DiskOptions()
        self._capacity = options.capacity_bytes
        self._changed = threading.Condition()
        self._rooms: dict[bytes, int] = {}  # key -> bytes in whole blocks; the oldest first
        self._used = 0  # the sum of these, and what is being written
        self._newest_ns = 0
        self._calls = 0
        self._open = True
        self._folder = Folder(options.path, options.subfolder)
        try:
            self._recover()
        except BaseException:
            self._folder.close()
            raise

    def put(self, key: bytes, meta: bytes, data: Sequence[memoryview]) -> bool:
        if len(meta) > MAX_META_BYTES:
            raise ValueError(f"meta has {len(meta)} bytes; at most {MAX_META_BYTES}")
        head = Head(meta, sum(part.nbytes for part in data))
        room = self._room(head.file_bytes)
        with self._call():
            with self._changed:
                if self._used + room > self._capacity:
                    return False
                self._used += room
            temporary = self._folder.temporary(key)
            try:
                create(temporary, [head.pack(key), *data])
                self._name(temporary, key, room)
            except OSError as error:
                self._abandon(temporary, room)
                raise failure("write", self._folder.file(key), error) from error
            except BaseException:
                self._abandon(temporary, room)
                raise
            return True

    def get(self, key: bytes) -> Blob | OpenBlob | None:
        return self._read(key, lambda fd: read_blob(fd, read_head(fd, key)))

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        with self._call():
            return [key in self._rooms for key in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        with self._call():
            for key in keys:
                path = self._folder.file(key)
                try:
                    with self._changed:
                        if key in self._rooms:
                            path.unlink(missing_ok=True)
                            self._forget(key)
                except OSError as error:
                    raise failure("remove", path, error) from error

    def scan(self) -> Iterator[BlobRecord]:
        with self._call(), self._changed:
            keys = list(self._rooms)
        return (found for key in keys if (found := self._describe(key)))

    def usage(self) -> StoreUsage:
        with self._call(), self._changed:
            return StoreUsage(len(self._rooms), self._used, self._capacity)

    def close(self) -> None:
        with self._changed:
            first, self._open = self._open, False
            self._changed.wait_for(lambda: not self._calls)
        if first:
            self._folder.close()

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Something that ``close`` waits for, and that must not begin after it."""
        with self._changed:
            if not self._open:
                raise BackendError(f"the backend in {self._folder.path} is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def _recover(self) -> None:
        for found in self._folder.recover():
            self._rooms[found.key] = room = self._room(found.nbytes)
            self._used += room
            self._newest_ns = found.written_ns
        before = len(self._rooms)
        for key in list(self._rooms):
            if self._used <= self._capacity:
                break
            self.remove([key])
        if gone := before - len(self._rooms):
            logger.warning(
                "%s held more than max_size_gib; removed the oldest %d of %d blobs",
                self._folder.path,
                gone,
                before,
            )

    def _name(self, temporary: Path, key: bytes, room: int) -> None:
        """Put what is written in the place of what lies under the key."""
        with self._changed:
            # Later than all others, so that a restart finds them in the order of this dict.
            newest_ns = max(time.time_ns(), self._newest_ns + 1)
            os.utime(temporary, ns=(newest_ns, newest_ns))
            temporary.replace(self._folder.file(key))
            self._newest_ns = newest_ns
            self._forget(key)
            self._rooms[key] = room

    def _abandon(self, temporary: Path, room: int) -> None:
        """Remove what was not finished; if that fails too, its room stays taken until a restart."""
        try:
            temporary.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot remove %s: %s", temporary, error.strerror)
            return
        with self._changed:
            self._used -= room

    def _describe(self, key: bytes) -> BlobRecord | None:
        def read(fd: int) -> BlobRecord:
            head = read_head(fd, key)
            return BlobRecord(key, head.meta, head.data_bytes)

        return self._read(key, read)

    def _read(self, key: bytes, read: Callable[[int], _T]) -> _T | None:
        """What ``read`` makes of the blob's open file; None if there is none or it is damaged."""
        with self._call():
            if key not in self._rooms:
                return None
            path = self._folder.file(key)
            try:
                try:
                    with opened(path) as fd:
                        return read(fd)
                except Damaged:
                    self._drop(key, path)
                    return None
            except OSError as error:
                raise failure("read", path, error) from error

    def _drop(self, key: bytes, path: Path) -> None:
        """Remove a damaged file, unless a whole one has taken its place by now. What is no regular
        file stays: it is not ours."""
        with self._changed:
            if key not in self._rooms:
                return
            try:
                with opened(path) as fd:
                    read_head(fd, key)
                    return
            except Damaged as damage:
                if path.is_file() and not path.is_symlink():
                    try:
                        path.unlink()
                    except OSError as error:
                        logger.warning("%s: %s; it stays: %s", path, damage, error.strerror)
                        return
                self._forget(key)
                logger.warning("%s: %s; it is forgotten", path, damage)

    def _forget(self, key: bytes) -> None:
        self._used -= self._rooms.pop(key, 0)

    def _room(self, nbytes: int) -> int:
        """What a file of so many bytes takes."""
        block = self._folder.block_bytes
        return -(-nbytes // block) * block
