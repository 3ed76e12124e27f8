"""Start the programs of a walk-through, wait for them with progress, and end them.

Shared by the demo and the tests of ``vllm serve``.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
SERVED_NAME = "meta-llama/Llama-3.1-8B-Instruct"
"""The name in requests of walk-throughs written for LMCache; the model itself is another."""

VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
STOP_TIMEOUT_S = 30.0


class StackError(Exception):
    """A program did not start, or ended too early."""


@dataclass
class Program:
    """A program in a process group of its own, with its output in a file."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def shown(self) -> str:
        """Return the command as typed in a shell."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        words = [Path(self.command[0]).name, *self.command[1:]]
        shown = " ".join([*settings, *(shlex.quote(word) for word in words)])
        return shown.replace(f"{ROOT}/", "")

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        if self.process is None:
            raise StackError(f"{self.name} was not started")
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_until(
        self,
        ready: Callable[[], bool],
        *,
        timeout_s: float,
        progress: Callable[[float, str], None] = lambda elapsed_s, line: None,
    ) -> None:
        """Poll ``ready``. Raises StackError if the program ends first, or after ``timeout_s``."""
        begin = time.monotonic()
        while not ready():
            elapsed_s = time.monotonic() - begin
            if not self.running:
                code = self.process.returncode if self.process else None
                raise StackError(f"{self.name} ended with exit code {code}:\n{self.tail()}")
            if elapsed_s > timeout_s:
                raise StackError(
                    f"{self.name} is not ready after {timeout_s:.0f} s:\n{self.tail()}"
                )
            progress(elapsed_s, self.last_line())
            time.sleep(0.25)

    def stop(self) -> int | None:
        """Send SIGTERM, then SIGKILL to the whole group; return the exit code."""
        if self.process is None:
            return None
        if self.running:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """Send SIGKILL to the remaining processes of the group."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def last_line(self) -> str:
        tail = self.tail(1)
        return tail.strip()


def program(name: str) -> str:
    """Return the path of a console script beside the running interpreter."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise StackError(f"{path} does not exist. Run `make setup` first")
    return str(path)


def vllm_server(
    log: Path,
    *,
    port: int,
    config_file: Path,
    environment: Mapping[str, str],
    model: Path = MODEL,
    more: tuple[str, ...] = (),
    name: str = "vllm",
) -> Program:
    """Return ``vllm serve`` as in the walk-throughs.

    ``more`` are further flags; ``environment`` overrides the variables set here.
    """
    transfer = json.dumps({"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"})
    command = [
        program("vllm"), "serve", str(model),
        "--served-model-name", SERVED_NAME,
        "--max-model-len", "4096",
        "--gpu-memory-utilization", "0.8",
        "--port", str(port),
        "--kv-transfer-config", transfer,
        *more,
    ]  # fmt: skip
    settings = {
        "PYTHONHASHSEED": "123",
        "CUDA_VISIBLE_DEVICES": "0",
        "LMCACHE_CONFIG_FILE": str(config_file),
    }
    return Program(name, command, log, {**settings, **VLLM_ENVIRONMENT, **environment})


def controller(
    log: Path,
    *,
    port: int,
    monitor_port: int = 9001,
    monitor_ports: Mapping[str, int] | None = None,
) -> Program:
    """Return ``lmcache_controller`` as in the walk-throughs.

    For moves it has two ``monitor_ports``, ``pull`` and ``reply``, instead of one.
    """
    command = [program("lmcache_controller"), "--host", "localhost", "--port", str(port)]
    if monitor_ports is None:
        command += ["--monitor-port", str(monitor_port)]
    else:
        command += ["--monitor-ports", json.dumps(dict(monitor_ports))]
    return Program("lmcache_controller", command, log, {"PYTHONHASHSEED": "123"})


def answers(url: str) -> bool:
    """Return whether a GET of the URL has status 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310 - our own loopback URL
            return int(reply.status) == 200
    except (urllib.error.URLError, OSError, http.client.HTTPException):
        return False


def post(url: str, body: Mapping[str, object], *, timeout_s: float = 300) -> dict[str, Any]:
    """Send JSON by POST; return the JSON reply."""
    request = urllib.request.Request(  # noqa: S310 - our own loopback URL
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:  # noqa: S310
        answer: dict[str, Any] = json.load(reply)
        return answer


def get(url: str) -> dict[str, Any]:
    """Send a GET; return the JSON reply."""
    with urllib.request.urlopen(url, timeout=30) as reply:  # noqa: S310 - our own loopback URL
        answer: dict[str, Any] = json.load(reply)
        return answer


@dataclass(frozen=True)
class Completion:
    """The result of a streamed completion; ``ttft_s`` is its time to first token."""

    text: str
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int


def stream_completion(base_url: str, prompt: str, *, max_tokens: int = 10) -> Completion:
    """Request a greedy completion; ``cached_tokens`` is vLLM's own count."""
    body = {
        "model": SERVED_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    request = urllib.request.Request(  # noqa: S310 - our own loopback URL
        f"{base_url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    text, first_s, usage = "", 0.0, dict[str, Any]()
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as reply:  # noqa: S310
        for event in _events(reply):
            if event["choices"]:
                first_s = first_s or time.perf_counter() - begin
                text += event["choices"][0]["text"]
            usage = event.get("usage") or usage
    details = usage.get("prompt_tokens_details") or {}
    return Completion(text, first_s, usage["prompt_tokens"], details.get("cached_tokens") or 0)


def metric(base_url: str, name: str) -> float:
    """Return the sum of a Prometheus metric over its labels."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=10) as reply:  # noqa: S310
        lines = reply.read().decode().splitlines()
    values = [
        line.rsplit(" ", 1)[1] for line in lines if line.startswith((f"{name}{{", f"{name} "))
    ]
    return sum(float(value) for value in values)


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that ``finally`` blocks end the programs."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for raw in reply:
        line = raw.decode().strip()
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
