"""Show the kit at work: a vLLM stores KV; a controller looks it up, pins, compresses and moves it.

Runs the commands of the walk-throughs one after another, prints each so that it can be repeated by
hand, and ends all programs that it started.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tools import show, stack, walkthroughs
from tools.show import console
from tools.walkthroughs import Instance

EXAMPLES = stack.ROOT / "examples"
VLLM_FLAGS = (
    "--no-enable-prefix-caching", "--enable-prompt-tokens-details", "--enforce-eager",
    "--dtype", "float32",
)  # fmt: skip
"""Only the kit caches, and vLLM counts the cached tokens. Without compilation vLLM starts in half
the time; float32 is many times faster than bfloat16 on a CPU that has no instructions for it."""
LINGER = {"LMCACHE_CACHE_LINGER_S": "2"}
PORTS = {
    "--vllm-port": (8000, "port of vLLM"),
    "--vllm-port-2": (8001, "port of the second vLLM"),
    "--port": (9000, "port of the controller"),
    "--monitor-port": (9001, "monitor port of the controller"),
    "--pull-port": (
        8300,
        "first of the controller's two monitor ports for moves",
    ),
    "--reply-port": (8400, "second of the controller's two monitor ports for moves"),
    "--p2p-port": (8200, "port for moves from the first vLLM's cache"),
    "--p2p-port-2": (8202, "port for moves from the second vLLM's cache"),
}


def main() -> int:
    options = _options()
    try:
        with stack.interruptible():
            show.require_free({flag: getattr(options, _attribute(flag)) for flag in PORTS})
            return _run(options)
    except KeyboardInterrupt:
        console.print("\nInterrupted; all programs of the demo have been ended.")
        return 130
    except stack.StackError as error:
        console.print(f"[bold red]error:[/] {error}", markup=True)
        return 1


def _run(options: argparse.Namespace) -> int:
    logs = Path(tempfile.mkdtemp(prefix="lmcache-kit-demo-"))
    console.print(
        f"Run the commands below in {stack.ROOT} with .venv/bin on PATH.\n[dim]Logs: {logs}[/]"
    )
    parts = {"lookup": _one_vllm, "move": _two_vllms}
    for name in [options.only] if options.only else parts:
        parts[name](options, logs)
    return 0


def _one_vllm(options: argparse.Namespace, logs: Path) -> None:
    """Show lookup, pin, compress and decompress on one vLLM."""
    controller = stack.controller(
        logs / "controller.log", port=options.port, monitor_port=options.monitor_port
    )
    settings = dict(LINGER)
    if options.monitor_port != 9001:
        settings["LMCACHE_CONTROLLER_URL"] = f"localhost:{options.monitor_port}"
    vllm = stack.vllm_server(
        logs / "vllm.log",
        port=options.vllm_port,
        config_file=EXAMPLES / "lookup" / "example.yaml",
        more=VLLM_FLAGS,
        environment=settings,
    )
    url = f"http://localhost:{options.port}"
    instance = Instance("lmcache_default_instance", f"http://localhost:{options.vllm_port}")
    try:
        show.step("Start the controller")
        show.start((controller, f"{url}/healthz"))
        show.step("Start vLLM with the kit's connector")
        show.start((vllm, f"{instance.url}/health"))
        tokens = walkthroughs.lookup(url, instance)
        walkthroughs.pin(url, instance, tokens)
        walkthroughs.compress(url, instance, tokens)
        walkthroughs.time_to_first_token(instance)
    finally:
        show.stop((vllm, controller))


def _two_vllms(options: argparse.Namespace, logs: Path) -> None:
    """Show a move from one vLLM to another."""
    monitor = {"pull": options.pull_port, "reply": options.reply_port}
    controller = stack.controller(
        logs / "controller-2.log", port=options.port, monitor_ports=monitor
    )
    vllms = [_vllm_with_moves(options, logs, number) for number in (1, 2)]
    url = f"http://localhost:{options.port}"
    one = Instance("lmcache_instance_1", f"http://localhost:{options.vllm_port}")
    two = Instance("lmcache_instance_2", f"http://localhost:{options.vllm_port_2}")
    try:
        show.step("Start a controller and two vLLMs with moves between their caches")
        ready = [(vllm, f"{each.url}/health") for vllm, each in zip(vllms, (one, two), strict=True)]
        show.start((controller, f"{url}/healthz"), *ready)
        tokens = walkthroughs.lookup(url, one)
        walkthroughs.move(url, one, two, tokens)
        walkthroughs.time_to_first_token_after_move(url, one, two)
    finally:
        show.stop((*vllms, controller))


def _vllm_with_moves(options: argparse.Namespace, logs: Path, number: int) -> stack.Program:
    """Return vLLM number 1 or 2.

    ``UCX_TLS=rc`` requests InfiniBand; without it, moves use another transport.
    """
    first = number == 1
    settings = {"UCX_TLS": "rc", "CUDA_VISIBLE_DEVICES": str(number - 1), **LINGER}
    peer_port = options.p2p_port if first else options.p2p_port_2
    if peer_port != (8200 if first else 8202):
        settings["LMCACHE_P2P_INIT_PORTS"] = str(peer_port)
    if options.pull_port != 8300:
        settings["LMCACHE_CONTROLLER_PULL_URL"] = f"localhost:{options.pull_port}"
    if options.reply_port != 8400:
        settings["LMCACHE_CONTROLLER_REPLY_URL"] = f"localhost:{options.reply_port}"
    return stack.vllm_server(
        logs / f"vllm-{number}.log",
        port=options.vllm_port if first else options.vllm_port_2,
        config_file=EXAMPLES / "move" / f"instance{number}.yaml",
        more=VLLM_FLAGS,
        environment=settings,
        name=f"vllm {number}",
    )


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag, (port, what) in PORTS.items():
        parser.add_argument(flag, type=int, default=port, metavar="N", help=f"{what} ({port})")
    parser.add_argument(
        "--only",
        choices=["lookup", "move"],
        help="only the first half (one vLLM) or the second (two)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
