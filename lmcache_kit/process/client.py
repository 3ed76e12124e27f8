"""The client of a cache process, for connectors and tools.

A background thread connects, reads, and connects again when the process has gone. Calls never
wait for it: without a connection they raise CacheUnavailable at once.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import mmap
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from lmcache_kit.cache.records import Grant, StoreItem
from lmcache_kit.errors import (
    CacheStartFailed,
    CacheTimeout,
    CacheUnavailable,
    ConfigError,
    KitError,
    PluginError,
    ProtocolError,
)
from lmcache_kit.keys import ChunkKey, Namespace
from lmcache_kit.process.channel import Channel, Pending, greet
from lmcache_kit.protocol import local as protocol
from lmcache_kit.protocol.local import Answer, Failed, Found, Hello, Request, Stats, Welcome

logger = logging.getLogger(__name__)

WAIT_SHARE = 0.8
"""The part of a lookup's timeout that the process may spend on promotion and decoding."""
_A = TypeVar("_A", bound=Answer)


class Reconnect(msgspec.Struct, frozen=True):
    """When to connect again.

    Waits double from ``first_s`` to ``most_s``, and begin anew after a connection that lasted for
    ``steady_s``. A process that cannot start is not tried again before ``broken_s``. Memory
    of a lost process stays mapped for ``keep_memory_s``, or until that of the next one is.
    """

    first_s: float = 0.2
    most_s: float = 5.0
    steady_s: float = 5.0
    broken_s: float = 60.0
    keep_memory_s: float = 10.0

    def waits(self) -> Iterator[float]:
        """Yield the seconds to wait before each attempt, without end."""
        wait_s = self.first_s
        while wait_s < self.most_s:
            yield wait_s
            wait_s *= 2
        yield from itertools.repeat(self.most_s)


class Grants(tuple[Grant, ...]):
    """Grants of one allocation, with offsets in the memory of ``incarnation``."""

    incarnation: str

    def __new__(cls, grants: Sequence[Grant], incarnation: str) -> Grants:
        self = super().__new__(cls, grants)
        self.incarnation = incarnation
        return self


class _Link:
    """A connection, and the memory that came with it."""

    def __init__(self, connection: socket.socket, hello: Hello, timeout_s: float) -> None:
        self.hello = hello
        self.welcome, fd = greet(connection, hello, timeout_s)
        try:
            self.memory = _map(fd, self.welcome)
        finally:
            os.close(fd)
        self.channel = Channel(connection)


class PendingLookup:
    """A lookup under way."""

    def __init__(self, pending: Pending, channel: Channel) -> None:
        self._pending = pending
        self._channel = channel

    def result(self) -> Found:
        """Wait for the answer. Raises CacheUnavailable, CacheTimeout."""
        return _checked(self._pending.result(), Found, self._channel)

    def poll(self, wait_s: float = 0.0) -> Found | None:
        """Return the answer, once, if it comes within ``wait_s`` seconds, else None.

        Raises CacheUnavailable, and CacheTimeout when the answer is overdue.
        """
        answer = self._pending.poll(wait_s)
        return None if answer is None else _checked(answer, Found, self._channel)

    def abandon(self) -> None:
        """Do not wait any more."""
        self._pending.abandon()


