"""Run a program of ours that dies, or stops, at one step of a move:

    python faulty.py STEP ACTION PROGRAM ARGUMENTS...

STEP is one of STEPS, ACTION is ``kill``, ``abort`` or ``stop`` (SIGSTOP); it happens once.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class Step(NamedTuple):
    """A public method of a role in the move, and when the fault happens: before or after its
    ``nth`` call, or ``delay_s`` after that."""

    target: str
    when: str
    nth: int = 1
    delay_s: float = 0.0


_SESSION = "lmcache_kit.peer.move_server:MoveSession"
_TRANSFERS = "lmcache_kit.cache.memory.transfers:Transfers"
_TIER = "lmcache_kit.cache.tier:Tier"
_CLIENT = "lmcache_kit.peer.source_client:SourceClient"
_MOVE = "lmcache_kit.peer.move_executor:RunningMove"
_AGENT = "lmcache_kit.agent.agent:Agent"

SOURCE_STEPS = {
    "asked": Step(f"{_SESSION}.welcome", "before"),
    "welcomed": Step(f"{_SESSION}.answer", "before"),
    "leased": Step(f"{_SESSION}.lease", "after"),
    "offered": Step(f"{_SESSION}.offer", "after"),
    "being read": Step(f"{_SESSION}.offer", "after", delay_s=0.003),
    "released": Step(f"{_SESSION}.release", "before"),
    "to delete": Step(f"{_TIER}.delete", "before"),
}
DELETED = {"has deleted": Step(f"{_TIER}.delete", "after")}
GOAL_STEPS = {
    "to ask": Step(f"{_MOVE}.open", "before"),
    "accepted": Step(f"{_MOVE}.accept", "after"),
    "room made": Step(f"{_TRANSFERS}.reserve", "after"),
    "reading": Step(f"{_CLIENT}.lease", "after", delay_s=0.003),
    "first landed": Step(f"{_TRANSFERS}.commit", "after"),
    "most landed": Step(f"{_TRANSFERS}.commit", "after", nth=7),
    "to release": Step(f"{_CLIENT}.release", "before"),
    "to confirm": Step(f"{_AGENT}.confirm", "before"),
    "confirmed": Step(f"{_AGENT}.confirm", "after"),
    "to have it deleted": Step(f"{_CLIENT}.delete", "before"),
}
STEPS = {**SOURCE_STEPS, **DELETED, **GOAL_STEPS}
_SIGNALS = {"abort": signal.SIGABRT, "kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def arm(step: Step, number: signal.Signals) -> None:
    """Have it happen."""
    module, _, path = step.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def fault() -> None:
        if step.delay_s:
            threading.Timer(step.delay_s, os.kill, (os.getpid(), number)).start()
        else:  # sent to this thread, which so does nothing more before it takes effect
            signal.pthread_kill(threading.get_ident(), number)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == step.nth
        if due and step.when == "before":
            fault()
        result = original(*args, **kwargs)
        if due and step.when == "after":
            fault()
        return result

    setattr(owner, name, faulty)


if __name__ == "__main__":
    arm(STEPS[sys.argv[1]], _SIGNALS[sys.argv[2]])
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
