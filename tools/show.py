"""Print the steps of a walk-through: commands, replies and progress."""

from __future__ import annotations

import json
import shlex
import socket
import time
from collections.abc import Mapping, Sequence

from rich.console import Console

from tools import stack

START_TIMEOUT_S = 600.0
OPERATION_TIMEOUT_S = 60.0
OPEN_STATES = ("queued", "running")
console = Console(highlight=False, soft_wrap=True)


def step(title: str) -> None:
    """Print the title of a step."""
    console.print(f"\n[bold]{title}[/]")


def start(*ready_urls: tuple[stack.Program, str]) -> None:
    """Start programs at the same time; each is ready when its URL answers."""
    for program, _ in ready_urls:
        console.print(f"[cyan]$ {program.shown()}[/]", markup=True)
        program.start()
    begin = time.monotonic()
    for program, url in ready_urls:
        _wait(program, url, begin)


def curl(url: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
    """Send a GET, or a POST if there is a body; print the curl command and the reply."""
    command = f"curl {url}"
    if body is not None:
        text = shlex.quote(json.dumps(body))
        command = f"curl -X POST {url} -H 'Content-Type: application/json' -d {text}"
    console.print(f"[cyan]$ {command}[/]")
    answer = stack.get(url) if body is None else stack.post(url, body)
    console.print(json.dumps(answer), markup=False)
    return answer


def ended(url: str, answer: Mapping[str, object]) -> str:
    """Wait until the operation in a controller's answer has ended; return its event's URL."""
    event = f"{url}/events/{answer['event_id']}"
    deadline = time.monotonic() + OPERATION_TIMEOUT_S
    while stack.get(event)["state"] in OPEN_STATES and time.monotonic() < deadline:
        time.sleep(0.1)
    return event


def expect(answer: Mapping[str, object], key: str, value: object) -> None:
    """Raise StackError unless the answer has this value."""
    if answer.get(key) != value:
        raise stack.StackError(f"expected {key} to be {value}, not {answer.get(key)}")


def stop(programs: Sequence[stack.Program]) -> None:
    """Stop the programs, and print so. An interrupt kills them at once."""
    try:
        for program in programs:
            if program.process is not None:
                console.print(f"[dim]Stopping {program.name} ...[/]")
            program.stop()
    finally:
        for program in programs:
            program.kill()


def require_free(flags: Mapping[str, int]) -> None:
    """Raise StackError if a port is in use; name the flag that selects another port."""
    for flag, port in flags.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                raise stack.StackError(
                    f"port {port} is in use; end the program that uses it, or choose another: "
                    f'make demo ARGS="{flag} N"'
                ) from None


def _wait(program: stack.Program, ready_url: str, begin: float) -> None:
    shown_s = time.monotonic() - begin

    def plain(elapsed_s: float, line: str) -> None:
        nonlocal shown_s
        if elapsed_s - shown_s >= 10:
            shown_s = elapsed_s
            console.print(f"  ... {elapsed_s:.0f} s: {line[-100:]}", markup=False)

    def ready() -> bool:
        return stack.answers(ready_url)

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
