"""Controllers on loops of their own, and agents around fake tiers."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

import pytest

from lmcache_kit.agent.agent import Agent
from lmcache_kit.controller.controller import Controller
from lmcache_kit.controller.registry import Registry
from lmcache_kit.interfaces.frontend import LookupQuery
from tests.control.fakes import NAMESPACE, FakeTier

T = TypeVar("T")


class Running:
    """A controller on a thread of its own, so that tests may block."""

    def __init__(self, port: int = 0, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.registry = options.setdefault("registry", Registry())
        self.controller = Controller("localhost", [port], **options)
        try:
            self.run(self.controller.start())
        except BaseException:
            self.close()
            raise
        self.url = self.controller.endpoints[0]
        self.port = int(self.url.rpartition(":")[2])

    def begin(self, work: Awaitable[T]) -> Future[T]:
        async def wrapped() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(wrapped(), self.loop)

    def run(self, work: Awaitable[T], timeout_s: float = 20.0) -> T:
        return self.begin(work).result(timeout_s)

    def call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a function on the controller's loop, as frontends do."""

        async def work() -> T:
            return function(*arguments, **options)

        return self.run(work())

    def held(self, tokens: list[int], **query: Any) -> dict[str, int]:
        """Look tokens up, and return the best match of each instance."""
        answer = self.call(self.controller.instances.lookup, LookupQuery(tokens, **query))
        return {each.instance_id: each.best.tokens for each in answer.instances}

    def counters(self) -> dict[str, float]:
        return dict(self.call(self.controller.counters))

    def close(self) -> None:
        if self._thread.is_alive():
            self.run(self.controller.stop())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


class StartController(Protocol):
    def __call__(self, port: int = 0, **options: Any) -> Running: ...


class StartAgent(Protocol):
    def __call__(
        self, url: str, instance_id: str = "a", **options: Any
    ) -> tuple[Agent, FakeTier]: ...


@pytest.fixture
def start_controller() -> Iterator[StartController]:
    """Start controllers, and stop them at the end. Port 0 takes a free one."""
    with ExitStack() as ending:

        def start(port: int = 0, **options: Any) -> Running:
            running = Running(port, **options)
            ending.callback(running.close)
            return running

        yield start


@pytest.fixture
def controller(start_controller: StartController) -> Running:
    """A controller that serves."""
    return start_controller()


@pytest.fixture
def start_agent() -> Iterator[StartAgent]:
    """Start agents, each with its tier and the tiers ``below`` that, and stop them at the end.

    An agent has rank 0 and one namespace unless ``ranks`` and ``namespaces`` say otherwise.
    """
    with ExitStack() as ending:

        def start(url: str, instance_id: str = "a", **options: Any) -> tuple[Agent, FakeTier]:
            engine = options.pop("engine", None) or FakeTier()
            below = options.pop("below", ())
            ranks = options.pop("ranks", (0,))
            namespaces = options.pop("namespaces", (NAMESPACE,))
            options.setdefault("incarnation", secrets.token_bytes(16))
            options.setdefault("heartbeat_s", 0.1)
            agent = Agent(
                [getattr(engine, "memory_tier", engine), *below],
                url=url,
                instance_id=instance_id,
                **options,
            )
            for rank in ranks:
                agent.register_worker(rank)
            for namespace in namespaces:
                agent.register_namespace(namespace)
            agent.start()
            ending.callback(agent.stop)
            return agent, engine

        yield start
