"""The walk-throughs of the demo, on programs that already run.

Each function prints its requests as commands, and raises StackError if an answer is not as
expected.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tools import show, stack
from tools.show import console

PROMPT = "Explain the significance of KV cache in language models."
LONG_PROMPT_TOKENS = 1600
ROUNDS = 3
LOCATION = "LocalCPUBackend"
HITS = "vllm:external_prefix_cache_hits_total"
FOUND_TIMEOUT_S = 20.0
VLLM_SPINS_S = 1.2
"""A worker of vLLM polls for a second after its last request, and slows down another vLLM on few
cores. The pause lets the polling end."""


@dataclass(frozen=True)
class Instance:
    """A vLLM server with the kit, and the instance ID of its KV."""

    name: str
    url: str

    @property
    def position(self) -> list[str]:
        return [self.name, LOCATION]

    def complete(self, prompt: str) -> stack.Completion:
        return stack.stream_completion(self.url, prompt)

    def tokens(self, prompt: str) -> list[int]:
        body: dict[str, object] = {"model": stack.SERVED_NAME, "prompt": prompt}
        return _tokens(stack.post(f"{self.url}/tokenize", body))


def lookup(controller: str, instance: Instance) -> list[int]:
    """Complete, tokenize, look up. Return the prompt's tokens, all of which were found."""
    model = {"model": stack.SERVED_NAME}
    show.step("Send a completion")
    show.curl(f"{instance.url}/v1/completions", {**model, "prompt": PROMPT, "max_tokens": 10})
    show.step("Tokenize the prompt")
    tokens = _tokens(show.curl(f"{instance.url}/tokenize", {**model, "prompt": PROMPT}))
    show.step("Ask the controller which instance holds the KV of these tokens")
    _found(controller, instance, tokens)
    answer = show.curl(f"{controller}/lookup", {"tokens": tokens})
    show.expect(answer, instance.name, [LOCATION, len(tokens)])
    return tokens


def pin(controller: str, instance: Instance, tokens: list[int]) -> None:
    """Pin, list the pins, unpin."""
    body = {"tokens": tokens, "instance_id": instance.name, "location": LOCATION}
    show.step("Pin it: pinned chunks are never evicted")
    show.expect(show.curl(f"{controller}/pin", body), "num_tokens", len(tokens))
    show.curl(f"{controller}/pins")
    show.expect(show.curl(f"{controller}/unpin", body), "num_tokens", len(tokens))


def compress(controller: str, instance: Instance, tokens: list[int]) -> None:
    """Compress, serve from the compressed chunks, decompress."""
    body = {
        "instance_id": instance.name,
        "method": "cachegen",
        "location": LOCATION,
        "tokens": tokens,
    }
    show.step("Compress it with CacheGen")
    _follow(controller, show.curl(f"{controller}/compress", body))
    show.step("Look it up and use it in compressed form")
    answer = show.curl(f"{controller}/lookup", {"tokens": tokens})
    show.expect(answer, instance.name, [LOCATION, len(tokens)])
    warm = instance.complete(PROMPT)
    console.print(f"The same completion took {warm.cached_tokens} tokens from the cache.")
    show.step("Decompress it")
    _follow(controller, show.curl(f"{controller}/decompress", body))


def time_to_first_token(instance: Instance) -> None:
    """Measure the effect of the cache on different prompts."""
    show.step(f"A prompt of about {LONG_PROMPT_TOKENS} tokens: first cold, then from the cache")
    table = Table(
        "round", "cold (s)", "warm (s)", "prompt tokens", "from the cache, by vLLM's count"
    )
    cold_s, warm_s = [], []
    for number in range(ROUNDS):
        prompt = _long_prompt(instance, number)
        cold = instance.complete(prompt)
        warm, counted = _counted(instance, prompt)
        cold_s.append(cold.ttft_s)
        warm_s.append(warm.ttft_s)
        table.add_row(
            str(number + 1), f"{cold.ttft_s:.3f}", f"{warm.ttft_s:.3f}",
            str(warm.prompt_tokens), str(counted),
        )  # fmt: skip
    console.print(table)
    _say_ratio(cold_s, warm_s, "from the cache")


