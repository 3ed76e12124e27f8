"""What the tests of ``vllm serve`` share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lmcache_kit.config import load_config
from lmcache_kit.protocol.local import Stats
from lmcache_kit.service.launch import open_client
from tools import stack


def long_prompt(subject: str, *, words: int) -> str:
    return " ".join(f"{subject} {number}" for number in range(words // 2))


def tokens_of(vllm_url: str, prompt: str) -> list[int]:
    """The prompt's tokens, by vLLM."""
    body: dict[str, object] = {"model": stack.SERVED_NAME, "prompt": prompt}
    tokens = stack.post(f"{vllm_url}/tokenize", body)["tokens"]
    assert isinstance(tokens, list)
    return tokens


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
