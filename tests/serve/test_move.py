"""The walk-through of moves between two real ``vllm serve``, and caches that abort meanwhile.

The tests share one pair of servers, and each works on prompts of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lmcache_kit.config import load_config
from lmcache_kit.errors import CacheUnavailable
from lmcache_kit.process import paths
from tests.serve.helpers import cache_pid, cache_stats, long_prompt, tokens_of
from tests.support import rest
from tests.support.ports import free_ports
from tests.support.processes import alive
from tests.support.waiting import eventually
from tools import stack

pytestmark = pytest.mark.vllm

PROMPT = "Explain the significance of KV cache in language models."
LOCATION = "LocalCPUBackend"
BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 4
OPEN_STATES = ("queued", "running")


class Instance:
    """vLLM number 1 or 2 of the walk-through, on a free port. Chunks of a long prompt take
    several windows of a move."""

    def __init__(self, number: int, folder: Path, ports: dict[str, int]) -> None:
        self.name = f"lmcache_instance_{number}"
        self.folder = folder
        self.port, peer_port = free_ports(2)
        self.url = f"http://localhost:{self.port}"
        self.config = folder / f"instance{number}.yaml"
        text = (stack.ROOT / "examples" / "move" / self.config.name).read_text()
        for old, new in {"8300": ports["pull"], "8400": ports["reply"]}.items():
            text = text.replace(f"localhost:{old}", f"localhost:{new}")
        text = re.sub("p2p_init_ports: .*", f"p2p_init_ports: {peer_port}", text)
        self.config.write_text(re.sub("max_local_cpu_size: .*", "max_local_cpu_size: 0.15", text))
        self.socket = folder / f"{number}.sock"
        self.settings = {
            "LMCACHE_CACHE_SOCKET": str(self.socket),
            "LMCACHE_CACHE_LINGER_S": "300",
            "LMCACHE_LMCACHE_WORKER_HEARTBEAT_TIME": "0.5",
        }
        self.vllm = stack.vllm_server(
            folder / f"vllm-{number}.log",
            port=self.port,
            config_file=self.config,
            more=(
                "--no-enable-prefix-caching", "--enable-prompt-tokens-details",
                "--enforce-eager", "--dtype", "float32",
            ),
            environment={
                **self.settings, "UCX_TLS": "rc", "CUDA_VISIBLE_DEVICES": str(number - 1),
                "OMP_NUM_THREADS": "1",
            },
        )  # fmt: skip

    @property
    def position(self) -> list[str]:
        return [self.name, LOCATION]

    def complete(self, prompt: str) -> stack.Completion:
        return stack.stream_completion(self.url, prompt)

    def tokens(self, prompt: str) -> list[int]:
        return tokens_of(self.url, prompt)

    def cache_pid(self) -> int:
        return cache_pid(self.config, self.settings)

    def log(self) -> str:
        """Of the cache process."""
        return paths.beside(self.socket, ".log").read_text()

    def end_cache(self) -> None:
        with contextlib.suppress(CacheUnavailable, AssertionError):
            os.kill(self.cache_pid(), signal.SIGTERM)


class Site:
    """Both, and their controller."""

    def __init__(self, folder: Path) -> None:
        self.port, pull, reply = free_ports(3)
        ports = {"pull": pull, "reply": reply}
        self.one, self.two = (Instance(number, folder, ports) for number in (1, 2))
        self.controller = stack.controller(
            folder / "controller.log", port=self.port, monitor_ports=ports
        )

    def start(self) -> None:
        """As the walk-through does, the controller last."""
        for each in (self.one, self.two):
            each.vllm.start()
        for each in (self.one, self.two):
            health = f"{each.url}/health"
            each.vllm.wait_until(lambda url=health: stack.answers(url), timeout_s=300)
        self.controller.start()
        health = f"http://localhost:{self.port}/healthz"
        self.controller.wait_until(lambda: stack.answers(health), timeout_s=60)
        # Each finds the controller by itself, within seconds.
        eventually(lambda: all(self.knows(each) for each in (self.one, self.two)))

    def stop(self) -> None:
        with ExitStack() as ending:
            for each in (self.one, self.two):
                ending.callback(each.end_cache)
            for each in (self.one.vllm, self.two.vllm, self.controller):
                ending.callback(each.stop)

    def post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        return stack.post(f"http://localhost:{self.port}{path}", body)

    def knows(self, instance: Instance) -> bool:
        try:
            return bool(self.post("/health", {"instance_id": instance.name}))
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return False

    def holders(self, tokens: list[int]) -> dict[str, object]:
        """By instance, the location and how many of them it holds there."""
        return dict(self.post("/lookup", {"tokens": tokens})["layout_info"])

    def begin(
        self, source: Instance, goal: Instance, tokens: list[int], **more: object
    ) -> dict[str, Any]:
        body: dict[str, object] = {
            "old_position": source.position,
            "new_position": goal.position,
            "tokens": tokens,
            **more,
        }
        return self.post("/move", body)

    def event(self, event_id: str) -> dict[str, Any]:
        return self.get(f"/events/{event_id}")

    def get(self, path: str) -> dict[str, Any]:
        status, document = rest.ask(f"http://localhost:{self.port}{path}")
        assert status == 200, document
        return dict(document)

    def events(self) -> dict[str, dict[str, Any]]:
        """By their ids."""
        listed = self.get("/events?limit=1000")["events"]
        return {event["event_id"]: event for event in listed}

    def ended(self, event_id: str) -> dict[str, Any]:
        eventually(lambda: self.event(event_id)["state"] not in OPEN_STATES, timeout_s=30)
        return self.event(event_id)

    def move(
        self, source: Instance, goal: Instance, tokens: list[int], **more: object
    ) -> dict[str, Any]:
        """Move, and wait for the end."""
        return self.ended(self.begin(source, goal, tokens, **more)["event_id"])

    def stored(self, instance: Instance, prompt: str) -> tuple[stack.Completion, list[int]]:
        """Have the instance alone compute and store a prompt of which nobody has seen the first
        word."""
        cold, tokens = instance.complete(prompt), instance.tokens(prompt)
        assert cold.cached_tokens == 0
        whole = {instance.name: [LOCATION, len(tokens)]}
        eventually(lambda: self.holders(tokens) == whole)
        return cold, tokens


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("move"))
    try:
        site.start()
        yield site
    finally:
        site.stop()


def test_the_walk_through_moves_the_prompt_and_the_second_vllm_serves_it(site: Site) -> None:
    one, two = site.one, site.two
    cold, tokens = site.stored(one, PROMPT)
    reply = site.begin(one, two, tokens)
    assert reply == {"event_id": reply["event_id"], "num_tokens": len(tokens)}
    event = site.ended(reply["event_id"])
    assert (event["operation"], event["state"], event["num_tokens"], event["message"]) == (
        "move", "done", len(tokens), "",
    )  # fmt: skip
    assert (event["old_position"], event["new_position"]) == (one.position, two.position)
    [progress] = event["progress"]
    assert (progress["instance_id"], progress["chunks_done"], progress["chunks"]) == (
        two.name,
        1,
        1,
    )
    assert progress["transfer"]["bytes"] == len(tokens) * BYTES_PER_TOKEN
    eventually(lambda: site.holders(tokens) == {two.name: [LOCATION, len(tokens)]})
    hits = stack.metric(two.url, "vllm:external_prefix_cache_hits_total")
    served = two.complete(PROMPT)
    assert served.cached_tokens == len(tokens) - 1
    assert stack.metric(two.url, "vllm:external_prefix_cache_hits_total") - hits == len(tokens) - 1
    assert served.text == cold.text


def test_without_infiniband_ucx_tls_rc_falls_back_to_tcp_and_says_why(site: Site) -> None:
    if list(Path("/sys/class/infiniband").glob("*")):
        pytest.skip("there is InfiniBand here")
    _, tokens = site.stored(site.one, "Another way than was asked for.")
    transfer = site.move(site.one, site.two, tokens)["progress"][0]["transfer"]
    assert transfer["transport"] == "tcp"
    assert re.search("not nixl: .*UCX_TLS=rc", transfer["how"])
    for each in (site.one, site.two):
        assert re.search("WARNING .*nixl cannot be used here: .*UCX_TLS=rc", each.log())


def test_a_long_prompt_is_served_from_moved_kv_as_if_it_had_been_computed(site: Site) -> None:
    prompt = long_prompt("far", words=300)
    cold, tokens = site.stored(site.one, prompt)
    assert site.move(site.one, site.two, tokens)["state"] == "done"
    served = site.two.complete(prompt)
    assert (served.cached_tokens, served.text) == (len(tokens) - 1, cold.text)
    # vLLM counts tokens whose load fails, and then computes them: no load has failed.
    stats = cache_stats(site.two.config, site.two.settings).values
    assert (stats["moved_in_chunks_total"] >= 3, stats["corrupt_total"]) == (True, 0)


def test_a_copy_serves_at_both(site: Site) -> None:
    prompt = "Copies are as good as what they were made from."
    cold, tokens = site.stored(site.two, prompt)
    assert site.move(site.two, site.one, tokens, copy=True)["state"] == "done"
    place = [LOCATION, len(tokens)]
    assert site.holders(tokens) == {site.one.name: place, site.two.name: place}
    for each in (site.one, site.two):
        served = each.complete(prompt)
        assert (served.cached_tokens, served.text) == (len(tokens) - 1, cold.text)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_a_cache_that_aborts_inside_a_move_costs_vllm_nothing(site: Site, end: str) -> None:
    one, two = site.one, site.two
    victim = one if end == "source" else two
    prompt = long_prompt(end, words=400)
    cold, tokens = site.stored(one, prompt)
    before = victim.cache_pid()
    event_id = aborted_inside(site, tokens, before)
    event = site.ended(event_id)
    assert event["state"] in {"failed", "partial"}
    assert event["message"]
    for each in (one, two):
        assert each.complete(prompt).text == cold.text
        assert each.vllm.running
    assert not alive(before)
    eventually(lambda: victim.complete(prompt).cached_tokens == len(tokens) - 1)
    assert victim.cache_pid() != before
    eventually(lambda: site.holders(tokens).get(victim.name) == [LOCATION, len(tokens)])
    survivor = two if victim is one else one
    assert site.move(victim, survivor, tokens)["state"] == "done"
    served = survivor.complete(prompt)
    assert (served.cached_tokens, served.text) == (len(tokens) - 1, cold.text)


def test_between_caches_on_one_host_nixl_reads_memory_directly(site: Site) -> None:
    one, two = site.one, site.two
    with served_by_hand(one), served_by_hand(two):
        for each in (one, two):
            eventually(lambda each=each: each.complete("Is it there?").cached_tokens > 0)
        prompt = long_prompt("near", words=300)
        cold, tokens = site.stored(one, prompt)
        event = site.move(one, two, tokens)
        transfer = event["progress"][0]["transfer"]
        assert (event["state"], transfer["transport"]) == ("done", "nixl")
        assert transfer["how"] == "CMA on one host"
        served = two.complete(prompt)
        assert (served.cached_tokens, served.text) == (len(tokens) - 1, cold.text)


def aborted_inside(site: Site, tokens: list[int], victim: int) -> str:
    """Begin a move from the first instance to the second; SIGABRT to a process when some chunks
    have come and others have not. The event's id."""
    for _ in range(20):
        if event_id := slow_move(site, tokens, victim):
            return event_id
        assert site.move(site.two, site.one, tokens)["state"] == "done"
    raise AssertionError("every move was over before it could be interrupted")


