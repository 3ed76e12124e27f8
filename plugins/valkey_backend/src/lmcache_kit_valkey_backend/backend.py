"""The backend ``ValkeyBackend``."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from lmcache_kit.interfaces import Backend, Blob, BlobRecord, StoreUsage
from lmcache_kit.interfaces.backend import MAX_META_BYTES
from lmcache_kit_valkey_backend.options import ValkeyOptions
from lmcache_kit_valkey_backend.server import (
    Command,
    NotAllowed,
    Server,
    is_foreign,
    is_out_of_memory,
)

FORMAT = b"1:"
"""Stands in each key behind the prefix, so that blobs of another format are not even seen."""
META, DATA = b"m", b"d"
MAX_DATA_BYTES = 512 * 1024 * 1024
"""What a server takes in one value, unless it is configured otherwise."""
_KEY_BYTES = 16
_PAGE = 250
logger = logging.getLogger(__name__)


class ValkeyBackend(Backend):
    """Blobs on a server, a hash each: one field for the meta, one for the data. Each is put by one
    command, so that readers get the old one or the new one.

    Nothing is connected before the first call. A blob over 512 MiB is refused, as the server would.
    """

    shared: ClassVar[bool] = True

    def __init__(self, options: ValkeyOptions | None = None) -> None:
        options = options or ValkeyOptions()
        self._prefix = options.prefix.encode() + FORMAT
        self._ttl_s = options.ttl_s
        self._server = Server(options)

    def put(self, key: bytes, meta: bytes, data: Sequence[memoryview]) -> bool:
        nbytes = sum(piece.nbytes for piece in data)
        if nbytes > MAX_DATA_BYTES:
            logger.warning("a blob of %d bytes is over the %d of a value", nbytes, MAX_DATA_BYTES)
            return False
        name = self._name(key)
        whole = data[0].cast("B") if len(data) == 1 and nbytes else b"".join(data)
        commands: list[Command] = [("HSET", name, META, meta, DATA, whole)]
        if self._ttl_s is not None:
            commands.append(("EXPIRE", name, self._ttl_s))
        answers = self._server.do_all(commands)
        if is_foreign(answers[0]):
            answers = self._server.do_all([("UNLINK", name), *commands])[1:]
        return not is_out_of_memory(answers[0])

    def get(self, key: bytes) -> Blob | None:
        name = self._name(key)
        commands: list[Command] = [("HMGET", name, META, DATA)]
        if self._ttl_s is not None:
            commands.append(("EXPIRE", name, self._ttl_s))
        answer = self._server.do_all(commands)[0]
        meta, data = (None, None) if is_foreign(answer) else answer
        if meta is None or data is None or len(meta) > MAX_META_BYTES:
            return None
        return Blob(meta, data)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        answers = self._server.do_all([("HEXISTS", self._name(key), META) for key in keys])
        return [answer == 1 for answer in answers]

    def remove(self, keys: Sequence[bytes]) -> None:
        names = [self._name(key) for key in keys]
        pages = [names[at : at + _PAGE] for at in range(0, len(names), _PAGE)]
        self._server.do_all([("UNLINK", *page) for page in pages])

    def scan(self) -> Iterator[BlobRecord]:
        """In no order, page by page, while others put and remove."""
        seen: set[bytes] = set()
        cursor = b"0"
        while True:
            cursor, page = self._server.do("SCAN", cursor, "MATCH", self._pattern, "COUNT", _PAGE)
            names = [name for name in dict.fromkeys(page) if name not in seen]
            yield from self._described(names)
            seen.update(names)
            if int(cursor) == 0:
                return

    def usage(self) -> StoreUsage:
        """Counted blob by blob, since others put and remove as well. ``capacity_bytes`` is the
        server's ``maxmemory``, where that may be asked."""
        entries = nbytes = 0
        for stored in self.scan():
            entries += 1
            nbytes += len(stored.meta) + stored.nbytes
        try:
            told = re.search(rb"\bmaxmemory:(\d+)", self._server.do("INFO", "memory"))
        except NotAllowed:
            told = None
        return StoreUsage(entries, nbytes, int(told[1]) or None if told else None)

    def close(self) -> None:
        self._server.close()

    def _name(self, key: bytes) -> bytes:
        return self._prefix + key.hex().encode()

    @property
    def _pattern(self) -> bytes:
        escaped = re.sub(rb"([*?\[\]\\])", rb"\\\1", self._prefix)
        return escaped + b"?" * (2 * _KEY_BYTES)

    def _described(self, names: Sequence[bytes]) -> Iterator[BlobRecord]:
        """Those of them that are blobs. Lengths are asked first: others may have put anything."""
        lengths = self._server.do_all([("HSTRLEN", name, META) for name in names])
        sound = [
            name
            for name, length in zip(names, lengths, strict=True)
            if isinstance(length, int) and length <= MAX_META_BYTES
        ]
        commands: list[Command] = []
        for name in sound:
            commands += [("HGET", name, META), ("HSTRLEN", name, DATA)]
        answers = self._server.do_all(commands)
        for name, meta, nbytes in zip(sound, answers[::2], answers[1::2], strict=True):
            if isinstance(meta, bytes) and (key := self._key(name)) is not None:
                yield BlobRecord(key, meta, nbytes)

    def _key(self, name: bytes) -> bytes | None:
        """None for a name that is not one of ours."""
        try:
            return bytes.fromhex(name[len(self._prefix) :].decode())
        except ValueError:
            return None
