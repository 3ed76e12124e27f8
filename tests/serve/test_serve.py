"""One real ``vllm serve`` with the walk-through's flags, its controller, and what kills them.

The tests build on each other: starting vLLM takes most of a minute on a small machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_kit.errors import CacheUnavailable
from tests.serve.helpers import cache_pid, long_prompt, tokens_of
from tests.support import rest
from tests.support.ports import free_ports
from tests.support.processes import alive, descendants, freeze
from tests.support.waiting import eventually
from tools import stack

pytestmark = pytest.mark.vllm

PROMPT = "Explain the significance of KV cache in language models."
INSTANCE = "lmcache_default_instance"
PLACE: dict[str, object] = {"instance_id": INSTANCE, "location": "LocalCPUBackend"}
HEARTBEAT_S = 0.5
LINGER_S = 300


class Site:
    """The walk-through's programs on free ports."""

    def __init__(self, folder: Path) -> None:
        self.vllm_port, self.port, self.monitor_port = free_ports(3)
        self.config = folder / "example.yaml"
        text = (stack.ROOT / "examples" / "lookup" / "example.yaml").read_text()
        text = text.replace("localhost:9001", f"localhost:{self.monitor_port}")
        self.config.write_text(text.replace("max_local_cpu_size: 5", "max_local_cpu_size: 1"))
        self.settings = {
            "LMCACHE_CACHE_SOCKET": str(folder / "cache.sock"),
            "LMCACHE_CACHE_LINGER_S": str(LINGER_S),
            "LMCACHE_LMCACHE_WORKER_HEARTBEAT_TIME": str(HEARTBEAT_S),
        }
        self.folder = folder
        self.vllm = self.new_vllm()
        self.controller = self.new_controller()

    @property
    def vllm_url(self) -> str:
        return f"http://localhost:{self.vllm_port}"

    def new_vllm(self) -> stack.Program:
        more = (
            "--no-enable-prefix-caching", "--enable-prompt-tokens-details", "--enforce-eager",
            "--dtype", "float32",
        )  # fmt: skip
        log = self.folder / "vllm.log"
        environment = {**self.settings, "OMP_NUM_THREADS": "1", "VLLM_SERVER_DEV_MODE": "1"}
        return stack.vllm_server(
            log, port=self.vllm_port, config_file=self.config, more=more, environment=environment
        )

    def new_controller(self) -> stack.Program:
        log = self.folder / "controller.log"
        return stack.controller(log, port=self.port, monitor_port=self.monitor_port)

    def start_vllm(self) -> None:
        self.vllm.start()
        self.vllm.wait_until(lambda: stack.answers(f"{self.vllm_url}/health"), timeout_s=300)

    def start_controller(self) -> None:
        self.controller.start()
        url = f"http://localhost:{self.port}/healthz"
        self.controller.wait_until(lambda: stack.answers(url), timeout_s=60)

    def complete(self, prompt: str) -> stack.Completion:
        return stack.stream_completion(self.vllm_url, prompt)

    def tokens(self, prompt: str) -> list[int]:
        return tokens_of(self.vllm_url, prompt)

    def post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        """Ask the controller."""
        return stack.post(f"http://localhost:{self.port}{path}", body)

    def lookup(self, tokens: list[int]) -> dict[str, object]:
        return self.post("/lookup", {"tokens": tokens})

    def ended(self, event_id: str) -> dict[str, Any]:
        """The event, once it has ended."""
        body: dict[str, object] = {"event_id": event_id}
        open_states = ("queued", "running")
        eventually(
            lambda: self.post("/check_finish", body)["status"] not in open_states, timeout_s=120
        )
        return self.get(f"/events/{event_id}")

    def get(self, path: str) -> dict[str, Any]:
        """Ask the controller."""
        status, document = rest.ask(f"http://localhost:{self.port}{path}")
        assert status == 200, document
        return dict(document)

    def cache_pid(self) -> int:
        """Process id of the cache process, asked of itself."""
        return cache_pid(self.config, self.settings)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("serve"))
    try:
        yield site
    finally:
        pid = None
        with contextlib.suppress(CacheUnavailable, AssertionError):
            pid = site.cache_pid()
        site.vllm.stop()
        site.controller.stop()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)


def test_vllm_serves_and_caches_before_there_is_a_controller(site: Site) -> None:
    site.start_vllm()
    cold = site.complete(PROMPT)
    warm = site.complete(PROMPT)
    assert cold.cached_tokens == 0
    assert warm.cached_tokens == cold.prompt_tokens - 1


def test_a_controller_that_comes_later_finds_the_prompt_by_itself(site: Site) -> None:
    site.start_controller()
    tokens = site.tokens(PROMPT)
    expected = ["LocalCPUBackend", len(tokens)]
    eventually(lambda: INSTANCE in site.lookup(tokens))
    answer = site.lookup(tokens)
    assert set(answer) == {"event_id", INSTANCE, "layout_info"}
    assert answer[INSTANCE] == expected
    assert answer["layout_info"] == {INSTANCE: expected}


def test_vllm_takes_from_the_cache_what_the_lookup_promised_less_the_last_token(
    site: Site,
) -> None:
    prompt = long_prompt("promise", words=700)
    site.complete(prompt)
    tokens = site.tokens(prompt)
    eventually(lambda: site.lookup(tokens).get(INSTANCE) == ["LocalCPUBackend", len(tokens)])
    assert site.complete(prompt).cached_tokens == len(tokens) - 1


