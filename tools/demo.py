"""The main job in one go: real vLLM stores its KV in the kit, a controller finds, pins and
compresses it over REST.

Runs the commands of these walk-throughs one after another, shows each of them so that it can
be repeated by hand, and ends everything that it started.
"""

from __future__ import annotations

import argparse
import json
import shlex
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools import stack

CONFIG = stack.ROOT / "examples" / "lookup" / "example.yaml"
PROMPT = "Explain the significance of KV cache in language models."
LONG_PROMPT_TOKENS = 1600
START_TIMEOUT_S = 600.0
OPERATION_TIMEOUT_S = 60.0
INSTANCE = "lmcache_default_instance"
LOCATION = "LocalCPUBackend"
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    options = _options()
    try:
        with stack.interruptible():
            _require_free(options)
            return _run(options)
    except KeyboardInterrupt:
        console.print("\nInterrupted; everything that the demo started has been ended.")
        return 130
    except stack.StackError as error:
        console.print(f"[bold red]error:[/] {error}", markup=True)
        return 1


def _run(options: argparse.Namespace) -> int:
    logs = Path(tempfile.mkdtemp(prefix="lmcache-kit-demo-"))
    controller = stack.controller(
        logs / "controller.log", port=options.port, monitor_port=options.monitor_port
    )
    more = ("--no-enable-prefix-caching", "--enable-prompt-tokens-details", "--enforce-eager")
    settings = {"LMCACHE_CACHE_LINGER_S": "2"}
    if options.monitor_port != 9001:
        settings["LMCACHE_CONTROLLER_URL"] = f"localhost:{options.monitor_port}"
    vllm = stack.vllm_server(
        logs / "vllm.log",
        port=options.vllm_port,
        config_file=CONFIG,
        more=more,
        environment=settings,
    )
    console.print(
        f"Commands are shown as you would type them in {stack.ROOT} with .venv/bin on PATH.\n"
        f"[dim]Logs: {logs}[/]"
    )
    try:
        _step("Start the controller")
        _start(controller, f"http://localhost:{options.port}/healthz")
        _step("Start vLLM with the kit's connector")
        _start(vllm, f"http://localhost:{options.vllm_port}/health")
        tokens = _lookup_walk_through(options)
        _pin_walk_through(options, tokens)
        _compress_walk_through(options, tokens)
        _time_to_first_token(options)
        return 0
    finally:
        for program in (vllm, controller):
            console.print(f"[dim]Stopping {program.name} ...[/]")
            program.stop()


def _lookup_walk_through(options: argparse.Namespace) -> list[int]:
    """Complete, tokenize, look up. Returns the prompt's tokens, all of which were found."""
    vllm_url = f"http://localhost:{options.vllm_port}"
    model = {"model": stack.SERVED_NAME}
    _step("Send a completion")
    _curl(f"{vllm_url}/v1/completions", {**model, "prompt": PROMPT, "max_tokens": 10})
    _step("Tokenize the prompt")
    tokens = _curl(f"{vllm_url}/tokenize", {**model, "prompt": PROMPT})["tokens"]
    if not isinstance(tokens, list):
        raise stack.StackError(f"/tokenize gave no list of tokens: {tokens!r}")
    _step("Ask the controller who holds the KV of these tokens")
    deadline = time.monotonic() + 10
    url = f"http://localhost:{options.port}/lookup"
    while time.monotonic() < deadline and len(stack.post(url, {"tokens": tokens})) < 3:
        time.sleep(0.2)
    answer = _curl(url, {"tokens": tokens})
    _expect(answer, INSTANCE, [LOCATION, len(tokens)])
    return tokens


def _pin_walk_through(options: argparse.Namespace, tokens: list[int]) -> None:
    """Pin, show the pin, unpin."""
    url = f"http://localhost:{options.port}"
    body = {"tokens": tokens, "instance_id": INSTANCE, "location": LOCATION}
    _step("Pin it: it stays, whatever else is evicted")
    _expect(_curl(f"{url}/pin", body), "num_tokens", len(tokens))
    _curl(f"{url}/pins")
    _expect(_curl(f"{url}/unpin", body), "num_tokens", len(tokens))


def _compress_walk_through(options: argparse.Namespace, tokens: list[int]) -> None:
    """Compress, serve from what is compressed, decompress."""
    url = f"http://localhost:{options.port}"
    body = {"instance_id": INSTANCE, "method": "cachegen", "location": LOCATION, "tokens": tokens}
    _step("Compress it with CacheGen")
    _follow(url, _curl(f"{url}/compress", body))
    _step("It is still found, and still serves")
    _expect(_curl(f"{url}/lookup", {"tokens": tokens}), INSTANCE, [LOCATION, len(tokens)])
    warm = stack.stream_completion(f"http://localhost:{options.vllm_port}", PROMPT)
    console.print(f"The same completion took {warm.cached_tokens} tokens from the cache.")
    _step("Decompress it")
    _follow(url, _curl(f"{url}/decompress", body))


