"""The transport ``nixl``."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Sequence

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces.transport import Dial, Link, ReadableRegion, Transport
from lmcache_kit_nixl_transport import cma, environment, rdma, wire
from lmcache_kit_nixl_transport.agent import Agent, Copy
from lmcache_kit_nixl_transport.link import NixlLink
from lmcache_kit_nixl_transport.options import NixlOptions
from lmcache_kit_nixl_transport.peers import Peer, Peers
from lmcache_kit_nixl_transport.reading import wait
from lmcache_kit_nixl_transport.scratch import Scratch
from lmcache_kit_nixl_transport.transfer import Transfer
from lmcache_kit_nixl_transport.wire import NONCE_BYTES, Address, Span

_CMA = ("cma", "sm", "shm")
_TRIES = 60
_CONVINCING = 12
_CONTACT_S = 0.002
"""A pause while contact is made: what takes part in it does not read at once."""


class NixlTransport(Transport):
    """Reads peers' memory by NIXL: over RDMA, or by CMA (``process_vm_readv``) on one host.

    NIXL and UCX have neither access control nor encryption: a peer that connects can read all of
    ``memory``, offered or not. ``memory`` is registered as one span until :meth:`close`.
    """

    def __init__(self, memory: memoryview, host: str, options: NixlOptions | None = None) -> None:
        self._options = options or NixlOptions()
        try:
            self._exported: ctypes.Array[ctypes.c_char] | None = (
                ctypes.c_char * memory.nbytes
            ).from_buffer(memory)
        except (TypeError, ValueError) as error:
            raise TransportError(
                f"memory that NIXL can use is writable and whole: {error}"
            ) from error
        slab = Span(ctypes.addressof(self._exported), memory.nbytes)
        asked = environment.asked()
        with environment.loopback_only(host):
            self._agent = Agent(self._options, asked)
            devices = rdma.active_devices() if "UCX" in self._options.backends else ()
        try:
            self._agent.register(slab.address, slab.nbytes)
            self._scratch = Scratch(self._agent)
            self._address = Address(
                agent=self._agent.name,
                metadata=self._agent.metadata(),
                slab=slab,
                nonce=self._scratch.address,
                digest=self._scratch.digest,
                pid=os.getpid(),
                boot_id=cma.boot_id(),
                cma=environment.allows(_CMA),
                rdma=devices,
            )
        except BaseException:
            self._agent.close()
            raise
        self._peers = Peers(self._agent)

    def address(self) -> bytes:
        return wire.encode(self._address)

    def offer(self, regions: Sequence[ReadableRegion]) -> bytes:
        wire.check_inside(
            [offered.region for offered in regions], self._address.slab.nbytes, "this process's"
        )
        return wire.encode_offer(regions)

    def withdraw(self, offer: bytes) -> None:
        """Nothing: peers read without asking, so an offer hides and opens nothing."""

    def connect(self, address: bytes, dial: Dial, timeout_s: float) -> Link:
        """``dial`` is not used: NIXL brings its own connections."""
        deadline = time.monotonic() + timeout_s
        theirs = wire.decode_address(address)
        no_cma = self._why_no_cma(theirs)
        self._agent.sweep()
        peer = self._peers.join(theirs)
        try:
            at_once = self._try(peer, deadline)
            how = self._how(theirs, no_cma, at_once)
        except BaseException:
            self._peers.leave(peer)
            raise
        return NixlLink(self._agent, self._peers, peer, self._address.slab, how)

    def serve(self, connection: socket.socket) -> None:
        """Nothing is asked of this side."""
        connection.close()

    def in_flight(self) -> int:
        """Return how many reads NIXL has not ended, after looking at those that timed out."""
        self._agent.sweep()
        return self._agent.in_flight()

    def close(self) -> None:
        self._agent.close()
        self._exported = None

    def _why_no_cma(self, theirs: Address) -> str:
        """Empty if CMA serves, else why not; raises TransportError if nothing else does either."""
        if theirs.agent == self._agent.name:
            raise TransportError("this address is our own")
        if theirs.boot_id != self._address.boot_id:
            why = "it is on another host"
        elif not (theirs.cma and self._address.cma):
            why = f"UCX_TLS leaves it out on {_lacking(self._address.cma, theirs.cma)} side"
        else:
            why = cma.why_not(theirs.pid, theirs.nonce, NONCE_BYTES, theirs.digest)
        if why and not (self._common_rdma(theirs) or self._trusts_backends):
            raise _no_way(why, self._address.rdma, theirs.rdma)
        return why

    def _how(self, theirs: Address, no_cma: str, at_once: bool) -> str:
        """What the bytes went over: only CMA has them there before NIXL's call returns."""
        if at_once and not no_cma:
            return "CMA on one host"
        if self._common_rdma(theirs):
            return f"RDMA ({', '.join(self._address.rdma)})"
        if self._trusts_backends:
            return "UCX over TCP" if "UCX" in self._options.backends else self._options.backends[0]
        why = "the kernel allows it and UCX does not use it"
        raise _no_way(why, self._address.rdma, theirs.rdma)

    def _common_rdma(self, theirs: Address) -> bool:
        return bool(self._address.rdma and theirs.rdma)

    @property
    def _trusts_backends(self) -> bool:
        """Another backend than UCX was chosen for the network that is there."""
        return self._options.allow_tcp or "UCX" not in self._options.backends

    def _try(self, peer: Peer, deadline: float) -> bool:
        """Read the peer's nonce; whether it was there at once, many times in a row. With CMA it is,
        once contact is made; TCP between two quick processes is in time now and then.
        """
        slot = self._scratch.take()
        copy = Copy(self._scratch.address_of(slot), peer.address.nonce, NONCE_BYTES)
        transfer: Transfer | None = None
        at_once = 0
        try:
            for left in reversed(range(_TRIES)):
                transfer = self._agent.read(peer.address.agent, [copy])
                at_once = at_once + 1 if transfer.over else 0
                if not wait(self._agent, transfer, deadline):
                    raise TransferTimeout("the peer did not answer over NIXL in time")
                if at_once == _CONVINCING or at_once + left < _CONVINCING:
                    break
                if not at_once:
                    time.sleep(_CONTACT_S)
            if not self._scratch.holds(slot, peer.address.digest):
                raise TransportError("NIXL read other bytes from the peer than it has")
            return at_once == _CONVINCING
        except TransportError as error:
            if not isinstance(error, TransferTimeout):
                self._peers.lose(peer, error.message)
            raise
        finally:
            self._scratch.give_back(slot, transfer)


def _no_way(no_cma: str, ours: Sequence[str], theirs: Sequence[str]) -> TransportError:
    return TransportError(
        f"no CMA: {no_cma}; no RDMA: {_lacking(ours, theirs)} side has no active device",
        hint="Use the transport tcp, which is faster here than UCX over TCP",
    )


def _lacking(ours: object, theirs: object) -> str:
    return " and ".join(side for side, has in (("this", ours), ("the peer's", theirs)) if not has)