def slow_move(site: Site, tokens: list[int], victim: int) -> str:
    """The event's id, or empty when it was over before anybody saw it half done.

    The source runs for a moment at a time, so that progress can be seen.
    """
    source, others = site.one.cache_pid(), set(site.events())
    asking = threading.Thread(target=site.begin, args=(site.one, site.two, tokens))
    asking.start()
    try:
        while True:
            os.kill(source, signal.SIGCONT)
            time.sleep(0.001)
            os.kill(source, signal.SIGSTOP)
            time.sleep(0.15)  # progress is told ten times a second
            events = site.events()
            for event_id in events.keys() - others:
                for progress in events[event_id]["progress"]:
                    if 0 < progress["chunks_done"] < progress["chunks"]:
                        os.kill(victim, signal.SIGABRT)
                        return event_id
                if events[event_id]["state"] not in OPEN_STATES:
                    return ""
    finally:
        os.kill(source, signal.SIGCONT)
        asking.join()


@contextlib.contextmanager
def served_by_hand(instance: Instance) -> Iterator[None]:
    """Another cache process in the place of the one that vLLM started, without its UCX_TLS."""
    with contextlib.ExitStack() as starting:
        eventually(lambda: starting.enter_context(lock) if (lock := starting_lock(instance)) else 0)
        pid = instance.cache_pid()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not alive(pid))
        command = [stack.program("lmcache-kit"), "cache-server", "--config", str(instance.config)]
        environment = {k: v for k, v in os.environ.items() if k != "UCX_TLS"} | instance.settings
        with (instance.folder / "by-hand.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        eventually(lambda: instance.cache_pid() == process.pid)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def starting_lock(instance: Instance) -> paths.FileLock | None:
    environ = instance.settings
    config = load_config(file=instance.config, environ=environ).config
    return paths.starting_lock(paths.socket_path(config))