def _follow(url: str, answer: dict[str, object]) -> None:
    """Wait for an operation's end, and show it."""
    event = f"{url}/events/{answer['event_id']}"
    deadline = time.monotonic() + OPERATION_TIMEOUT_S
    while stack.get(event)["state"] in {"queued", "running"} and time.monotonic() < deadline:
        time.sleep(0.1)
    _expect(_curl(event), "state", "done")


def _expect(answer: dict[str, object], key: str, value: object) -> None:
    """Raises StackError when the walk-through does not show what it should."""
    if answer.get(key) != value:
        raise stack.StackError(f"expected {key} to be {value}, not {answer.get(key)}")


def _time_to_first_token(options: argparse.Namespace) -> None:
    _step(f"A prompt of about {LONG_PROMPT_TOKENS} tokens: first cold, then from the cache")
    base_url = f"http://localhost:{options.vllm_port}"
    hits = "vllm:external_prefix_cache_hits_total"
    table = Table(
        "round", "cold (s)", "warm (s)", "prompt tokens", "from the cache, by vLLM's count"
    )
    cold_s, warm_s = [], []
    for number in range(3):
        prompt = _long_prompt(base_url, number)
        cold = stack.stream_completion(base_url, prompt)
        before = stack.metric(base_url, hits)
        warm = stack.stream_completion(base_url, prompt)
        counted = int(stack.metric(base_url, hits) - before)
        cold_s.append(cold.ttft_s)
        warm_s.append(warm.ttft_s)
        table.add_row(
            str(number + 1), f"{cold.ttft_s:.3f}", f"{warm.ttft_s:.3f}",
            str(warm.prompt_tokens), str(counted),
        )  # fmt: skip
    console.print(table)
    ratio = statistics.median(cold_s) / statistics.median(warm_s)
    console.print(f"Time to first token: {ratio:.1f} times faster from the cache (medians).")


def _long_prompt(base_url: str, number: int) -> str:
    """Text that tokenizes to about LONG_PROMPT_TOKENS tokens, different for each number."""
    text = f"Reading {number}.\n" + (stack.ROOT / "LICENSE").read_text()
    body: dict[str, object] = {"model": stack.SERVED_NAME, "prompt": text}
    tokens = stack.post(f"{base_url}/tokenize", body)["tokens"]
    assert isinstance(tokens, list)
    body = {"model": stack.SERVED_NAME, "tokens": tokens[:LONG_PROMPT_TOKENS]}
    return str(stack.post(f"{base_url}/detokenize", body)["prompt"])


def _start(program: stack.Program, ready_url: str) -> None:
    console.print(f"[cyan]$ {program.shown()}[/]", markup=True)
    program.start()
    shown_s = 0.0

    def plain(elapsed_s: float, line: str) -> None:
        nonlocal shown_s
        if elapsed_s - shown_s >= 10:
            shown_s = elapsed_s
            console.print(f"  ... {elapsed_s:.0f} s: {line[-100:]}", markup=False)

    def ready() -> bool:
        return stack.answers(ready_url)

    begin = time.monotonic()
    if console.is_terminal:
        with console.status(f"waiting for {program.name}") as status:
            program.wait_until(
                ready,
                timeout_s=START_TIMEOUT_S,
                progress=lambda elapsed_s, line: status.update(
                    f"waiting for {program.name}: {elapsed_s:.0f} s [dim]{line[-80:]}[/]"
                ),
            )
    else:
        program.wait_until(ready, timeout_s=START_TIMEOUT_S, progress=plain)
    console.print(f"{program.name} is ready after {time.monotonic() - begin:.1f} s.")


def _curl(url: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
    """Send it as curl would, POST if there is a body, and show both request and answer."""
    command = f"curl {url}"
    if body is not None:
        text = shlex.quote(json.dumps(body))
        command = f"curl -X POST {url} -H 'Content-Type: application/json' -d {text}"
    console.print(f"[cyan]$ {command}[/]")
    answer = stack.get(url) if body is None else stack.post(url, body)
    console.print(json.dumps(answer), markup=False)
    return answer


def _step(title: str) -> None:
    console.print(f"\n[bold]{title}[/]")


def _require_free(options: argparse.Namespace) -> None:
    flags = {"--vllm-port": options.vllm_port, "--port": options.port,
             "--monitor-port": options.monitor_port}  # fmt: skip
    for flag, port in flags.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                raise stack.StackError(
                    f"port {port} is taken; end what uses it, or choose another: "
                    f'make demo ARGS="{flag} N"'
                ) from None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-port", type=int, default=8000, help="port of vLLM (8000)")
    parser.add_argument("--port", type=int, default=9000, help="port of the controller (9000)")
    parser.add_argument("--monitor-port", type=int, default=9001, help="its monitor port (9001)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
