"""The transport ``nixl``."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Sequence

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces.transport import Dial, Link, ReadableRegion, Transport
from lmcache_kit_nixl_transport import cma, rdma, ucx_environment, wire
from lmcache_kit_nixl_transport.agent import Agent, Copy
from lmcache_kit_nixl_transport.link import NixlLink
from lmcache_kit_nixl_transport.options import NixlOptions
from lmcache_kit_nixl_transport.peers import Peer, Peers
from lmcache_kit_nixl_transport.pipelined_read import wait_for
from lmcache_kit_nixl_transport.probe_buffers import ProbeBuffers
from lmcache_kit_nixl_transport.transfer import Transfer
from lmcache_kit_nixl_transport.wire import NONCE_BYTES, Address, Span

_CMA = ("cma", "sm", "shm")
_MAX_PROBE_READS = 60
_CMA_READS_IN_A_ROW = 12
_CONTACT_S = 0.002
"""Pause between probes while UCX makes contact, during which reads are never immediate."""


class NixlTransport(Transport):
    """Read peers' memory by NIXL: over RDMA, or over CMA (``process_vm_readv``) on one host.

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
            raise TransportError(f"NIXL needs writable, contiguous memory: {error}") from error
        slab = Span(ctypes.addressof(self._exported), memory.nbytes)
        requested = ucx_environment.requested()
        with ucx_environment.loopback_only(host):
            self._agent = Agent(self._options, requested)
            devices = rdma.active_devices() if "UCX" in self._options.backends else ()
        try:
            self._agent.register(slab.address, slab.nbytes)
            self._probe_buffers = ProbeBuffers(self._agent)
            self._address = Address(
                agent=self._agent.name,
                metadata=self._agent.metadata(),
                slab=slab,
                nonce=self._probe_buffers.address,
                digest=self._probe_buffers.digest,
                pid=os.getpid(),
                boot_id=cma.boot_id(),
                cma=ucx_environment.allows(_CMA),
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
        """Do nothing: peers read without a request, so an offer grants and denies nothing."""

    def connect(self, address: bytes, dial: Dial, timeout_s: float) -> Link:
        """Probe the peer, and connect. NIXL has its own connections: ``dial`` is not used."""
        deadline = time.monotonic() + timeout_s
        remote = wire.decode_address(address)
        cma_refusal = self._cma_refusal(remote)
        self._agent.sweep()
        peer = self._peers.acquire(remote)
        try:
            immediate = self._probe_peer(peer, deadline)
            description = self._describe_path(remote, cma_refusal, immediate)
        except BaseException:
            self._peers.release(peer)
            raise
        return NixlLink(self._agent, self._peers, peer, self._address.slab, description)

    def serve(self, connection: socket.socket) -> None:
        """Close the connection: peers send no requests to this side."""
        connection.close()

    def in_flight(self) -> int:
        """Return how many reads NIXL has not ended, after looking at those that timed out."""
        self._agent.sweep()
        return self._agent.in_flight()

    def close(self) -> None:
        self._agent.close()
        self._exported = None

    def _cma_refusal(self, remote: Address) -> str:
        """Return why CMA cannot be used, or empty. Raises TransportError if no path can."""
        if remote.agent == self._agent.name:
            raise TransportError("the peer's address is this process's own")
        if remote.boot_id != self._address.boot_id:
            why = "it is on another host"
        elif not (remote.cma and self._address.cma):
            why = f"UCX_TLS leaves it out on {_sides_without(self._address.cma, remote.cma)} side"
        else:
            why = cma.read_refusal(remote.pid, remote.nonce, NONCE_BYTES, remote.digest)
        if why and not (self._common_rdma(remote) or self._trusts_backends):
            raise _no_path(why, self._address.rdma, remote.rdma)
        return why

    def _describe_path(self, remote: Address, cma_refusal: str, immediate: bool) -> str:
        """Name the path of the bytes: only CMA delivers them before NIXL's call returns."""
        if immediate and not cma_refusal:
            return "CMA on one host"
        if self._common_rdma(remote):
            return f"RDMA ({', '.join(self._address.rdma)})"
        if self._trusts_backends:
            return "UCX over TCP" if "UCX" in self._options.backends else self._options.backends[0]
        why = "the kernel allows it and UCX does not use it"
        raise _no_path(why, self._address.rdma, remote.rdma)

    def _common_rdma(self, remote: Address) -> bool:
        return bool(self._address.rdma and remote.rdma)

    @property
    def _trusts_backends(self) -> bool:
        """Whether backends may be used without proof of CMA or RDMA."""
        return self._options.allow_tcp or "UCX" not in self._options.backends

    def _probe_peer(self, peer: Peer, deadline: float) -> bool:
        """Read the peer's nonce until CMA is proven or ruled out; return whether it is CMA.

        A read over CMA is finished when NIXL's call returns, once UCX has made contact. Over TCP
        between two fast processes that happens now and then, so twelve in a row are the proof.
        Raises TransportError if the bytes are not the peer's nonce.
        """
        slot = self._probe_buffers.acquire()
        copy = Copy(self._probe_buffers.address_of(slot), peer.address.nonce, NONCE_BYTES)
        transfer: Transfer | None = None
        immediate = 0
        try:
            for left in reversed(range(_MAX_PROBE_READS)):
                transfer = self._agent.read(peer.address.agent, [copy])
                immediate = immediate + 1 if transfer.finished else 0
                if not wait_for(self._agent, transfer, deadline):
                    raise TransferTimeout("the peer did not answer over NIXL in time")
                if immediate == _CMA_READS_IN_A_ROW or immediate + left < _CMA_READS_IN_A_ROW:
                    break
                if not immediate:
                    time.sleep(_CONTACT_S)
            if not self._probe_buffers.holds(slot, peer.address.digest):
                raise TransportError("NIXL read bytes that do not match the peer's digest")
            return immediate == _CMA_READS_IN_A_ROW
        except TransportError as error:
            if not isinstance(error, TransferTimeout):
                self._peers.mark_lost(peer, error.message)
            raise
        finally:
            self._probe_buffers.release(slot, transfer)


def _no_path(cma_refusal: str, local: Sequence[str], remote: Sequence[str]) -> TransportError:
    return TransportError(
        f"no CMA: {cma_refusal}; "
        f"no RDMA: {_sides_without(local, remote)} side has no active device",
        hint="Use the transport tcp, which is faster here than UCX over TCP",
    )


def _sides_without(local: object, remote: object) -> str:
    return " and ".join(side for side, has in (("this", local), ("the peer's", remote)) if not has)
