"""Contract of storage backends, the tiers below memory: stores of blobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import msgspec

Data: TypeAlias = bytes | bytearray | memoryview

MAX_META_BYTES = 1 << 20


class Readable(Protocol):
    """A source of bytes, such as a file that was opened with ``buffering=0``."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Read the next bytes into ``buffer``; return how many, 0 after the last one."""
        ...

    def close(self) -> None:
        """Close the source. Called at least once."""
        ...


class Blob(NamedTuple):
    """Blob of one key: ``meta`` describes ``data``; both are opaque to a store."""

    meta: bytes
    data: Data


class OpenBlob(NamedTuple):
    """Blob whose data is still to be read from ``file``, from its position to the end.

    The data then gets to its place in memory without a copy. It stays readable even if the key is
    removed or the backend is closed meanwhile. One thread reads the file, and closes it.
    """

    meta: bytes
    file: Readable


class BlobRecord(NamedTuple):
    """Record of a blob in a store, without its data of ``nbytes`` bytes."""

    key: bytes
    meta: bytes
    nbytes: int


class StoreUsage(msgspec.Struct, frozen=True):
    """Usage of a store.

    ``nbytes`` is the space that the blobs take, at least the sum of their data. ``capacity_bytes``
    is None if the store has no limit of its own.
    """

    entries: int
    nbytes: int
    capacity_bytes: int | None = None


@runtime_checkable
class ReportsMetrics(Protocol):
    """What a backend may also be: it reports the metrics that its declaration has."""

    def metrics(self) -> Mapping[str, float]:
        """Return the values of the declared metrics by name, without waiting for the store."""
        ...


class Backend(ABC):
    """A tier below memory: a store of blobs under keys of 16 bytes.

    The kit decides which blobs to put and to remove, and verifies each blob that it gets; a backend
    stores bytes. Methods are called from several threads at once, and may block, but not for ever:
    a store that does not answer raises :class:`~lmcache_kit.errors.BackendError` within seconds.
    Serving then goes on without the store, and the kit tries it again after a while.

    A backend is built with an instance of its ``config`` model if the configuration has options for
    it, and without arguments otherwise. It raises BackendError, with the remedy, when it cannot be
    opened now: serving goes on without it, and the kit builds it again after a while.

    ``shared``: other instances put and remove too. The kit then calls :meth:`contains` for unknown
    keys and evicts nothing; the store must evict by itself.
    """

    shared: ClassVar[bool] = False

    @abstractmethod
    def put(self, key: bytes, meta: bytes, data: Sequence[memoryview]) -> bool:
        """Store a blob: ``meta``, at most ``MAX_META_BYTES``, and the buffers of ``data``, joined.

        The blob replaces an older one of the key. Concurrent readers get either blob, never a
        mixture or a part. Once this has returned, the blob outlives the process, in a backend that
        persists. The backend must not refer to ``data`` afterwards.

        Return False if the store is full; the older blob of the key is then unchanged, and the kit
        removes others and tries again. Raises BackendError for all other failures.
        """

    @abstractmethod
    def get(self, key: bytes) -> Blob | OpenBlob | None:
        """Return the blob, read or opened, or None if there is none or it is damaged.

        Raises BackendError if the store cannot tell.
        """

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Return for each key whether it has a blob, in order, without reading blobs.

        One call has many keys, and should be as cheap as the store allows. Raises BackendError.
        """

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove the blobs of these keys; keys without a blob are ignored. Raises BackendError."""

    @abstractmethod
    def scan(self) -> Iterator[BlobRecord]:
        """Yield all blobs, each once, in the order of their puts if that is known.

        A blob that is put or removed meanwhile may be missing. Other calls do not wait for the end
        of a scan. Raises BackendError.
        """

    @abstractmethod
    def usage(self) -> StoreUsage:
        """Return the usage now. Raises BackendError."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources; blobs that outlive the process stay. Safe to call twice.

        Calls in flight end, with their result or with BackendError. Later calls raise BackendError.
        """
