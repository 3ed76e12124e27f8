"""The main jobs in one go: real vLLM stores its KV in the kit; a controller finds, pins,
compresses it over REST, and moves it from one vLLM to another.

Runs the commands of these walk-throughs one after another, shows each of them so that it can
be repeated by hand, and ends everything that it started.
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
"""All that is cached is the kit's; vLLM says how much. Not compiled, and in float32, it starts in
half the time and computes prompts in a fraction where a CPU has no instructions for bfloat16."""
LINGER = {"LMCACHE_CACHE_LINGER_S": "2"}
PORTS = {
    "--vllm-port": (8000, "port of vLLM"),
    "--vllm-port-2": (8001, "port of the second vLLM"),
    "--port": (9000, "port of the controller"),
    "--monitor-port": (9001, "its monitor port"),
    "--pull-port": (8300, "the first of its two monitor ports for moves"),
    "--reply-port": (8400, "the second one"),
    "--p2p-port": (8200, "port by which others move KV from the first vLLM's cache"),
    "--p2p-port-2": (8202, "the same of the second vLLM"),
}


def main() -> int:
    options = _options()
    try:
        with stack.interruptible():
            show.require_free({flag: getattr(options, _attribute(flag)) for flag in PORTS})
            return _run(options)
    except KeyboardInterrupt:
        console.print("\nInterrupted; everything that the demo started has been ended.")
        return 130
    except stack.StackError as error:
        console.print(f"[bold red]error:[/] {error}", markup=True)
        return 1


def _run(options: argparse.Namespace) -> int:
    logs = Path(tempfile.mkdtemp(prefix="lmcache-kit-demo-"))
    console.print(
        f"Commands are shown as you would type them in {stack.ROOT} with .venv/bin on PATH.\n"
        f"[dim]Logs: {logs}[/]"
    )
    parts = {"lookup": _one_vllm, "move": _two_vllms}
    for name in [options.only] if options.only else parts:
        parts[name](options, logs)
    return 0


def _one_vllm(options: argparse.Namespace, logs: Path) -> None:
    """Lookup, pin, compress and decompress."""
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
    """Move."""
    monitor = {"pull": options.pull_port, "reply": options.reply_port}
    controller = stack.controller(
        logs / "controller-2.log", port=options.port, monitor_ports=monitor
    )
    vllms = [_mover(options, logs, number) for number in (1, 2)]
    url = f"http://localhost:{options.port}"
    one = Instance("lmcache_instance_1", f"http://localhost:{options.vllm_port}")
    two = Instance("lmcache_instance_2", f"http://localhost:{options.vllm_port_2}")
    try:
        show.step("Start two vLLMs that may give KV to each other, and a controller")
        ready = [(vllm, f"{each.url}/health") for vllm, each in zip(vllms, (one, two), strict=True)]
        show.start((controller, f"{url}/healthz"), *ready)
        tokens = walkthroughs.lookup(url, one)
        walkthroughs.move(url, one, two, tokens)
        walkthroughs.time_to_first_token_after_move(url, one, two)
    finally:
        show.stop((*vllms, controller))


def _mover(options: argparse.Namespace, logs: Path, number: int) -> stack.Program:
    """vLLM number 1 or 2. ``UCX_TLS=rc`` asks for InfiniBand; where there is none, KV goes
    another way."""
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
        "--only", choices=["lookup", "move"], help="the first half, with one vLLM, or the second"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
