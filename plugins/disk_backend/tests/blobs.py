"""What is got, as bytes."""

from __future__ import annotations

from contextlib import closing
from io import FileIO

from lmcache_kit.interfaces import Blob, OpenBlob


def plain(blob: Blob | OpenBlob | None) -> tuple[bytes, bytes] | None:
    """Its meta, and its data to the end of the file."""
    if isinstance(blob, OpenBlob):
        with closing(blob.file) as file:
            assert isinstance(file, FileIO)
            return blob.meta, file.readall()
    return blob and (blob.meta, bytes(blob.data))
