"""NIXL's Python API: import it, and create agents that do not burn a core."""

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
    """Return the module ``_api`` of the first NIXL that imports. Raises TransportError."""
    reasons = []
    for name in MODULES:
        try:
            api = import_module(f"{name}._api")
        except ImportError as error:  # NIXL, or a library that it needs, is missing
            reasons.append(f"{name}: {error}")
        else:
            _keep_off_stdout(api)
            return api
    raise TransportError(f"NIXL cannot be imported ({'; '.join(reasons)})", hint=why_not())


def failures(api: Any) -> tuple[type[Exception], ...]:
    """Return the classes of NIXL's exceptions, which have no common base."""
    named = (value for name, value in vars(api.nixlBind).items() if name.endswith("Error"))
    kinds = [kind for kind in named if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*kinds, RuntimeError, ValueError, TypeError)


def new_agent(api: Any, name: str, backends: tuple[str, ...], progress_delay_us: int) -> Any:
    """Create a thread-safe agent with a progress thread."""
    config = api.nixl_agent_config(
        enable_prog_thread=True,
        backends=list(backends),
        sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
    )
    with _building, _paced(api, progress_delay_us):
        return api.nixl_agent(name, config)


@contextmanager
def _paced(api: Any, delay_us: int) -> Iterator[None]:
    """Set the progress thread's delay of agents that are created within the context.

    ``nixl_agent`` sets ``pthrDelay`` to 0, which burns a core, and has no parameter for it. The
    context replaces the class of its configuration. A NIXL without that class is left as it is.
    """
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
    """Move NIXL's logging from standard output, where results go, to standard error."""
    logger: logging.Logger | None = getattr(api, "logger", None)
    if logger is not None and "NIXL_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.WARNING)
    while logger is not None:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.stderr)
        logger = logger.parent if logger.propagate else None
