"""A frontend that is right, and some that are wrong in one thing each.

``CAUGHT_BY``: the check of the suite that is there for it.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from lmcache_kit.interfaces import Frontend
from lmcache_kit.testing import FrontendSuite, Refused


class Right(Frontend):
    """A line with an instance is answered by a line with its health."""

    def __init__(self, controller, port):
        self.controller = controller
        self.port = port
        self.server = None
        self.where = ()
        self.answering = set()
        self.writers = set()

    @property
    def endpoints(self):
        return self.where

    async def start(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
        port = self.server.sockets[0].getsockname()[1]
        self.where = (f"line://127.0.0.1:{port}",)

    async def stop(self):
        if self.server is None:
            return
        self.server.close()
        self.server = None
        await self.finish()
        for writer in self.writers:
            writer.close()
        await asyncio.sleep(0)

    async def finish(self):
        if self.answering:
            await asyncio.wait(self.answering)

    async def serve(self, reader, writer):
        self.writers.add(writer)
        try:
            with contextlib.suppress(OSError, ValueError):
                while line := await reader.readline():
                    task = asyncio.ensure_future(self.answer(line))
                    self.answering.add(task)
                    try:
                        writer.write(await task)
                        await writer.drain()
                    finally:
                        self.answering.discard(task)
        finally:
            self.writers.discard(writer)
            writer.close()

    async def answer(self, line):
        try:
            return self.line(await self.health(line.decode(errors="replace").strip()))
        except Exception as error:
            return b"error " + repr(error).encode() + b"\n"

    async def health(self, instance):
        return await self.controller.health(instance)

    def line(self, codes):
        return f"{codes}\n".encode()


class OneAtATime(Right):
    def __init__(self, controller, port):
        super().__init__(controller, port)
        self.lock = asyncio.Lock()

    async def health(self, instance):
        async with self.lock:
            return await super().health(instance)


class DiesOfAnError(Right):
    async def answer(self, line):
        return self.line(await self.health(line.decode(errors="replace").strip()))


class SaysAllIsWell(Right):
    async def answer(self, line):
        with contextlib.suppress(Exception):
            return self.line(await self.health("here"))
        return self.line({})


class DoesNotWait(Right):
    async def health(self, instance):
        self.unheard = asyncio.ensure_future(self.controller.health(instance))
        await asyncio.sleep(0)
        return {0: 0}


class CutsOffWhatIsInFlight(Right):
    async def finish(self):
        for task in self.answering:
            task.cancel()


class StopsBeforeTheAnswers(Right):
    """They come all the same."""

    async def stop(self):
        if self.server is None:
            return
        self.server.close()
        self.server = None
        self.stopping = asyncio.ensure_future(self.finish())

    async def finish(self):
        await super().finish()
        for writer in self.writers:
            writer.close()


class GoesElsewhere(Right):
    """When its address is taken."""

    async def start(self):
        try:
            await super().start()
        except OSError:
            self.port = 0
            await super().start()


class GoesOn(Right):
    """After it was stopped."""

    async def stop(self):
        pass


class StopsOnce(Right):
    async def stop(self):
        self.server.close()
        self.server = None
        await self.finish()
        for writer in self.writers:
            writer.close()


class LeavesATask(Right):
    async def start(self):
        await super().start()
        self.task = asyncio.ensure_future(asyncio.sleep(60))


class WaitsForIdleClients(Right):
    async def stop(self):
        while self.writers:
            await asyncio.sleep(0.01)
        await super().stop()


class KnowsBeforehand(Right):
    def __init__(self, controller, port):
        super().__init__(controller, port)
        self.where = ("line://127.0.0.1:1",)


CAUGHT_BY = {
    OneAtATime: "test_many_clients_are_answered_at_once",
    DiesOfAnError: "test_an_error_of_the_controller_is_a_reply",
    SaysAllIsWell: "test_an_error_of_the_controller_is_a_reply",
    DoesNotWait: "test_a_slow_answer_is_waited_for",
    CutsOffWhatIsInFlight: "test_requests_in_flight_are_answered_when_it_stops",
    StopsBeforeTheAnswers: "test_requests_in_flight_are_answered_when_it_stops",
    GoesElsewhere: "test_an_address_that_is_taken_is_an_oserror",
    GoesOn: "test_a_stopped_one_answers_nobody",
    StopsOnce: "test_stopping_twice_is_fine",
    LeavesATask: "test_stopping_gives_everything_back",
    WaitsForIdleClients: "test_an_idle_client_does_not_hold_up_the_stop",
    KnowsBeforehand: "test_it_tells_where_it_listens_once_it_does",
}


def suite_of(made):
    class Made(FrontendSuite):
        timeout_s = 10.0 if made is Right else 0.6

        @pytest.fixture
        def make_frontend(self):
            def make(controller, endpoint):
                return made(controller, int(endpoint.rpartition(":")[2]) if endpoint else 0)

            return make

        async def ask(self, endpoint):
            port = int(endpoint.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"here\n")
                reply = await reader.readline()
            finally:
                writer.close()
            if not reply:
                raise ConnectionError("no reply")
            if reply.startswith(b"error"):
                raise Refused(reply)
            return reply

    Made.__name__ = Made.__qualname__ = f"Test{made.__name__}"
    return Made


globals().update({f"Test{each.__name__}": suite_of(each) for each in (Right, *CAUGHT_BY)})
