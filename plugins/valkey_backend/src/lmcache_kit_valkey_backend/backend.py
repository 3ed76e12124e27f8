"""The backend ``ValkeyBackend``."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from lmcache_kit.interfaces import Backend, Blob, BlobRecord, StoreUsage
from lmcache_kit.interfaces.backend import MAX_META_BYTES
from lmcache_kit_valkey_backend.client import (
    Command,
    PermissionDenied,
    ValkeyClient,
    is_out_of_memory,
    is_wrong_type,
)
from lmcache_kit_valkey_backend.options import ValkeyOptions

FORMAT = b"1:"
"""Part of each key, after the prefix: blobs of another format have other keys."""
META, DATA = b"m", b"d"
MAX_DATA_BYTES = 512 * 1024 * 1024
"""Largest value that a server accepts by default (``proto-max-bulk-len``)."""
_KEY_BYTES = 16
_PAGE = 250
logger = logging.getLogger(__name__)


class ValkeyBackend(Backend):
    """Blobs on a server, each a hash with a field for the meta and a field for the data.

    One command writes both fields, so that readers get the old blob or the new one. The first call
    connects. A blob of more than 512 MiB is refused, as the server would.
    """

    shared: ClassVar[bool] = True

    def __init__(self, options: ValkeyOptions | None = None) -> None:
        options = options or ValkeyOptions()
        self._prefix = options.prefix.encode() + FORMAT
        self._ttl_s = options.ttl_s
        self._client = ValkeyClient(options)

    def put(self, key: bytes, meta: bytes, data: Sequence[memoryview]) -> bool:
        nbytes = sum(part.nbytes for part in data)
        if nbytes > MAX_DATA_BYTES:
            logger.warning(
                "a blob of %d bytes is not put: a value has at most %d", nbytes, MAX_DATA_BYTES
            )
            return False
        name = self._name(key)
        whole = data[0].cast("B") if len(data) == 1 and nbytes else b"".join(data)
        commands: list[Command] = [("HSET", name, META, meta, DATA, whole)]
        if self._ttl_s is not None:
            commands.append(("EXPIRE", name, self._ttl_s))
        answers = self._client.execute_pipeline(commands)
        if is_wrong_type(answers[0]):
            answers = self._client.execute_pipeline([("UNLINK", name), *commands])[1:]
        return not is_out_of_memory(answers[0])

    def get(self, key: bytes) -> Blob | None:
        name = self._name(key)
        commands: list[Command] = [("HMGET", name, META, DATA)]
        if self._ttl_s is not None:
            commands.append(("EXPIRE", name, self._ttl_s))
        answer = self._client.execute_pipeline(commands)[0]
        meta, data = (None, None) if is_wrong_type(answer) else answer
        if meta is None or data is None or len(meta) > MAX_META_BYTES:
            return None
        return Blob(meta, data)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        answers = self._client.execute_pipeline(
            [("HEXISTS", self._name(key), META) for key in keys]
        )
        return [answer == 1 for answer in answers]

    def remove(self, keys: Sequence[bytes]) -> None:
        names = [self._name(key) for key in keys]
        pages = [names[at : at + _PAGE] for at in range(0, len(names), _PAGE)]
        self._client.execute_pipeline([("UNLINK", *page) for page in pages])

    def scan(self) -> Iterator[BlobRecord]:
        """Yield all blobs in no order, page by page, while other instances put and remove."""
        seen: set[bytes] = set()
        cursor = b"0"
        while True:
            cursor, page = self._client.execute(
                "SCAN", cursor, "MATCH", self._pattern, "COUNT", _PAGE
            )
            names = [name for name in dict.fromkeys(page) if name not in seen]
            yield from self._described(names)
            seen.update(names)
            if int(cursor) == 0:
                return

    def usage(self) -> StoreUsage:
        """Count blob by blob, since other instances put and remove too.

        ``capacity_bytes`` is the server's ``maxmemory``, if the user may read it.
        """
        entries = nbytes = 0
        for stored in self.scan():
            entries += 1
            nbytes += len(stored.meta) + stored.nbytes
        try:
            reported = re.search(rb"\bmaxmemory:(\d+)", self._client.execute("INFO", "memory"))
        except PermissionDenied:
            reported = None
        return StoreUsage(entries, nbytes, int(reported[1]) or None if reported else None)

    def close(self) -> None:
        self._client.close()

    def _name(self, key: bytes) -> bytes:
        return self._prefix + key.hex().encode()

    @property
    def _pattern(self) -> bytes:
        escaped = re.sub(rb"([*?\[\]\\])", rb"\\\1", self._prefix)
        return escaped + b"?" * (2 * _KEY_BYTES)

    def _described(self, names: Sequence[bytes]) -> Iterator[BlobRecord]:
        """Yield a record for each name that is a blob.

        Lengths are read first, since other clients may have put values of any size.
        """
        lengths = self._client.execute_pipeline([("HSTRLEN", name, META) for name in names])
        sound = [
            name
            for name, length in zip(names, lengths, strict=True)
            if isinstance(length, int) and length <= MAX_META_BYTES
        ]
        commands: list[Command] = []
        for name in sound:
            commands += [("HGET", name, META), ("HSTRLEN", name, DATA)]
        answers = self._client.execute_pipeline(commands)
        for name, meta, nbytes in zip(sound, answers[::2], answers[1::2], strict=True):
            if isinstance(meta, bytes) and (key := self._key(name)) is not None:
                yield BlobRecord(key, meta, nbytes)

    def _key(self, name: bytes) -> bytes | None:
        """Return the key in a name, or None for a name of another format."""
        try:
            return bytes.fromhex(name[len(self._prefix) :].decode())
        except ValueError:
            return None