class CacheClient:
    """Calls to a cache process; safe to use from any thread.

    ``dial`` returns a connected socket, or raises CacheUnavailable, CacheStartFailed when this
    machine does not let a process start, or ConfigError or PluginError when none can be composed;
    it is called on the background thread, with an event that is set when it should give up.
    ``timeout_s`` is the deadline of every call.

    Every call but :meth:`release` raises CacheUnavailable at once when there is no connection, and
    CacheTimeout, which is one, when the answer did not come in time.
    """

    def __init__(
        self,
        dial: Callable[[threading.Event], socket.socket],
        hello: Hello,
        *,
        timeout_s: float,
        greet_timeout_s: float = 5.0,
        reconnect: Reconnect | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._dial = dial
        self._hello = hello
        self._timeout_s = timeout_s
        self._greet_timeout_s = greet_timeout_s
        self._reconnect = reconnect or Reconnect()
        self._on_close = on_close
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._link: _Link | None = None
        self._greeting: socket.socket | None = None
        self._memory: mmap.mmap | None = None
        self._memory_until = 0.0
        self._mapped: weakref.WeakValueDictionary[str, mmap.mmap] = weakref.WeakValueDictionary()
        self._incarnation: str | None = None
        self._problem: KitError | None = None
        self._thread = threading.Thread(
            target=self._stay_connected, name="lmcache-kit-client", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for a connection; False when there is none in time, or as soon as none can start.

        Raises ConfigError or PluginError as soon as it is known that no cache process can be
        composed from this configuration.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.connected or self._broken or self._closing.is_set(), timeout_s
            )
            if not self.connected and self._misconfigured and self._problem:
                raise self._problem
            return self.connected

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._link is not None

    @property
    def incarnation(self) -> str | None:
        """The incarnation of the current process, or of the last one; None before the first."""
        return self._incarnation

    def lookup(self, namespace: bytes, tokens: bytes, chunk_size: int) -> Found:
        """Find and lease the longest stored prefix of packed ``tokens``.

        ``namespace`` is a digest.
        """
        return self.begin_lookup(namespace, tokens, chunk_size).result()

    def begin_lookup(self, namespace: bytes, tokens: bytes, chunk_size: int) -> PendingLookup:
        """Begin a :meth:`lookup` without waiting for chunks that are decoded or promoted first."""
        wait_s = min(WAIT_SHARE * self._timeout_s, protocol.MAX_WAIT_S)
        request = protocol.Lookup(namespace, chunk_size, tokens, self._hello.world_size, wait_s)
        link = self._connected_link()
        return PendingLookup(link.channel.begin(request, self._timeout_s), link.channel)

    def allocate(self, namespace: bytes, chunk_size: int, items: Sequence[StoreItem]) -> Grants:
        """Reserve memory for this rank's payloads; one grant per item, in order."""
        rank, world_size = self._hello.rank, self._hello.world_size
        request = protocol.Allocate(namespace, rank, world_size, chunk_size, tuple(items))
        answer, link = self._call(request, protocol.Allocated)
        return Grants(answer.grants, link.welcome.incarnation)

    def commit(self, written: Sequence[tuple[int, int]]) -> int:
        """Publish payloads by their ``(ticket, xxh3-64)``; return how many took effect."""
        return self._call(protocol.Commit(tuple(written)), protocol.Done)[0].count

    def abandon(self, tickets: Sequence[int]) -> None:
        """Give up the payloads of these tickets."""
        self._call(protocol.Abandon(tuple(tickets)), protocol.Done)

    def release(self, lease: int, *, everyone: bool = False) -> None:
        """End this rank's part of a lease, or ``everyone``'s.

        Does not wait and never raises: a lease that cannot be released ends with the connection
        or its time to live.
        """
        if lease and (link := self._link):
            rank = None if everyone else self._hello.rank
            with contextlib.suppress(CacheUnavailable):
                link.channel.post(protocol.Release(lease, rank))

    def report_corrupt(self, key: ChunkKey) -> None:
        """Have a chunk dropped whose bytes do not match its checksum."""
        self._call(protocol.ReportCorrupt(key), protocol.Done)

    def use_namespace(self, namespace: Namespace) -> None:
        """Store under another base namespace from now on, also after the next connection.

        Does not wait and never raises.
        """
        self._hello = msgspec.structs.replace(self._hello, namespace=namespace)
        if link := self._link:
            with contextlib.suppress(CacheUnavailable):
                link.channel.post(protocol.UseNamespace(namespace))

    def stats(self) -> Stats:
        """Return the gauges and counters of the cache process."""
        return self._call(protocol.GetStats(), Stats)[0]

    def memory(self, incarnation: str) -> memoryview | None:
        """Return the mapped memory of an incarnation, writable; None when it is not mapped.

        It stays readable for as long as the view is held, also after :meth:`close`.
        """
        mapped = self._mapped.get(incarnation)
        return None if mapped is None else memoryview(mapped)

    def close(self) -> None:
        """End the connection and its thread. Safe to call twice; called at exit if not before."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing.set()
            if self._link:
                self._link.channel.close()
            if self._greeting:
                with contextlib.suppress(OSError):  # its peer may have gone before
                    self._greeting.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._memory = None
        on_close, self._on_close = self._on_close, None
        if on_close:
            on_close()

    def __enter__(self) -> CacheClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _broken(self) -> bool:
        """Whether waiting is of no use.

        A process that worked once is not broken: its successor may only lack the memory that the
        dead one's clients still map.
        """
        failed = self._incarnation is None and isinstance(self._problem, CacheStartFailed)
        return failed or self._misconfigured

    @property
    def _misconfigured(self) -> bool:
        """Whether no cache can be composed from this configuration."""
        return self._incarnation is None and isinstance(self._problem, ConfigError | PluginError)

    @property
    def _is_first(self) -> bool:
        """Whether this client speaks for all clients of an engine, which meet the same trouble."""
        return self._hello.role != "scheduler" and self._hello.rank == 0

    def _call(self, request: Request, expected: type[_A]) -> tuple[_A, _Link]:
        link = self._connected_link()
        answer = link.channel.call(request, self._timeout_s)
        return _checked(answer, expected, link.channel), link

    def _connected_link(self) -> _Link:
        link = self._link
        if link is None:
            raise CacheUnavailable("no cache process is connected", hint=self._why())
        return link

    def _why(self) -> str:
        if self._closing.is_set():
            return "This client is closed"
        return str(self._problem) if self._problem else "It may be starting"

    def _stay_connected(self) -> None:
        policy = self._reconnect
        waits = policy.waits()
        while not self._closing.is_set():
            link = self._connect()
            pause = policy.broken_s if self._broken else next(waits)
            if link:
                began = time.monotonic()
                self._attached(link)
                link.channel.run()
                self._detached()
                if time.monotonic() - began >= policy.steady_s:
                    waits = policy.waits()
                    pause = next(waits)
            del link  # it holds the memory
            self._pause(pause)

    def _connect(self) -> _Link | None:
        try:
            connection = self._dial(self._closing)
            link = None
            try:
                if self._may_greet(connection):
                    link = _Link(connection, self._hello, self._greet_timeout_s)
            finally:
                with self._changed:
                    self._greeting = None
                if link is None:
                    connection.close()
        except (KitError, OSError) as error:
            self._failed(error if isinstance(error, KitError) else CacheUnavailable(str(error)))
            return None
        return link

    def _may_greet(self, connection: socket.socket) -> bool:
        """Return whether to go on; from now on :meth:`close` ends the wait for an answer."""
        with self._changed:
            self._greeting = connection
            return not self._closing.is_set()

    def _failed(self, problem: KitError) -> None:
        with self._changed:
            known, self._problem = str(self._problem), problem
            if str(problem) != known and not self._closing.is_set():
                self._log_failure(problem)
            self._changed.notify_all()

    def _log_failure(self, problem: KitError) -> None:
        if self._misconfigured:  # a caller of wait_ready gets the error, and may end
            logger.warning("no cache process: %s", problem)
        elif self._broken:
            logger.log(
                logging.ERROR if self._is_first else logging.INFO,
                "no cache process, serving goes on without; the start is tried again every %g s: "
                "%s",
                self._reconnect.broken_s,
                problem,
            )
        else:
            late = self._incarnation is None and isinstance(problem, CacheTimeout)
            logger.log(
                logging.ERROR if late and self._is_first else logging.WARNING,
                "no cache process, serving goes on without: %s",
                problem,
            )

    def _attached(self, link: _Link) -> None:
        with self._changed:
            self._memory = link.memory
            self._mapped[link.welcome.incarnation] = link.memory
            self._incarnation = link.welcome.incarnation
            self._problem = None
            self._link = link
            if (namespace := self._hello.namespace) and namespace != link.hello.namespace:
                self.use_namespace(namespace)  # it came while this connection was made
            if self._closing.is_set():
                link.channel.close()
            self._changed.notify_all()
        logger.info(
            "connected to cache process %d: %s of %.2f GiB (incarnation %s)",
            link.welcome.pid,
            link.welcome.location,
            link.welcome.memory_bytes / 2**30,
            link.welcome.incarnation,
        )

    def _detached(self) -> None:
        with self._changed:
            self._link = None
            self._memory_until = time.monotonic() + self._reconnect.keep_memory_s
            if not self._closing.is_set():
                self._problem = CacheUnavailable("the cache process has gone")
                logger.warning("the cache process has gone; serving goes on without")
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        """Wait between attempts; unmap a dead process's memory when its time is over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._memory is not None:
                left = min(left, max(0.0, self._memory_until - time.monotonic()))
            if self._closing.wait(left):
                return
            if time.monotonic() >= self._memory_until:
                self._memory = None


def _checked(answer: Answer, expected: type[_A], channel: Channel) -> _A:
    """Return an answer of the expected type. Raises CacheUnavailable for any other."""
    if isinstance(answer, Failed):
        raise CacheUnavailable(f"the cache process could not serve a call: {answer.message}")
    if not isinstance(answer, expected):
        channel.close()
        raise CacheUnavailable(f"the cache process answered with {type(answer).__name__}")
    return answer


def _map(fd: int, welcome: Welcome) -> mmap.mmap:
    """Map the memory.

    Raises ProtocolError when it is smaller than announced, because reads past the end of a file
    kill a process.
    """
    if welcome.memory_bytes < 1 or os.fstat(fd).st_size < welcome.memory_bytes:
        raise ProtocolError(f"the cache process's memory is less than {welcome.memory_bytes} bytes")
    return mmap.mmap(fd, welcome.memory_bytes)
