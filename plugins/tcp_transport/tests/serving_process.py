"""Offers four regions of 32 MiB, to one peer."""

from __future__ import annotations

import socket

from lmcache_kit_tcp_transport.transport import TcpTransport
from xxhash import xxh3_64_intdigest

from lmcache_kit.interfaces import ReadableRegion, Region

NBYTES = 32 << 20

memory = memoryview(bytearray(4 * NBYTES))
offered = []
for number in range(4):
    region = Region(number * NBYTES, NBYTES)
    memory[region.offset : region.offset + NBYTES] = bytes([number + 1]) * NBYTES
    offered.append(
        ReadableRegion(region, xxh3_64_intdigest(memory[region.offset : region.offset + NBYTES]))
    )
transport = TcpTransport(memory, "127.0.0.1")
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], transport.offer(offered).hex())
    connection, _ = listener.accept()
    transport.serve(connection)
    print("served")
