"""Commands to cache processes that are answered at once, such as ``ping``.

No sockets: ``send`` takes a message to a connection, or drops it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

from lmcache_kit.controller.registry import Connection, Process
from lmcache_kit.errors import DeadlineExceeded, NoWorker
from lmcache_kit.protocol.control import Command, FromController, Result

Send: TypeAlias = Callable[[Connection, FromController], None]


class Commands:
    """Commands that wait for their results. Belongs to the controller's event loop."""

    def __init__(self, counts: Counter[str], send: Send) -> None:
        self._counts = counts
        self._send = send
        self._correlations = itertools.count(1)
        self._waiting: dict[int, tuple[Connection, asyncio.Future[Result]]] = {}

    def __len__(self) -> int:
        """Count the commands that wait."""
        return len(self._waiting)

    async def ask(self, process: Process, name: str, timeout_s: float) -> Result:
        """Send a command and wait for its result. Raise DeadlineExceeded or NoWorker."""
        correlation = next(self._correlations)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = process.connection, future
        try:
            self._send(process.connection, Command(correlation, name, timeout_s))
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            self._counts["commands_late_total"] += 1
            raise DeadlineExceeded(
                f"instance {process.instance_id!r} did not answer {name!r} within {timeout_s:g} s",
                hint="Its cache process is stopped, stuck or cut off",
            ) from None
        finally:
            self._waiting.pop(correlation, None)

    def handle(self, connection: Connection, result: Result) -> None:
        """Take a result in. Only the connection that was asked may answer."""
        asked, future = self._waiting.get(result.correlation, (None, None))
        if future is None or asked != connection or future.done():
            self._counts["results_unasked_total"] += 1
            return
        future.set_result(result)

    def close(self) -> None:
        """Fail all commands that wait, because the controller stops."""
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(NoWorker("the controller is stopping"))
