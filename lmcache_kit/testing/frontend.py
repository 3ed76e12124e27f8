"""The suite of frontends, independent of their protocol."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

import pytest

from lmcache_kit.errors import (
    ControlError,
    DeadlineExceeded,
    InvalidQuery,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces import Frontend
from lmcache_kit.testing.controller import FakeController
from lmcache_kit.testing.suite import Suite

FAILURES: tuple[Callable[[], Exception], ...] = (
    lambda: ControlError("the controller says no"),
    lambda: InvalidQuery("token -1 is none"),
    lambda: UnknownName("instance", "here", ["elsewhere"]),
    lambda: NoWorker("nobody answers for 'here'"),
    lambda: DeadlineExceeded("it took too long"),
    lambda: OperationFailed("the cache process could not"),
    TimeoutError,
    lambda: RuntimeError("a bug in the controller"),
)


class Refused(Exception):
    """Raised by :meth:`FrontendSuite.ask` for a reply that is an error."""


class MakeFrontend(Protocol):
    """Builds a frontend that listens at ``endpoint``, or on any free address if it is None."""

    def __call__(self, controller: FakeController, endpoint: str | None) -> Frontend: ...


class FrontendSuite(Suite):
    """Conformance of a :class:`~lmcache_kit.interfaces.Frontend`.

    Define the fixture ``make_frontend``, and the method ``ask``, which makes one request as a
    client does. ``tcp``: endpoints are ``scheme://host:port``, and noise may be sent there.
    """

    tcp: ClassVar[bool] = True

    @pytest.fixture
    def make_frontend(self) -> MakeFrontend:
        self.missing(
            "the fixture 'make_frontend'",
            """
            @pytest.fixture
            def make_frontend(self):
                def make(controller, endpoint):
                    # at ``endpoint`` if it is not None, else on any free address
                    return MyFrontend(controller, MyOptions(...))
                return make
            """,
        )

    async def ask(self, endpoint: str) -> object:
        """Make one request on a new connection, and return the reply.

        The request must make the frontend await the controller, as ``health("here")`` does. Raises
        :class:`Refused` when the reply is an error, and any other exception without a reply.
        """
        self.missing(
            "the method 'ask'",
            """
            async def ask(self, endpoint):
                _, writer = await asyncio.open_connection(*address_of(endpoint))
                writer.write(b"health here\\n")
                reply = await reader.readline()
                if reply.startswith(b"error"):
                    raise Refused(reply)
                return reply
            """,
        )

    # Starting.

    def test_it_is_a_frontend(self, make_frontend: MakeFrontend) -> None:
        assert isinstance(make_frontend(FakeController(), None), Frontend)

    def test_it_tells_where_it_listens_once_it_does(self, make_frontend: MakeFrontend) -> None:
        async def story() -> None:
            frontend = make_frontend(FakeController(), None)
            assert not frontend.endpoints, "it has not started yet"
            async with self._started(frontend):
                assert frontend.endpoints
                assert all(isinstance(each, str) and each for each in frontend.endpoints)

        self._run(story)

    def test_it_answers(self, make_frontend: MakeFrontend) -> None:
        async def story() -> None:
            controller = FakeController()
            async with self._started(make_frontend(controller, None)) as frontend:
                for endpoint in frontend.endpoints:
                    assert await self.ask(endpoint), "an empty reply"
                    assert controller.asked, "the reply did not come from the controller"
                    controller.asked.clear()

        self._run(story)

    def test_an_address_that_is_taken_is_an_oserror(self, make_frontend: MakeFrontend) -> None:
        async def story() -> None:
            async with self._started(make_frontend(FakeController(), None)) as first:
                second = make_frontend(FakeController(), first.endpoints[0])
                try:
                    with pytest.raises(OSError) as taken:  # noqa: PT011 - any message will do
                        await second.start()
                finally:
                    await second.stop()
                assert str(taken.value), "the error does not say which address"
                assert await self.ask(first.endpoints[0])

        self._run(story)

    # Answering.

    def test_many_clients_are_answered_at_once(self, make_frontend: MakeFrontend) -> None:
        """A frontend that answers one request at a time would never answer here."""

        async def story() -> None:
            controller = FakeController()
            controller.open.clear()
            async with self._started(make_frontend(controller, None)) as frontend:
                asking = [self._asking(frontend) for _ in range(16)]
                await self._arrive(asking, controller)
                controller.open.set()
                assert all(await asyncio.gather(*asking))

        self._run(story)

    def test_a_slow_answer_is_waited_for(self, make_frontend: MakeFrontend) -> None:
        async def story() -> None:
            controller = FakeController()
            controller.open.clear()
            async with self._started(make_frontend(controller, None)) as frontend:
                asking = self._asking(frontend)
                await self._arrive([asking], controller)
                await asyncio.sleep(0.2)
                assert not asking.done(), "it replied before the controller did"
                controller.open.set()
                assert await asking

        self._run(story)

    @pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure()).__name__)
    def test_an_error_of_the_controller_is_a_reply(
        self, make_frontend: MakeFrontend, failure: Callable[[], Exception]
    ) -> None:
        """The client gets an error, and the next request is answered."""

        async def story() -> None:
            controller = FakeController()
            async with self._started(make_frontend(controller, None)) as frontend:
                controller.failure = failure()
                with pytest.raises(Refused):
                    await self.ask(frontend.endpoints[0])
                controller.failure = None
                assert await self.ask(frontend.endpoints[0])

        self._run(story)

    def test_a_client_that_goes_away_harms_nobody(self, make_frontend: MakeFrontend) -> None:
        async def story() -> None:
            controller = FakeController()
            controller.open.clear()
            async with self._started(make_frontend(controller, None)) as frontend:
                asking = self._asking(frontend)
                await self._arrive([asking], controller)
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
                controller.open.set()
                assert await self.ask(frontend.endpoints[0])

        self._run(story)

    @pytest.mark.parametrize("nbytes", [0, 1, 100, 100_000])
    def test_noise_harms_nobody(self, make_frontend: MakeFrontend, nbytes: int) -> None:
        async def story() -> None:
            async with self._started(make_frontend(FakeController(), None)) as frontend:
                _, writer = await self._connect(frontend)
                with contextlib.suppress(OSError):
                    writer.write(random.Random(nbytes).randbytes(nbytes))
                    await writer.drain()
                    await self.ask(frontend.endpoints[0])
                writer.close()
                assert await self.ask(frontend.endpoints[0])

        self._run(story)

    # Stopping.

    def test_stopping_twice_is_fine(self, make_frontend: MakeFrontend) -> None:
        async def story() -> None:
            frontend = make_frontend(FakeController(), None)
            await frontend.start()
            await frontend.stop()
            await frontend.stop()

        self._run(story)

    def test_requests_in_flight_are_answered_when_it_stops(
        self, make_frontend: MakeFrontend
    ) -> None:
        async def story() -> None:
            controller = FakeController()
            async with self._started(make_frontend(controller, None)) as frontend:
                controller.open.clear()
                asking = [self._asking(frontend) for _ in range(3)]
                await self._arrive(asking, controller)
                stopping = asyncio.ensure_future(frontend.stop())
                await asyncio.sleep(0.05)
                early = stopping.done()
                controller.open.set()
                replies = await asyncio.gather(*asking, return_exceptions=True)
                cut = [reply for reply in replies if isinstance(reply, Exception)]
                assert cut == [], "stop() did not wait for them"
                assert not early, "stop() returned before they were answered"
                await stopping

        self._run(story)

    def test_a_stopped_one_answers_nobody(self, make_frontend: MakeFrontend) -> None:
        async def story() -> None:
            controller = FakeController()
            async with self._started(make_frontend(controller, None)) as frontend:
                [endpoint, *_] = frontend.endpoints
                assert await self.ask(endpoint)
            controller.asked.clear()
            with contextlib.suppress(Exception):  # the protocol decides how clients see it
                async with asyncio.timeout(1):
                    await self.ask(endpoint)
            assert controller.asked == [], "it was stopped, and asked the controller"

        self._run(story)

    def test_an_idle_client_does_not_hold_up_the_stop(self, make_frontend: MakeFrontend) -> None:
        async def story() -> None:
            async with self._started(make_frontend(FakeController(), None)) as frontend:
                _, writer = await self._connect(frontend)
                async with asyncio.timeout(self.timeout_s):
                    await frontend.stop()
                writer.close()

        self._run(story)

    def test_its_address_is_free_once_it_has_stopped(self, make_frontend: MakeFrontend) -> None:
        async def story() -> None:
            async with self._started(make_frontend(FakeController(), None)) as frontend:
                [endpoint, *_] = frontend.endpoints
                assert await self.ask(endpoint)
            async with self._started(make_frontend(FakeController(), endpoint)) as frontend:
                assert await self.ask(frontend.endpoints[0])

        self._run(story)

    def test_stopping_gives_everything_back(self, make_frontend: MakeFrontend) -> None:
        async def life() -> tuple[int, int]:
            async with self._started(make_frontend(FakeController(), None)) as frontend:
                await self.ask(frontend.endpoints[0])
            with contextlib.suppress(AssertionError):  # checked by the count below
                await self._until(lambda: len(asyncio.all_tasks()) == 1, "tasks", seconds=1)
            return len(asyncio.all_tasks()) - 1, _descriptors()

        async def story() -> None:
            await life()
            _, before = await life()
            tasks, after = [await life() for _ in range(3)][-1]
            assert tasks == 0, f"{tasks} tasks go on after stop()"
            assert after <= before, f"open descriptors grew from {before} to {after}"

        self._run(story)

    # Helpers.

    def _run(self, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
        reported: list[str] = []

        # asyncio's own handler formats tracebacks whenever the garbage collector likes, and Python
        # 3.11 does not survive that while pytest is formatting one too.
        def tell(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            reported.append(f"{context['message']}: {context.get('exception')!r}")

        async def in_time() -> None:
            asyncio.get_running_loop().set_exception_handler(tell)
            async with asyncio.timeout(3 * self.timeout_s):
                await story()

        try:
            asyncio.run(in_time())
        except TimeoutError:
            pytest.fail("\n".join([f"not done after {3 * self.timeout_s:g} s", *reported]))
        except Exception as error:
            if reported:
                error.add_note("The event loop was reported: " + "; ".join(reported))
            raise

    @contextlib.asynccontextmanager
    async def _started(self, frontend: Frontend) -> AsyncIterator[Frontend]:
        await frontend.start()
        try:
            yield frontend
        finally:
            await frontend.stop()

    def _asking(self, frontend: Frontend) -> asyncio.Future[object]:
        return asyncio.ensure_future(self.ask(frontend.endpoints[0]))

    async def _arrive(
        self, asking: list[asyncio.Future[object]], controller: FakeController
    ) -> None:
        """Wait until the controller has got all requests; raise a failed client's exception."""

        def done() -> bool:
            for each in asking:
                if each.done():
                    each.result()
            return len(controller.asked) >= len(asking)

        await self._until(done, f"{len(asking)} requests to reach the controller")

    async def _connect(
        self, frontend: Frontend
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self.tcp:
            pytest.skip("tcp = False: the suite does not know how to connect")
        return await asyncio.open_connection(*address_of(frontend.endpoints[0]))

    async def _until(
        self, holds: Callable[[], bool], what: str, *, seconds: float | None = None
    ) -> None:
        limit_s = self.timeout_s if seconds is None else seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not holds():
                    await asyncio.sleep(0.005)
        assert holds(), f"waited {limit_s:g} s for {what}"


def address_of(endpoint: str) -> tuple[str, int]:
    """Return host and port of ``scheme://host:port``."""
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    assert parts.hostname, f"{endpoint!r} is no scheme://host:port"
    assert parts.port, f"{endpoint!r} has no port"
    return parts.hostname, parts.port


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