def move(controller: str, one: Instance, two: Instance, tokens: list[int]) -> None:
    """Move the KV that ``lookup`` found to the second instance, and use it there."""
    show.step(f"Move it from {one.name} to {two.name}")
    body: dict[str, object] = {
        "old_position": one.position,
        "new_position": two.position,
        "tokens": tokens,
    }
    answer = show.curl(f"{controller}/move", body)
    show.expect(answer, "num_tokens", len(tokens))
    _follow(controller, answer)
    show.step("Look it up: the second instance holds it, the first one does not")
    answer = show.curl(f"{controller}/lookup", {"tokens": tokens})
    show.expect(answer, "layout_info", {two.name: [LOCATION, len(tokens)]})
    show.step(f"The same completion on {two.name}, which has never seen the prompt")
    model = {"model": stack.SERVED_NAME}
    reply = show.curl(f"{two.url}/v1/completions", {**model, "prompt": PROMPT, "max_tokens": 10})
    usage = reply["usage"]
    assert isinstance(usage, dict)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    console.print(
        f"By vLLM's own count {cached} of {len(tokens)} tokens came from moved KV. "
        "It computes the last token in any case."
    )
    show.expect({"cached tokens": cached}, "cached tokens", len(tokens) - 1)


def time_to_first_token_after_move(controller: str, one: Instance, two: Instance) -> None:
    """Measure the effect of a move at its destination on different prompts."""
    show.step(
        f"A prompt of about {LONG_PROMPT_TOKENS} tokens: cold on {one.name}, "
        f"then from moved KV on {two.name}"
    )
    table = Table("round", "cold (s)", "moved", "from moved KV (s)", "by vLLM's count")
    cold_s, warm_s = [], []
    for number in range(ROUNDS):
        prompt = _long_prompt(one, number)
        cold = one.complete(prompt)
        transfer = _moved(controller, one, two, one.tokens(prompt))
        time.sleep(VLLM_SPINS_S)
        warm, counted = _counted(two, prompt)
        cold_s.append(cold.ttft_s)
        warm_s.append(warm.ttft_s)
        table.add_row(
            str(number + 1), f"{cold.ttft_s:.3f}",
            f"{transfer['bytes'] / 2**20:.1f} MiB in {transfer['seconds'] * 1000:.0f} ms "
            f"by {transfer['transport']}",
            f"{warm.ttft_s:.3f}", f"{counted} of {warm.prompt_tokens} tokens",
        )  # fmt: skip
    console.print(table)
    _say_ratio(cold_s, warm_s, "from moved KV")


def _moved(controller: str, one: Instance, two: Instance, tokens: list[int]) -> dict[str, Any]:
    """Move the KV of these tokens; return the event's report of the transfer."""
    _found(controller, one, tokens)
    body: dict[str, object] = {
        "old_position": one.position,
        "new_position": two.position,
        "tokens": tokens,
    }
    event = stack.get(show.ended(controller, stack.post(f"{controller}/move", body)))
    show.expect(event, "state", "done")
    show.expect(event, "num_tokens", len(tokens))
    transfer: dict[str, Any] = event["progress"][0]["transfer"]
    return transfer


def _found(controller: str, instance: Instance, tokens: list[int]) -> None:
    """Wait until lookups find all tokens; the controller's index follows the cache process."""
    deadline = time.monotonic() + FOUND_TIMEOUT_S
    while time.monotonic() < deadline:
        answer = stack.post(f"{controller}/lookup", {"tokens": tokens})
        if answer.get(instance.name) == [LOCATION, len(tokens)]:
            return
        time.sleep(0.1)


def _follow(controller: str, answer: dict[str, object]) -> None:
    """Wait until an operation has ended, and print its event."""
    show.expect(show.curl(show.ended(controller, answer)), "state", "done")


def _counted(instance: Instance, prompt: str) -> tuple[stack.Completion, int]:
    """Return a completion, and the tokens that vLLM's metrics count as external hits."""
    before = stack.metric(instance.url, HITS)
    completion = instance.complete(prompt)
    return completion, int(stack.metric(instance.url, HITS) - before)


def _say_ratio(cold_s: list[float], warm_s: list[float], origin: str) -> None:
    ratio = statistics.median(cold_s) / statistics.median(warm_s)
    console.print(f"Time to first token: {ratio:.1f} times faster {origin} (medians).")


def _long_prompt(instance: Instance, number: int) -> str:
    """Return a text of about LONG_PROMPT_TOKENS tokens, different for each number."""
    text = f"Reading {number}.\n" + (stack.ROOT / "LICENSE").read_text()
    tokens = instance.tokens(text)[:LONG_PROMPT_TOKENS]
    body: dict[str, object] = {"model": stack.SERVED_NAME, "tokens": tokens}
    return str(stack.post(f"{instance.url}/detokenize", body)["prompt"])


def _tokens(answer: dict[str, object]) -> list[int]:
    tokens = answer["tokens"]
    if not isinstance(tokens, list):
        raise stack.StackError(f"/tokenize gave no list of tokens: {tokens!r}")
    return tokens
