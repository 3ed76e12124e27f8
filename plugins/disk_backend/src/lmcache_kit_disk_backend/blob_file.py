"""Format of a blob's file: a header, ``meta``, zeros up to a multiple of 4096 bytes, ``data``.

The header is little-endian: 4 bytes magic, 4 version, 4 length of ``meta``, 4 zero, 8 length of
``data``, 16 key, 8 xxh3-64 of the header up to here and ``meta``. ``data`` has no checksum here:
the cache process has one and verifies it, and a second one would make a warm read a third longer.
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


class DamagedFile(Exception):
    """The file is not a complete blob of its key; the message says why."""


class MissingFile(DamagedFile):
    """There is no file of that name."""


class BlobHeader(NamedTuple):
    """Contents of a blob's file before the data, and the length of the data."""

    meta: bytes
    data_bytes: int

    @property
    def data_at(self) -> int:
        """Offset of the data in the file."""
        return -(-(_HEADER_BYTES + len(self.meta)) // ALIGNMENT) * ALIGNMENT

    @property
    def file_bytes(self) -> int:
        return self.data_at + self.data_bytes

    def pack(self, key: bytes) -> bytes:
        """Return all bytes before the data, padded with zeros."""
        fields = _FIELDS.pack(MAGIC, VERSION, len(self.meta), 0, self.data_bytes, key)
        header = fields + xxh3_64_digest(fields + self.meta) + self.meta
        return header.ljust(self.data_at, b"\0")


@contextmanager
def open_for_reading(path: Path) -> Iterator[int]:
    """Open a file descriptor. Raises MissingFile, DamagedFile for a link, and OSError."""
    try:
        # O_NONBLOCK: do not wait when something else, such as a pipe, has the name.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise MissingFile("the file is gone") from error
        if error.errno == errno.ELOOP:
            raise DamagedFile("a link has its name") from error
        raise
    try:
        yield fd
    finally:
        os.close(fd)


def read_header(fd: int, key: bytes) -> BlobHeader:
    """Read and verify the header.

    Raises DamagedFile unless the file is a complete blob of this key, as far as can be told without
    its data. Raises OSError when the file cannot be read.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise DamagedFile("it is no regular file")
    start = os.pread(fd, ALIGNMENT, 0)
    if len(start) < _HEADER_BYTES:
        raise DamagedFile(f"it ends after {len(start)} bytes")
    fields, check = start[: _FIELDS.size], start[_FIELDS.size : _HEADER_BYTES]
    magic, version, meta_bytes, _, data_bytes, named = _FIELDS.unpack(fields)
    if magic != MAGIC:
        raise DamagedFile(f"it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise DamagedFile(f"it has format version {version}; known: {VERSION}")
    if meta_bytes > MAX_META_BYTES:
        raise DamagedFile(f"its header claims {meta_bytes} bytes of meta; at most {MAX_META_BYTES}")
    meta = start[_HEADER_BYTES:][:meta_bytes]
    if len(meta) < meta_bytes:
        meta += os.pread(fd, meta_bytes - len(meta), len(start))
    if len(meta) < meta_bytes or check != xxh3_64_digest(fields + meta):
        raise DamagedFile("its header does not match its checksum")
    if named != key:
        raise DamagedFile(f"it is the blob of {named.hex()}")
    header = BlobHeader(meta, data_bytes)
    if found.st_size != header.file_bytes:
        raise DamagedFile(f"it has {found.st_size} bytes instead of {header.file_bytes}")
    return header


def read_blob(fd: int, header: BlobHeader) -> Blob | OpenBlob:
    """Read a small blob; open a large one at the first byte of its data.

    An open blob is read later, without a copy and without the GIL. Raises DamagedFile and OSError.
    """
    if header.data_bytes >= _OPEN_FROM_BYTES:
        file = FileIO(os.dup(fd))
        file.seek(header.data_at)
        return OpenBlob(header.meta, file)
    data = os.pread(fd, header.data_bytes, header.data_at)
    if len(data) < header.data_bytes:
        raise DamagedFile(f"it was cut during the read: {len(data)} of {header.data_bytes} bytes")
    return Blob(header.meta, data)


def write_file(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write all parts, one after another, to a new file. Raises OSError."""
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
