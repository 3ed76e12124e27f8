"""NIXL's Python API, found, imported, and made to sleep between two looks."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from lmcache_kit.errors import TransportError
from lmcache_kit_nixl_transport.probe import MODULES, why_not

_building = threading.Lock()


def load() -> Any:
    """The module ``_api`` of the first NIXL that imports."""
    reasons = []
    for name in MODULES:
        try:
            api = import_module(f"{name}._api")
        except ImportError as error:  # a library that it needs is missing, or all of it
            reasons.append(f"{name}: {error}")
        else:
            _keep_off_stdout(api)
            return api
    raise TransportError(f"NIXL cannot be imported ({'; '.join(reasons)})", hint=why_not())


def failures(api: Any) -> tuple[type[Exception], ...]:
    """What NIXL raises: its classes have no base of their own."""
    named = (value for name, value in vars(api.nixlBind).items() if name.endswith("Error"))
    kinds = [kind for kind in named if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*kinds, RuntimeError, ValueError, TypeError)


def new_agent(api: Any, name: str, backends: tuple[str, ...], progress_delay_us: int) -> Any:
    """A thread-safe agent that makes progress by itself."""
    config = api.nixl_agent_config(
        enable_prog_thread=True,
        backends=list(backends),
        sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
    )
    with _building, _paced(api, progress_delay_us):
        return api.nixl_agent(name, config)


@contextmanager
def _paced(api: Any, delay_us: int) -> Iterator[None]:
    """``nixl_agent`` sets ``pthrDelay`` to 0, which burns a core; another value gets in only
    through the class that it makes its configuration of. Where that has changed, so be it."""
    bindings = api.nixlBind
    original = getattr(bindings, "nixlAgentConfig", None)
    if original is None or not hasattr(original, "pthrDelay"):
        yield
        return

    def set_attribute(config: Any, name: str, value: Any) -> None:
        original.__setattr__(config, name, delay_us if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = type("Paced", (original,), {"__setattr__": set_attribute})
    try:
        yield
    finally:
        bindings.nixlAgentConfig = original


def _keep_off_stdout(api: Any) -> None:
    """NIXL logs to standard output from INFO on; that is where a program's results go."""
    logger: logging.Logger | None = getattr(api, "logger", None)
    if logger is not None and "NIXL_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.WARNING)
    while logger is not None:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.stderr)
        logger = logger.parent if logger.propagate else None
