"""What the tests of ``vllm serve`` share."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmcache_kit.config import load_config
from lmcache_kit.protocol.local import Stats
from lmcache_kit.service.launch import open_client
from tools import stack


def eventually(check: Callable[[], object], *, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def long_prompt(subject: str, *, words: int) -> str:
    return " ".join(f"{subject} {number}" for number in range(words // 2))


def tokens_of(vllm_url: str, prompt: str) -> list[int]:
    """The prompt's tokens, by vLLM."""
    body: dict[str, object] = {"model": stack.SERVED_NAME, "prompt": prompt}
    tokens = stack.post(f"{vllm_url}/tokenize", body)["tokens"]
    assert isinstance(tokens, list)
    return tokens


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url) as reply:
        return dict(json.load(reply))


def cache_stats(config: Path, settings: Mapping[str, str]) -> Stats:
    """What an instance's cache process says of itself."""
    environ = {**settings, "LMCACHE_CACHE_PROCESS": "attach"}
    client = open_client(load_config(file=config, environ=environ).config, role="tool")
    try:
        assert client.wait_ready(10)
        return client.stats()
    finally:
        client.close()


def cache_pid(config: Path, settings: Mapping[str, str]) -> int:
    """Process id of an instance's cache process, asked of itself."""
    return cache_stats(config, settings).pid


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def descendants(pid: int) -> list[int]:
    """Process ids of all children, parents before their children."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found