def test_what_is_pinned_outlasts_a_clear_and_a_restart_of_the_controller(site: Site) -> None:
    tokens = site.tokens(PROMPT)
    body = {"tokens": tokens, **PLACE}
    reply = site.post("/pin", body)
    assert reply == {"event_id": reply["event_id"], "num_tokens": len(tokens)}
    cleared = site.post("/clear", PLACE)
    assert cleared["message"] == f"{len(tokens)} tokens stay because they are pinned"
    assert site.complete(PROMPT).cached_tokens == len(tokens) - 1
    site.controller.kill()
    site.controller = site.new_controller()
    site.start_controller()
    eventually(lambda: INSTANCE in site.lookup(tokens))
    assert site.post("/unpin", body)["num_tokens"] == len(tokens)


def test_what_is_compressed_serves_and_is_smaller(site: Site) -> None:
    pytest.importorskip("lmcache_kit_cachegen")
    tokens = site.tokens(PROMPT)
    body = {"method": "cachegen", "tokens": tokens, **PLACE}
    plain = site.complete(PROMPT)
    reply = site.post("/compress", body)
    assert reply == {"event_id": reply["event_id"], "num_tokens": len(tokens)}
    event = site.ended(reply["event_id"])
    assert (event["state"], event["num_tokens"]) == ("done", len(tokens))
    assert event["ratio"] > 2
    assert INSTANCE in site.lookup(tokens)
    served = site.complete(PROMPT)
    assert served.cached_tokens == plain.cached_tokens == len(tokens) - 1
    assert served.text
    back = site.ended(site.post("/decompress", body)["event_id"])
    assert (back["state"], back["num_tokens"]) == ("done", len(tokens))
    assert site.complete(PROMPT).cached_tokens == len(tokens) - 1


def test_a_killed_controller_stops_nobody_and_comes_back_knowing_all(site: Site) -> None:
    site.controller.kill()
    assert site.complete(long_prompt("alone", words=50)).text
    assert site.complete(PROMPT).cached_tokens > 0
    site.controller = site.new_controller()
    site.start_controller()
    tokens = site.tokens(long_prompt("alone", words=50))
    eventually(lambda: site.lookup(tokens).get(INSTANCE) == ["LocalCPUBackend", len(tokens)])


def test_a_killed_cache_process_costs_its_content_and_nothing_else(site: Site) -> None:
    tokens = site.tokens(PROMPT)
    before = site.cache_pid()
    os.kill(before, signal.SIGKILL)
    assert site.complete(PROMPT).text
    eventually(lambda: site.lookup(tokens).get(INSTANCE) is None or site.cache_pid() != before)
    eventually(lambda: site.complete(PROMPT).cached_tokens == len(tokens) - 1)
    assert site.cache_pid() != before
    eventually(lambda: site.lookup(tokens).get(INSTANCE) == ["LocalCPUBackend", len(tokens)])


def test_a_stopped_cache_process_is_hidden_after_three_heartbeats_and_serving_goes_on(
    site: Site,
) -> None:
    tokens = site.tokens(PROMPT)
    pid = site.cache_pid()
    freeze(pid)
    try:
        assert site.complete(PROMPT).text
        eventually(lambda: INSTANCE not in site.lookup(tokens))
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: INSTANCE in site.lookup(tokens))
    eventually(lambda: site.complete(PROMPT).cached_tokens == len(tokens) - 1)


def test_a_killed_vllm_finds_its_cache_warm_when_it_is_back_within_the_linger(site: Site) -> None:
    text = site.complete(PROMPT).text
    pid = site.cache_pid()
    pinned = site.post("/pin", {"tokens": site.tokens(PROMPT), **PLACE})
    site.vllm.kill()
    site.vllm = site.new_vllm()
    site.start_vllm()
    assert site.cache_pid() == pid
    first = site.complete(PROMPT)
    assert first.cached_tokens == first.prompt_tokens - 1
    assert first.text == text
    (pin,) = site.get("/pins")["pins"]
    assert (pin["pin_id"], pin["num_tokens"]) == (pinned["event_id"], pinned["num_tokens"])


@pytest.mark.parametrize(
    "calls",
    [
        ["/pause?mode=abort", "/resume"],
        ["/pause?mode=wait", "/resume"],
        ["/reset_prefix_cache?reset_external=true"],
    ],
    ids=lambda calls: calls[0],
)
def test_when_vllm_drops_its_cache_nothing_of_before_is_used(site: Site, calls: list[str]) -> None:
    tokens = site.tokens(PROMPT)
    eventually(lambda: site.complete(PROMPT).cached_tokens == len(tokens) - 1)
    for call in calls:
        status, said = rest.ask(f"{site.vllm_url}{call}", b"")
        assert (status, said.get("success", True)) == (200, True), said
    eventually(lambda: INSTANCE not in site.lookup(tokens))
    assert [site.complete(PROMPT).cached_tokens for _ in range(2)] == [0, len(tokens) - 1]
    eventually(lambda: site.lookup(tokens).get(INSTANCE) == ["LocalCPUBackend", len(tokens)])


def test_a_killed_worker_leaves_no_orphan_behind(site: Site) -> None:
    pid = site.cache_pid()
    children = descendants(site.vllm.pid)
    os.kill(children[-1], signal.SIGKILL)
    eventually(lambda: not site.vllm.running, timeout_s=60)
    site.vllm.kill()
    eventually(lambda: not any(alive(child) for child in children))
    assert alive(pid), "the cache process lives on for its linger time"
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not alive(pid))
    assert not (site.folder / "cache.sock").exists()
