"""POST /lookup over REST beside a bare aiohttp application, in one run on one machine.

Both return the same constant reply, so the cost of the frontend is measured without the index. The
bare application has one handler, which decodes the body with ``json.loads`` and encodes the reply.
Servers and clients run in two processes; short rounds alternate between the servers. The server's
CPU time per request hardly depends on the load of the machine. The exit status is an error if it
is more than 1.3 times that of the bare handler.

    python benchmarks/rest.py [--seconds 0.5] [--rounds 15] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

TOKENS = (12, 2048)
CLIENTS = (1, 16)
HELD = {"lmcache_default_instance": ["LocalCPUBackend", 12]}
LIMIT = 1.3
"""Largest accepted ratio of CPU time per request to the bare handler."""
REPLY = {"event_id": "0" * 32, **HELD, "layout_info": HELD}


def serve(pipe: Connection) -> None:
    """Run both servers on one event loop; send their ports, and stop on request."""
    asyncio.run(_serve(pipe))


async def _serve(pipe: Connection) -> None:
    from aiohttp import web
    from lmcache_kit_http_api.frontend import HttpFrontend
    from lmcache_kit_http_api.options import HttpOptions

    from lmcache_kit.interfaces.frontend import InstanceMatch, LocationMatch, LookupAnswer

    held = LocationMatch("LocalCPUBackend", 12, "end")
    answer = LookupAnswer("0" * 32, (InstanceMatch("lmcache_default_instance", (held,)),))

    class Constant:
        @property
        def instances(self) -> Constant:
            return self

        def lookup(self, query: object) -> LookupAnswer:
            return answer

        def counters(self) -> dict[str, float]:
            return {}

    async def bare(request: web.Request) -> web.Response:
        await request.json()
        return web.json_response(REPLY)

    app = web.Application(client_max_size=16 * 1024 * 1024)
    app.router.add_post("/lookup", bare)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    frontend = HttpFrontend(Constant(), HttpOptions(host="127.0.0.1", port=0))  # type: ignore[arg-type]
    await frontend.start()
    pipe.send((runner.addresses[0][1], int(frontend.endpoints[0].rpartition(":")[2])))
    while await asyncio.get_running_loop().run_in_executor(None, pipe.recv) == "cpu":
        pipe.send(time.process_time())
    await frontend.stop()
    await runner.cleanup()


async def load(port: int, body: bytes, clients: int, seconds: float) -> list[float]:
    """Send requests over persistent connections; return the seconds of each."""
    head = b"POST /lookup HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    request = head % len(body) + body
    spent: list[float] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (begun := time.perf_counter()) < end:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer.decode())
            length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            spent.append(time.perf_counter() - begun)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return spent


class Round(NamedTuple):
    """Requests per second, median milliseconds, and the server's CPU microseconds per request."""

    rps: float
    p50_ms: float
    cpu_us: float


def one_round(pipe: Connection, port: int, body: bytes, clients: int, seconds: float) -> Round:
    """Load one of the servers for ``seconds``."""
    pipe.send("cpu")
    cpu, begun = pipe.recv(), time.perf_counter()
    spent = asyncio.run(load(port, body, clients, seconds))
    elapsed = time.perf_counter() - begun
    pipe.send("cpu")
    cpu = pipe.recv() - cpu
    return Round(len(spent) / elapsed, statistics.median(spent) * 1e3, cpu / len(spent) * 1e6)


def measure(
    pipe: Connection,
    ports: tuple[int, int],
    tokens: int,
    clients: int,
    seconds: float,
    rounds: int,
) -> dict[str, float]:
    """Compare the servers in alternating rounds.

    A ratio is the median of the rounds' ratios, so both sides saw the same load of the machine.
    """
    body = json.dumps({"tokens": [(i * 7919) % 128_000 for i in range(tokens)]}).encode()
    pairs: list[tuple[Round, Round]] = []
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        done = {each: one_round(pipe, ports[each], body, clients, seconds) for each in order}
        pairs.append((done[0], done[1]))
    bare, ours = (
        Round(*map(statistics.median, zip(*each, strict=True))) for each in zip(*pairs, strict=True)
    )
    return {
        "tokens": tokens,
        "clients": clients,
        "cpu_ratio": round(statistics.median(b.cpu_us / a.cpu_us for a, b in pairs), 2),
        "bare_cpu_us": round(bare.cpu_us, 1),
        "cpu_us": round(ours.cpu_us, 1),
        "rps_ratio": round(statistics.median(b.rps / a.rps for a, b in pairs), 2),
        "bare_rps": round(bare.rps),
        "rps": round(ours.rps),
        "bare_p50_ms": round(bare.p50_ms, 3),
        "p50_ms": round(ours.p50_ms, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="duration of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there,))
    server.start()
    there.close()  # so that recv() fails if the server does not start
    rows = []
    try:
        ports = here.recv()
        for tokens in TOKENS:
            for clients in CLIENTS:
                rows.append(measure(here, ports, tokens, clients, options.seconds, options.rounds))
                if not options.json:
                    print("  ".join(f"{key}={value}" for key, value in rows[-1].items()))
        here.send("stop")
    finally:
        server.join(10)
    if options.json:
        json.dump({"limit": LIMIT, "rows": rows}, sys.stdout, indent=2)
    worst = max(row["cpu_ratio"] for row in rows)
    if worst > LIMIT:
        sys.exit(f"{worst} times the CPU time of the bare handler; the limit is {LIMIT}")


if __name__ == "__main__":
    main()
