"""Registered memory beside the slab for probes: a nonce that peers read, and slots to read into."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from hashlib import sha256

from lmcache_kit.errors import TransportError
from lmcache_kit_nixl_transport.agent import Agent
from lmcache_kit_nixl_transport.transfer import Transfer
from lmcache_kit_nixl_transport.wire import NONCE_BYTES

SLOTS = 8


class ProbeBuffers:
    """A nonce of NONCE_BYTES random bytes, then SLOTS slots of that size for nonces of peers."""

    def __init__(self, agent: Agent) -> None:
        nbytes = NONCE_BYTES * (1 + SLOTS)
        self._memory = mmap.mmap(-1, nbytes)
        self._memory[:NONCE_BYTES] = os.urandom(NONCE_BYTES)
        self.digest = sha256(self._memory[:NONCE_BYTES]).digest()
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._agent = agent
        self._lock = threading.Lock()
        self._taken: dict[int, Transfer | None] = {}
        agent.register(self.address, nbytes)

    def acquire(self) -> int:
        """Take a free slot. Raises TransportError if there is none."""
        with self._lock:
            for slot in range(SLOTS):
                last = self._taken.get(slot)
                if slot not in self._taken or (last is not None and self._agent.settled(last)):
                    self._taken[slot] = None
                    return slot
        raise TransportError(
            f"all {SLOTS} slots for new connections are in use", hint="Connect again later"
        )

    def address_of(self, slot: int) -> int:
        return self.address + NONCE_BYTES * (1 + slot)

    def holds(self, slot: int, digest: bytes) -> bool:
        """Whether the slot's bytes have this SHA-256."""
        start = NONCE_BYTES * (1 + slot)
        return sha256(self._memory[start : start + NONCE_BYTES]).digest() == digest

    def release(self, slot: int, last: Transfer | None) -> None:
        """Free the slot, once the transfer ``last`` can no longer write to it."""
        with self._lock:
            if last is None or last.finished:
                del self._taken[slot]
            else:
                last.abandoned = True
                self._taken[slot] = last
