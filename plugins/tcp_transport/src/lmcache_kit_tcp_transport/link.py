"""The reading side of a connection."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from xxhash import xxh3_64, xxh3_64_intdigest

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces import Link, ReadResult, Region
from lmcache_kit_tcp_transport.connection import Connection
from lmcache_kit_tcp_transport.wire import (
    HEADER_BYTES,
    MAX_REASON_BYTES,
    Frame,
    Kind,
    Op,
    Request,
    pack_request,
    unpack_frame,
    unpack_offer,
)


class TcpLink(Link):
    """Read from one peer over one connection.

    A read that does not complete closes the connection, unless the peer refused the request: the
    stream is then still in step.
    """

    def __init__(self, connection: Connection, memory: memoryview) -> None:
        self._connection = connection
        self._memory = memory

    @property
    def how(self) -> str:
        return self._connection.how

    def hello(self, timeout_s: float) -> None:
        """Exchange a greeting. Raises TransportError unless the peer answers in kind."""
        deadline = time.monotonic() + timeout_s
        self._ask(Request(Op.HELLO), deadline)
        frame = self._frame(deadline)
        if frame.kind is Kind.REFUSED:
            raise TransportError(f"{self._peer} refuses: {self._reason(frame, deadline)}")
        if frame.kind is not Kind.HELLO:
            raise TransportError(f"{self._peer} answers {frame} to a greeting")

    def read(self, offer: bytes, into: Sequence[Region], timeout_s: float) -> Iterator[ReadResult]:
        deadline = time.monotonic() + timeout_s
        token, count = unpack_offer(offer)
        if count != len(into):
            raise TransportError(f"{count} regions are offered, and {len(into)} are requested")
        for region in into:
            self._check(region)
        received, usable = 0, False
        try:
            self._ask(Request(Op.READ, count, token), deadline)
            frame = self._frame(deadline)
            if frame.kind is Kind.REFUSED:
                reason = self._reason(frame, deadline)
                usable = True
                raise TransportError(f"{self._peer} refuses: {reason}")
            if frame.kind is not Kind.READING or frame.number != count:
                raise TransportError(f"{self._peer} answers {frame}, asked for {count} regions")
            for number, region in enumerate(into):
                checksum = self._receive(number, region, deadline)
                received += 1
                yield ReadResult(number, checksum)
            usable = True
        except TransferTimeout as error:
            raise TransferTimeout(
                f"{received} of {count} regions came from {self._peer} within {timeout_s:g} s"
            ) from error
        finally:
            if not usable:
                self.close()

    def close(self) -> None:
        self._connection.close()

    @property
    def _peer(self) -> str:
        return self._connection.peer

    def _check(self, region: Region) -> None:
        if region.offset < 0 or not 0 <= region.nbytes <= len(self._memory) - region.offset:
            raise ValueError(f"{region} is not in the memory, which has {len(self._memory)} bytes")

    def _ask(self, request: Request, deadline: float) -> None:
        self._connection.send(pack_request(request), stall_s=deadline - time.monotonic())

    def _frame(self, deadline: float) -> Frame:
        return unpack_frame(self._connection.receive_exactly(HEADER_BYTES, deadline))

    def _reason(self, frame: Frame, deadline: float) -> str:
        if frame.nbytes > MAX_REASON_BYTES:
            raise TransportError(f"{self._peer} gives a reason of {frame.nbytes} bytes")
        text = self._connection.receive_exactly(frame.nbytes, deadline)
        if xxh3_64_intdigest(text) != frame.checksum:
            raise TransportError(f"{self._peer} gives a reason that is corrupt on the wire")
        return text.decode(errors="replace")

    def _receive(self, number: int, region: Region, deadline: float) -> int:
        """Receive a region; return the checksum of the bytes that arrived.

        The caller compares the checksum. A mismatch leaves the stream in step, since frames have
        checks of their own.
        """
        frame = self._frame(deadline)
        if frame.kind is not Kind.REGION or frame.number != number:
            raise TransportError(f"{self._peer} sends {frame} instead of region {number}")
        if frame.nbytes != region.nbytes:
            raise TransportError(
                f"region {number} of {self._peer} has {frame.nbytes} bytes; {region.nbytes} were "
                "requested"
            )
        rest = self._memory[region.offset : region.offset + region.nbytes]
        hashed = xxh3_64()
        while rest:
            received = self._connection.receive(rest, deadline)
            hashed.update(rest[:received])
            rest = rest[received:]
        checksum: int = hashed.intdigest()
        return checksum
