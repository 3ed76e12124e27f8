"""Operations over a network that loses and repeats, to a process that is cut off and ends.

The runner, the log and the registry are real; only sockets, time and the executor are fakes.
Whatever happens, an operation starts at most once and has one end, by its deadline.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache_kit.agent.operations import OperationRunner
from lmcache_kit.controller.operation_log import Operation
from lmcache_kit.controller.operations import Operations
from lmcache_kit.controller.registry import Connection, Registry
from lmcache_kit.interfaces.frontend import OperationInfo
from lmcache_kit.interfaces.operations import Clear, OperationStatus, Scope
from lmcache_kit.protocol import control as wire
from tests.control.fakes import FakeExecutor, RunningFake
from tests.support.clocks import FakeClock

ENDS = ["done", "partial", "failed"]


class Network(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.registry = Registry(clock=self.clock, wall=self.clock, drop_after_s=1e9)
        self.there: deque[bytes] = deque()
        self.back: deque[bytes] = deque()
        self.operations = Operations(self.registry, self.send, clock=self.clock)
        self.started: dict[str, Operation] = {}
        self.ends: dict[str, OperationInfo] = {}
        self.lives = 0
        self.connection = 0
        self.executors: list[FakeExecutor] = []
        self.start_life()

    def send(self, connection: Connection, message: wire.FromController) -> None:
        if connection == self.connection:
            self.there.append(wire.encode(message))

    def some(self, which: int) -> RunningFake:
        """An operation of the present incarnation."""
        running = self.executors[-1].running
        return running[which % len(running)]

    @rule()
    def start_life(self) -> None:
        """The instance's cache process is another one from now on."""
        self.lives += 1
        self.executors.append(FakeExecutor())
        self.runner = OperationRunner(self.executors[-1], clock=self.clock)
        self.reconnect()

    @rule()
    def reconnect(self) -> None:
        """What was on its way is lost."""
        self.connection += 1
        self.there.clear()
        self.back.clear()
        self.runner.restart()
        registration = wire.Register(
            "a", self.lives.to_bytes(16), self.lives, "", 1.0, ("ram",), (), ()
        )
        self.registry.handle(self.connection, registration)

    @rule(deadline_s=st.sampled_from([0.5, 10.0, 60.0]), accepts=st.booleans())
    def submit(self, deadline_s: float, accepts: bool) -> None:
        """Operations that start from now on are accepted at once, or later."""
        self.executors[-1].scope = Scope(12, 3) if accepts else None
        request = Clear(location="ram", cache_salt=str(len(self.started)))
        operation = self.operations.submit("a", request, deadline_s=deadline_s)
        self.started[operation.operation_id] = operation

    @rule(count=st.integers(1, 9))
    def deliver_there(self, count: int) -> None:
        for _ in range(min(count, len(self.there))):
            message = wire.decode_from_controller(self.there.popleft())
            if isinstance(message, wire.OperationCommand):
                self.runner.handle(message)

    @rule(count=st.integers(1, 9))
    def deliver_back(self, count: int) -> None:
        for _ in range(min(count, len(self.back))):
            message = wire.decode_from_agent(self.back.popleft())
            self.registry.hear(self.connection)
            assert isinstance(message, wire.OperationReport)
            self.operations.handle(self.connection, message)

    @rule(there=st.booleans(), at=st.integers(0, 99), twice=st.booleans())
    def lose_or_repeat(self, there: bool, at: int, twice: bool) -> None:
        queue = self.there if there else self.back
        if queue and twice:
            queue.insert(at % len(queue), queue[at % len(queue)])
        elif queue:
            del queue[at % len(queue)]

    @rule(room=st.integers(0, 9))
    def turn(self, room: int) -> None:
        def tell(message: wire.OperationReport) -> bool:
            if len(self.back) < room:
                self.back.append(wire.encode(message))
                return True
            return False

        self.runner.turn(tell)

    @rule(lost=st.booleans(), step_s=st.sampled_from([0.05, 1.1]))
    def exchange(self, lost: bool, step_s: float) -> None:
        """All that is on its way arrives and is answered, or the answers are lost."""
        self.deliver_there(99)
        self.turn(99)
        if lost:
            self.back.clear()
        self.deliver_back(99)
        self.time_passes(step_s)

    @rule(step_s=st.sampled_from([0.05, 0.6, 1.1, 5.0]))
    def time_passes(self, step_s: float) -> None:
        self.clock.now += step_s
        self.registry.hear(self.connection)
        self.operations.tick()

    @precondition(lambda self: self.executors[-1].running)
    @rule(which=st.integers(0, 99), state=st.sampled_from(ENDS))
    def finish(self, which: int, state: str) -> None:
        self.some(which).end(OperationStatus(state, 7))  # type: ignore[arg-type]

    @precondition(lambda self: self.executors[-1].running)
    @rule(which=st.integers(0, 99))
    def report(self, which: int) -> None:
        self.some(which).progress(1, 3)

    @precondition(lambda self: self.executors[-1].running)
    @rule(which=st.integers(0, 99))
    def accept(self, which: int) -> None:
        self.some(which).accept(12, 3)

    @precondition(lambda self: self.started)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        operation = list(self.started.values())[which % len(self.started)]
        if not operation.ended.is_set():
            self.operations.send_cancel(operation)

    @invariant()
    def an_operation_starts_at_most_once(self) -> None:
        begun = [each.request.cache_salt for one in self.executors for each in one.running]
        assert len(begun) == len(set(begun))

    @invariant()
    def what_failed_before_it_was_accepted_is_refused(self) -> None:
        for operation in self.started.values():
            failed = operation.status.state in ("failed", "expired")
            assert (operation.refusal is not None) == (failed and operation.started_at is None)

    @invariant()
    def an_end_does_not_change_and_comes_by_the_deadline(self) -> None:
        for operation in self.started.values():
            info = self.operations.get(operation.operation_id)
            if info.ended:
                assert self.ends.setdefault(info.operation_id, info) == info
                assert operation.ended.is_set()
            else:
                assert self.clock.now < operation.due <= operation.deadline

    def teardown(self) -> None:
        """Once the network behaves, everything ends, and both ends drop what has ended."""
        for _ in range(4):
            self.time_passes(1.1)
            for _ in range(len(self.started) + 1):
                self.deliver_there(99)
                self.turn(99)
                self.deliver_back(99)
            for running in self.executors[-1].running:
                running.end(OperationStatus("done", 12))
        self.an_end_does_not_change_and_comes_by_the_deadline()
        assert all(operation.ended.is_set() for operation in self.started.values())
        assert self.runner.stats()["operations"] == 0
        counts = self.registry.counts
        ended = [
            name for name in counts if name.startswith("operations_") and name[-6:] == "_total"
        ]
        assert sum(counts[name] for name in ended if name != "operations_total") == len(
            self.started
        )


TestOperations = Network.TestCase
TestOperations.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
