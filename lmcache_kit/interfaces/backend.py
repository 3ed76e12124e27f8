"""The tiers below the first one: stores of blobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

import msgspec

Data: TypeAlias = bytes | bytearray | memoryview

MAX_META_BYTES = 1 << 20


class Readable(Protocol):
    """Bytes to be read, such as a file that was opened with ``buffering=0``."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Put some of what comes next into ``buffer``; how many bytes, 0 after the last one."""
        ...

    def close(self) -> None:
        """Always called once at least."""
        ...


class Blob(NamedTuple):
    """What lies under one key: ``meta`` says what ``data`` is, and both are opaque to a store."""

    meta: bytes
    data: Data


class OpenBlob(NamedTuple):
    """The same with its data still to be read, from first to last, as ``file`` is positioned: so
    it comes to its place in memory without a copy. It stays whole, whatever becomes of the key or
    the backend meanwhile. One thread reads it, and closes it."""

    meta: bytes
    file: Readable


class BlobRecord(NamedTuple):
    """One of the blobs in a store, without its data, of which there are ``nbytes``."""

    key: bytes
    meta: bytes
    nbytes: int


class StoreUsage(msgspec.Struct, frozen=True):
    """How much lies in a store: ``nbytes`` is the room that it takes there, which is at least the
    sum of the data. ``capacity_bytes`` is None where the store has no limit of its own."""

    entries: int
    nbytes: int
    capacity_bytes: int | None = None


class Backend(ABC):
    """A tier below the first one: it keeps blobs under keys of 16 bytes.

    The kit decides what goes in, what leaves and what it means, and verifies what comes out; a
    backend keeps bytes. Methods are called from several threads at once, and may take their time,
    but not for ever: a store that does not answer raises
    :class:`~lmcache_kit.errors.BackendError` within seconds. Serving goes on without it then, and
    it is asked again after a while.

    Built with an instance of its ``config`` model when the configuration has options for it, and
    without arguments otherwise.

    ``shared``: others put and remove there too, so that the kit asks :meth:`contains` what it does
    not know of, and evicts nothing; the store must see to its room itself.
    """

    shared: ClassVar[bool] = False

    @abstractmethod
    def put(self, key: bytes, meta: bytes, data: Sequence[memoryview]) -> bool:
        """Keep a blob: ``meta``, at most ``MAX_META_BYTES``, and ``data``, to be joined.

        It takes the place of what lay under the key; whoever reads meanwhile gets the one or the
        other, never a mixture or a part. Once this has returned, the blob outlives the process if
        blobs do so at all. ``data`` is not to be used afterwards.

        False: there is no room for it, and what lay under the key is as it was; the kit removes
        others and tries again. Raises BackendError for all other failures.
        """

    @abstractmethod
    def get(self, key: bytes) -> Blob | OpenBlob | None:
        """The blob, read or opened, or None when there is none; also when it is seen to be damaged.
        Raises BackendError when that cannot be told."""

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether there is a blob under each of these keys, in order, without reading them; as
        cheap for many keys as the store allows. Raises BackendError."""

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove what lies under these keys; those that are not there are passed over. Raises
        BackendError."""

    @abstractmethod
    def scan(self) -> Iterator[BlobRecord]:
        """All blobs, each once, those first that were put first where that is known. One that is
        put or removed meanwhile may come or not; nobody waits until all have come. Raises
        BackendError."""

    @abstractmethod
    def usage(self) -> StoreUsage:
        """How much lies here now. Raises BackendError."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back to the system; what outlives the process stays where it is. Calls
        in flight end, with what they are for or with BackendError, and so do all later ones. Safe
        to call twice."""
