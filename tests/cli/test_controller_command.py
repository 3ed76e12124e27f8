"""The command that serves the controller, as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import zmq

from lmcache_kit.protocol.control import Register, WorkerPort, encode
from tests.support import rest
from tests.support.ports import free_ports, taken_port
from tests.support.processes import Program, run, run_python
from tests.support.sites import FakeSite
from tests.support.waiting import DEADLINE_S

pytest.importorskip("lmcache_kit_http_api")

COMMAND = "from lmcache_kit.cli.controller import controller; controller()"
FREE_PORTS = ("--port", "0", "--monitor-port", "0")


class Controller:
    """The running command, and its REST interface."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @property
    def url(self) -> str:
        found = re.search(r"http on (http://\S+:\d+)", self.program.ready)
        assert found, (self.program.ready, self.program.errors())
        return found[1]

    def get(self, path: str) -> int:
        return rest.ask(self.url + path)[0]

    def lookup(self, tokens: list[int], **headers: str) -> int:
        return self.ask("/lookup", {"tokens": tokens}, **headers)[0]

    def ask(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        """Return status and document of the answer to a POST."""
        return rest.ask(self.url + path, body, headers)

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal; return exit code and standard error."""
        return self.program.exit_code(number), self.program.errors()


Start = Callable[..., Controller]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the command; whatever still runs at the end is killed."""
    with contextlib.ExitStack() as stack:

        def run(*arguments: str, code: str = COMMAND, **variables: str) -> Controller:
            command = (sys.executable, "-c", code, *arguments)
            return Controller(stack.enter_context(Program(*command, environ=variables)))

        yield run


def refused(arguments: Sequence[str], *, code: str = COMMAND, **variables: str) -> tuple[int, str]:
    """Exit code and stderr of a command that does not start."""
    done = run(sys.executable, "-c", code, *arguments, environ=variables)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.fixture(name="taken_port")
def taken_port_fixture() -> Iterator[int]:
    with taken_port() as port:
        yield port


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_serves_and_ends_on_a_signal(start, number):
    running = start(*FREE_PORTS)
    assert re.fullmatch(
        r"lmcache_controller: http on http://localhost:\d+; "
        r"cache processes on tcp://127.0.0.1:\d+; Ctrl-C stops\n",
        running.program.ready,
    )
    assert running.get("/healthz") == 200
    assert running.lookup([1, 2, 3]) == 200
    assert running.stop(number) == (0, "")


def test_it_ends_although_a_request_is_in_flight(start):
    running = start(*FREE_PORTS)
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"POST /lookup HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        assert running.get("/healthz") == 200
        assert running.stop(signal.SIGTERM)[0] == 0


def test_whoever_waits_for_a_worker_is_told_that_it_stops(start):
    running = start(*FREE_PORTS)
    monitor = re.search(r"tcp://\S+:\d+", running.program.ready)
    register = Register(
        instance_id="mute",
        incarnation=bytes(16),
        started=time.time(),
        host="127.0.0.1",
        heartbeat_s=10.0,
        locations=("LocalCPUBackend",),
        workers=(WorkerPort(0, 8001),),
        namespaces=(),
    )
    with zmq.Context() as context, context.socket(zmq.DEALER) as mute:
        mute.setsockopt(zmq.LINGER, 0)
        mute.connect(monitor[0])
        mute.send(encode(register))
        mute.recv()
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(running.ask, "/health", {"instance_id": "mute"})
            mute.recv()
            assert running.stop(signal.SIGTERM)[0] == 0
            status, reply = asked.result(DEADLINE_S)
    assert status == 503
    assert reply["error"]["message"] == "the controller is stopping"


def test_a_taken_port_is_named_with_the_flag_to_change_it(taken_port):
    code, told = refused(["--port", str(taken_port), "--monitor-port", "0"])
    assert code == 1
    assert f"127.0.0.1:{taken_port} for http: Address already in use" in told
    assert "Choose another port with --port" in told


def test_a_taken_monitor_port_is_named_with_the_flag_to_change_it(taken_port):
    code, told = refused(["--port", "0", "--monitor-port", str(taken_port)])
    assert code == 1
    assert f"port {taken_port} on localhost is taken" in told
    assert "another with --monitor-port" in told


def test_a_host_that_is_not_ours_is_named_with_the_flag_to_change_it():
    code, told = refused(["--host", "192.0.2.1", "--insecure", *FREE_PORTS])
    assert code == 1
    assert "cannot listen on port 0 of 192.0.2.1" in told
    assert "with --host" in told


def test_a_frontend_that_is_not_installed_says_what_to_install():
    without = "import importlib_metadata as m; m.distributions = lambda **kwargs: []; " + COMMAND
    code, told = refused(FREE_PORTS, code=without)
    assert code == 2
    assert told == ("Error: no frontend 'http' is installed. pip install lmcache-kit-http-api\n")


def test_an_unknown_frontend_lists_those_that_are_installed():
    code, told = refused(["--frontend", "grpc", *FREE_PORTS])
    assert code == 2
    assert re.search(r"no frontend 'grpc' is installed.*Installed: .*http", told)


def test_the_network_without_a_token_is_refused_with_the_remedy():
    code, told = refused(["--host", "0.0.0.0", *FREE_PORTS])
    assert code == 2
    assert "without a token" in told
    assert "--insecure" in told


def test_the_network_on_purpose_is_warned_about_the_monitor_port(taken_port):
    code, told = refused(
        ["--host", "0.0.0.0", "--insecure", "--port", "0", "--monitor-port", str(taken_port)]
    )
    assert code == 1
    assert "the monitor port is open to the network" in told
    assert f"port {taken_port} on 0.0.0.0 is taken" in told


def test_the_token_comes_from_the_environment(start):
    running = start(*FREE_PORTS, LMCACHE_KIT_TOKEN="s3cret")
    assert running.lookup([1]) == 401
    assert running.lookup([1], Authorization="Bearer s3cret") == 200
    assert running.get("/healthz") == 200


def test_the_token_of_a_file_goes_before_the_environment(start, tmp_path):
    file = tmp_path / "token"
    file.write_text("from-file\n")
    running = start("--token-file", str(file), *FREE_PORTS, LMCACHE_KIT_TOKEN="s3cret")
    assert running.lookup([1], Authorization="Bearer s3cret") == 403
    assert running.lookup([1], Authorization="Bearer from-file") == 200


def test_an_empty_token_file_is_no_open_door(tmp_path):
    file = tmp_path / "token"
    file.write_text("\n")
    code, told = refused(["--token-file", str(file), *FREE_PORTS])
    assert (code, told) == (2, f"Error: --token-file {file} is empty. Write the token into it\n")


def test_a_bad_token_is_refused_without_being_shown():
    code, told = refused(FREE_PORTS, LMCACHE_KIT_TOKEN="two words")
    assert code == 2
    assert "frontend http, option 'token'" in told
    assert "two words" not in told


def test_monitor_ports_as_lmcache_writes_them_are_all_served(start):
    pull, reply = free_ports(2)
    ports = json.dumps({"pull": pull, "reply": reply})
    running = start("--port", "0", "--monitor-ports", ports)
    assert f"on tcp://127.0.0.1:{pull}, tcp://127.0.0.1:{reply};" in running.program.ready


def test_monitor_port_and_monitor_ports_may_stand_together(start):
    one, pull = free_ports(2)
    running = start(
        "--port", "0", "--monitor-port", str(one), "--monitor-ports", json.dumps({"pull": pull})
    )
    assert f"on tcp://127.0.0.1:{one}, tcp://127.0.0.1:{pull};" in running.program.ready


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("9001", "write it as"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "write it as"),
        ('{"pul": 1}', "unknown name 'pul'; known: pull, reply, heartbeat"),
        ('{"pull": true}', "pull: True is no port"),
        ('{"pull": 70000}', "pull: 70000 is no port"),
    ],
)
def test_monitor_ports_that_are_none_are_refused(written, told):
    code, shown = refused(["--monitor-ports", written])
    assert code == 2
    assert told in shown


