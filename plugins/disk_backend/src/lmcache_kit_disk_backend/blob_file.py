"""One blob in one file: a header, ``meta``, zeros up to a multiple of 4096 bytes, ``data``.

The header is little-endian: 4 bytes magic, 4 version, 4 length of ``meta``, 4 zero, 8 length of
``data``, 16 key, 8 xxh3-64 of the header up to here and ``meta``. ``data`` has no check: whoever
asked for it has one of its own, and a second would make a warm read a third longer.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_digest

from lmcache_kit.interfaces import Blob, OpenBlob
from lmcache_kit.interfaces.backend import MAX_META_BYTES

ALIGNMENT = 4096
MAGIC = b"LKDb"
VERSION = 1
_FIELDS = struct.Struct("<4sIIIQ16s")
_CHECK_BYTES = 8
_HEADER_BYTES = _FIELDS.size + _CHECK_BYTES
_PARTS_AT_ONCE = os.sysconf("SC_IOV_MAX")
_OPEN_FROM_BYTES = 1 << 20


class Damaged(Exception):
    """The file is not what was written; the message says what is wrong with it."""


class Head(NamedTuple):
    """What comes before the data, and how much of that there is."""

    meta: bytes
    data_bytes: int

    @property
    def data_at(self) -> int:
        """Where the data begins, in bytes from the start of the file."""
        return -(-(_HEADER_BYTES + len(self.meta)) // ALIGNMENT) * ALIGNMENT

    @property
    def file_bytes(self) -> int:
        return self.data_at + self.data_bytes

    def pack(self, key: bytes) -> bytes:
        """All that comes before the data, with the zeros."""
        fields = _FIELDS.pack(MAGIC, VERSION, len(self.meta), 0, self.data_bytes, key)
        head = fields + xxh3_64_digest(fields + self.meta) + self.meta
        return head.ljust(self.data_at, b"\0")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read from. Raises Damaged when there is nothing or a link; OSError."""
    try:
        # O_NONBLOCK: whatever has taken the name, such as a pipe, is not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        raise Damaged("the file is gone") from error
    try:
        yield fd
    finally:
        os.close(fd)


def read_head(fd: int, key: bytes) -> Head:
    """Raises Damaged when the file is not the blob under this key, whole as far as can be told
    without its data; OSError when it cannot be read."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise Damaged("it is no regular file")
    start = os.pread(fd, ALIGNMENT, 0)
    if len(start) < _HEADER_BYTES:
        raise Damaged(f"it ends after {len(start)} bytes")
    fields, check = start[: _FIELDS.size], start[_FIELDS.size : _HEADER_BYTES]
    magic, version, meta_bytes, _, data_bytes, named = _FIELDS.unpack(fields)
    if magic != MAGIC:
        raise Damaged("it is no file of this backend")
    if version != VERSION:
        raise Damaged(f"it is of version {version}, and this is {VERSION}")
    if meta_bytes > MAX_META_BYTES:
        raise Damaged("its header is damaged")
    meta = start[_HEADER_BYTES:][:meta_bytes]
    if len(meta) < meta_bytes:
        meta += os.pread(fd, meta_bytes - len(meta), len(start))
    if len(meta) < meta_bytes or check != xxh3_64_digest(fields + meta):
        raise Damaged("its header is damaged")
    if named != key:
        raise Damaged(f"it is the blob of {named.hex()}")
    head = Head(meta, data_bytes)
    if found.st_size != head.file_bytes:
        raise Damaged(f"it has {found.st_size} bytes instead of {head.file_bytes}")
    return head


def read_blob(fd: int, head: Head) -> Blob | OpenBlob:
    """Large data is left in its file, opened at its first byte: so it comes without a copy, and
    nobody waits for it with the interpreter's lock. Raises Damaged, OSError."""
    if head.data_bytes >= _OPEN_FROM_BYTES:
        file = FileIO(os.dup(fd))
        file.seek(head.data_at)
        return OpenBlob(head.meta, file)
    data = os.pread(fd, head.data_bytes, head.data_at)
    if len(data) < head.data_bytes:
        raise Damaged("it was cut while it was read")
    return Blob(head.meta, data)


def create(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write all of these, one after another, to a new file. Raises OSError."""
    try:
        fd = _open_new(path)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = _open_new(path)
    try:
        _write(fd, parts)
    finally:
        os.close(fd)


def _open_new(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def _write(fd: int, parts: Sequence[bytes | memoryview]) -> None:
    views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
    while views:
        written = os.writev(fd, views[:_PARTS_AT_ONCE])
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]
