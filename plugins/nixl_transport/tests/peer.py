"""A cache process's memory and transport; does what it is told on the socket it is given."""

from __future__ import annotations

import mmap
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import psutil
from lmcache_kit_nixl_transport.options import NixlOptions
from lmcache_kit_nixl_transport.transport import NixlTransport
from xxhash import xxh3_64_intdigest

from lmcache_kit.errors import TransportError
from lmcache_kit.interfaces import ReadableRegion, Region


class Peer:
    def __init__(self, slab_bytes: int, host: str, options: dict) -> None:
        self.slab = mmap.mmap(-1, slab_bytes)
        self.memory = memoryview(self.slab)
        self.transport = NixlTransport(self.memory, host, NixlOptions(**options))

    def address(self) -> bytes:
        return self.transport.address()

    def fill(self, seed: int) -> None:
        np.frombuffer(self.memory, np.uint8)[:] = np.random.default_rng(seed).integers(
            0, 256, len(self.memory), dtype=np.uint8
        )

    def offer(self, regions: list) -> bytes:
        return self.transport.offer(
            [ReadableRegion(Region(*each), self.checksum(*each)) for each in regions]
        )

    def read(self, address: bytes, offer: bytes, into: list) -> None:
        link = self.transport.connect(address, no_dial, 20)
        list(link.read(offer, [Region(*each) for each in into], 20))
        link.close()

    def read_in_threads(self, address: bytes, offer: bytes, sizes: list, times: int) -> list:
        """Four links in four threads, each to a quarter of the slab; the checksums there."""
        quarter = len(self.memory) // 4

        def work(thread: int) -> list:
            at, into = thread * quarter, []
            for size in sizes:
                into.append(Region(at, size))
                at += size
            link = self.transport.connect(address, no_dial, 20)
            for _ in range(times):
                self.memory[into[0].offset : into[0].offset + 8] = bytes(8)
                list(link.read(offer, into, 20))
            link.close()
            return [self.checksum(*region) for region in into]

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(work, range(4)))

    def checksum(self, offset: int, nbytes: int) -> int:
        return xxh3_64_intdigest(self.memory[offset : offset + nbytes])

    def idle_cpu(self, seconds: float) -> float:
        """Seconds of processor time per second."""
        before = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - before) / seconds

    def listens_on(self) -> list[str]:
        connections = psutil.Process(os.getpid()).net_connections("inet")
        return [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]

    def close(self) -> None:
        self.transport.close()
        self.transport.close()
        self.memory.release()
        self.slab.close()


def no_dial(timeout_s: float) -> socket.socket:
    raise AssertionError("NIXL has connections of its own")


def main(fd: int, slab_bytes: int, host: str, options: str) -> None:
    orders = Connection(fd)
    try:
        peer = Peer(slab_bytes, host, msgspec.json.decode(options))
    except TransportError as error:
        orders.send_bytes(msgspec.msgpack.encode({"error": str(error)}))
        return
    orders.send_bytes(msgspec.msgpack.encode({"value": None}))
    while True:
        name, *arguments = msgspec.msgpack.decode(orders.recv_bytes())
        try:
            answer = {"value": getattr(peer, name)(*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        orders.send_bytes(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