def test_an_option_of_a_frontend_reaches_it(start):
    running = start("--frontend-option", "http.max_tokens=2", *FREE_PORTS)
    assert running.lookup([1, 2]) == 200
    assert running.lookup([1, 2, 3]) == 422


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("http.max_tokens=many", "frontend http, option 'max_tokens'"),
        ("http.colour=red", "Options: host, port, token"),
        ("max_tokens=2", "is not NAME.KEY=VALUE"),
        ("grpc.x=2", "Served: http"),
    ],
)
def test_a_wrong_option_of_a_frontend_is_named(option, told):
    code, shown = refused(["--frontend-option", option, *FREE_PORTS])
    assert code == 2
    assert told in shown


def test_neither_torch_nor_vllm_is_imported(start):
    code = (
        "import atexit, sys; atexit.register(lambda: print("
        "*{'torch', 'vllm', 'numpy', 'numba'} & set(sys.modules), file=sys.stderr)); " + COMMAND
    )
    running = start(*FREE_PORTS, code=code)
    assert running.stop(signal.SIGTERM) == (0, "\n")


def test_the_help_shows_an_example():
    shown = run_python(COMMAND, "--help")
    assert "lmcache_controller --host localhost --port 9000 --monitor-port 9001" in shown
    assert "curl -X POST http://localhost:9000/lookup" in shown


ROUTES = """
@hookimpl
def register_routes():
    return [RouteSpec("count", "acme_count_api:count", "Count workers", method="GET",
                      path="{path}", reply="acme_count_api:Count")]
"""
ROUTES_API = """
from pydantic import BaseModel

class Count(BaseModel):
    workers: int

async def count(controller, request):
    return Count(workers=len(controller.instances.workers()))
"""


def with_routes(site: FakeSite, path: str, api: str = ROUTES_API) -> dict[str, str]:
    """Install a plugin with a route; returns the environment in which it is found."""
    site.install("acme-count", ROUTES.format(path=path))
    site.module("acme_count_api", api)
    return {"PYTHONPATH": f"{site.folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def test_it_serves_the_routes_of_plugins(start, site):
    running = start(*FREE_PORTS, **with_routes(site, "/acme/count"))
    assert rest.ask(f"{running.url}/acme/count") == (200, {"workers": 0})


def test_a_route_that_is_built_in_ends_the_start(site):
    code, told = refused(FREE_PORTS, **with_routes(site, "/lookup"))
    assert code == 2
    assert "route GET /lookup of plugin 'acme_count' of acme-count collides with" in told
    assert "POST /lookup of the frontend http" in told


def test_a_plugin_whose_route_is_broken_is_a_warning(start, site):
    running = start(*FREE_PORTS, **with_routes(site, "/acme/count", "1 / 0"))
    assert running.lookup([1]) == 200
    assert rest.ask(f"{running.url}/acme/count")[0] == 404
    code, told = running.stop(signal.SIGTERM)
    assert code == 0
    assert "route 'count': PluginBroken:" in told
