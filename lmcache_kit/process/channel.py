"""One connection to a cache process: calls with deadlines.

One thread runs :meth:`Channel.run` and reads; any thread calls. Nothing blocks on a process that
does not answer. Frames that the socket does not accept are queued and sent later, in order, so
that the stream stays intact.

    on time -> overdue        an answer did not come before its deadline; new calls fail at once
    overdue -> on time        it came late: what it granted is released, calls work again
    overdue -> closed         it did not come for GIVE_UP_S
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import socket
import threading
import time
import weakref
from typing import TypeAlias

from lmcache_kit.errors import CacheTimeout, CacheUnavailable, ProtocolError
from lmcache_kit.process import paths
from lmcache_kit.protocol import local as protocol
from lmcache_kit.protocol.framing import FrameBuffer
from lmcache_kit.protocol.local import MAX_FRAME_BYTES, Answer, Failed, Hello, Request, Welcome
from lmcache_kit.protocol.wakeup import WakeupFd

GIVE_UP_S = 30.0
"""A connection whose answer is overdue for so long is closed and made anew."""
MAX_OUTBOX_BYTES = 64 * 1024 * 1024
_RECEIVE_BYTES = 256 * 1024

_live: weakref.WeakSet[Channel] = weakref.WeakSet()
_Slot: TypeAlias = "queue.SimpleQueue[Answer | None]"


def greet(connection: socket.socket, hello: Hello, timeout_s: float) -> tuple[Welcome, int]:
    """Send Hello; return the answer and the memory's file descriptor, which the caller owns.

    Raises CacheUnavailable (CacheTimeout when nothing came in time) and ProtocolError.
    """
    if (uid := paths.peer_uid(connection)) != os.getuid():
        raise CacheUnavailable(f"the cache process there belongs to user {uid}")
    connection.settimeout(timeout_s)
    received, fds = FrameBuffer(), list[int]()
    try:
        connection.sendall(protocol.encode(0, hello))
        while (body := received.next_body(MAX_FRAME_BYTES)) is None:
            data, new_fds, _, _ = socket.recv_fds(
                connection, _RECEIVE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
            fds += new_fds
            if not data:
                raise CacheUnavailable("the cache process closed the connection at once")
            received.feed(data)
        if received:
            raise ProtocolError("more than one frame answers Hello")
        _, answer = protocol.decode_answer(body)
        if isinstance(answer, Failed):
            raise CacheUnavailable(answer.message)
        if not isinstance(answer, Welcome) or len(fds) != 1:
            raise ProtocolError(f"{type(answer).__name__} with {len(fds)} fds answers no Hello")
        return answer, fds.pop()
    except TimeoutError as error:
        raise CacheTimeout(f"the cache process did not greet within {timeout_s:g} s") from error
    except OSError as error:
        if isinstance(error, CacheUnavailable):
            raise
        raise CacheUnavailable(f"the cache process is gone: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)


class Pending:
    """A request under way, whose answer is due ``timeout_s`` seconds after it was sent."""

    def __init__(self, channel: Channel, request_id: int, slot: _Slot, timeout_s: float) -> None:
        self._channel = channel
        self._request_id = request_id
        self._slot = slot
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def result(self) -> Answer:
        """Wait for the answer. Raises CacheUnavailable, CacheTimeout."""
        try:
            while (answer := self.poll(self._timeout_s)) is None:
                pass
            return answer
        except KeyboardInterrupt:  # the answer will not be read
            self.abandon()
            raise

    def poll(self, wait_s: float = 0.0) -> Answer | None:
        """Return the answer, once, if it comes within ``wait_s`` seconds, else None.

        Raises CacheTimeout when the answer is overdue, and CacheUnavailable.
        """
        left_s = self._deadline - time.monotonic()
        try:
            answer = self._slot.get(timeout=max(0.0, min(wait_s, left_s)))
        except queue.Empty:
            if wait_s < left_s:
                return None
            answer = self._channel._give_up(self._request_id, self._slot, self._timeout_s)
        if answer is None:
            raise CacheUnavailable("the cache process has gone")
        return answer

    def abandon(self) -> None:
        """Do not wait any more: what the answer grants is released when it comes."""
        self._channel._abandon(self._request_id, self._slot)


class Channel:
    """A connection after its Hello. It owns ``connection``; :meth:`close` ends :meth:`run`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._wakeup = WakeupFd()
        self._last_id = 0
        self._outbox = bytearray()
        self._waiting: dict[int, _Slot] = {}
        self._overdue: dict[int, float] = {}
        self._closed = False
        _live.add(self)

    def call(self, request: Request, timeout_s: float) -> Answer:
        """Send a request and wait for its answer. Raises CacheUnavailable, CacheTimeout."""
        return self.begin(request, timeout_s).result()

    def begin(self, request: Request, timeout_s: float) -> Pending:
        """Send a request, to wait for its answer later. Raises CacheUnavailable, CacheTimeout."""
        slot: _Slot = queue.SimpleQueue()
        with self._lock:
            self._refuse_while_overdue()
            request_id = self._send(request)
            self._waiting[request_id] = slot
        return Pending(self, request_id, slot, timeout_s)

    def post(self, request: Request) -> None:
        """Send a request whose answer is ignored. Raises CacheUnavailable."""
        with self._lock:
            self._send(request)

    def run(self) -> None:
        """Read answers until either side closes; then close the socket.

        Never raises for what the server does: one that breaks the protocol counts as gone.
        """
        try:
            with contextlib.suppress(OSError, ProtocolError):
                self._read_until_closed()
        finally:
            with self._lock:
                self._closed = True
                waiting, self._waiting = self._waiting, {}
                for slot in waiting.values():
                    slot.put(None)
                self._socket.close()
                self._wakeup.close()

    def close(self) -> None:
        """Make :meth:`run` return soon."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._wakeup.wake()

    def _refuse_while_overdue(self) -> None:
        if self._overdue:
            since = time.monotonic() - min(self._overdue.values())
            raise CacheTimeout(f"the cache process has not answered for {since:.1f} s")

    def _send(self, request: Request) -> int:
        """Under the lock: send what the socket accepts, queue the rest for the reader's thread."""
        if self._closed:
            raise CacheUnavailable("the cache process has gone")
        request_id = self._last_id + 1
        frame: bytes | memoryview = protocol.encode(request_id, request)
        self._last_id = request_id
        if not self._outbox:
            try:
                sent = self._socket.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError as error:  # the reader's thread sees the end of file by itself
                raise CacheUnavailable(f"the cache process has gone: {error}") from error
            frame = memoryview(frame)[sent:]
        if frame:
            if len(self._outbox) + len(frame) > MAX_OUTBOX_BYTES:
                raise CacheTimeout("the cache process does not read")
            self._outbox += frame
            self._wakeup.wake()
        return request_id

    def _abandon(self, request_id: int, slot: _Slot) -> None:
        with self._lock:
            came = self._waiting.pop(request_id, None) is None
        if came:
            with contextlib.suppress(queue.Empty):  # it was read
                self._release_grants(slot.get_nowait())

    def _give_up(self, request_id: int, slot: _Slot, timeout_s: float) -> Answer | None:
        with self._lock:
            if self._waiting.pop(request_id, None) is None:
                return slot.get_nowait()  # it came just now
            self._overdue[request_id] = time.monotonic() - timeout_s
            if not self._closed:
                self._wakeup.wake()  # the reader's thread has a deadline now
        raise CacheTimeout(f"the cache process did not answer within {timeout_s:g} s")

    def _read_until_closed(self) -> None:
        received = FrameBuffer()
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakeup, selectors.EVENT_READ)
            interest = selectors.EVENT_READ
            selector.register(self._socket, interest)
            while True:
                for key, events in selector.select(self._select_timeout_s()):
                    if key.fileobj is self._wakeup:
                        self._wakeup.clear()
                    elif events & selectors.EVENT_READ and not self._receive(received):
                        return
                with self._lock:
                    if self._closed or self._is_given_up():
                        return
                    wanted = selectors.EVENT_READ | self._flush()
                if wanted != interest:
                    interest = wanted
                    selector.modify(self._socket, interest)

    def _receive(self, received: FrameBuffer) -> bool:
        """Read what has arrived; False at the end of file."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return True
        received.feed(data)
        self._dispatch(received)
        return bool(data)

    def _flush(self) -> int:
        """Under the lock: send what is queued; return the event to wait for if some is left."""
        if self._outbox:
            with contextlib.suppress(BlockingIOError):
                del self._outbox[: self._socket.send(self._outbox)]
        return selectors.EVENT_WRITE if self._outbox else 0

    def _select_timeout_s(self) -> float | None:
        with self._lock:
            if not self._overdue:
                return None
            return max(0.0, min(self._overdue.values()) + GIVE_UP_S - time.monotonic())

    def _is_given_up(self) -> bool:
        return bool(self._overdue) and (time.monotonic() - min(self._overdue.values()) >= GIVE_UP_S)

    def _dispatch(self, received: FrameBuffer) -> None:
        while (body := received.next_body(MAX_FRAME_BYTES)) is not None:
            answer_id, answer = protocol.decode_answer(body)
            with self._lock:
                self._overdue.pop(answer_id, None)
                slot = self._waiting.pop(answer_id, None)
                if slot is not None:
                    slot.put(answer)
            if slot is None:
                self._release_grants(answer)

    def _release_grants(self, answer: Answer | None) -> None:
        """Release what an answer granted that came too late for its caller."""
        with contextlib.suppress(CacheUnavailable):
            match answer:
                case protocol.Found(lease=lease) if lease:
                    self.post(protocol.Release(lease))
                case protocol.Allocated(grants=grants):
                    tickets = tuple(g.ticket for g in grants if g.status == "granted")
                    if tickets:
                        self.post(protocol.Abandon(tickets))
                case _:
                    pass

    def _close_after_fork(self) -> None:
        """Close a forked child's copy, which has no reader's thread and must not send."""
        self._lock = threading.Lock()  # the holder may not exist in the child
        if not self._closed:
            self._closed = True
            self._socket.close()
            self._wakeup.close_after_fork()


def _after_fork() -> None:
    """Close the child's copies: the process at the other end must see when its client dies."""
    for channel in tuple(_live):
        channel._close_after_fork()


os.register_at_fork(after_in_child=_after_fork)
