"""Orders over a network that loses and repeats, to a process that is cut off and ends.

Real jobs, a real ledger and a real registry; only sockets, time and the operator are pretended.
Whatever happens, an order is begun at most once, and its event has one end, by its deadline.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache_kit.agent.operations import Jobs
from lmcache_kit.controller.operation_log import Event
from lmcache_kit.controller.operations import Operations
from lmcache_kit.controller.registry import Connection, Registry
from lmcache_kit.interfaces.frontend import EventInfo, Operation
from lmcache_kit.interfaces.operations import Accepted, Clear, Outcome, Progress
from lmcache_kit.protocol import control as wire
from tests.control.fakes import FakeClock, FakeOperator

ENDS = ["done", "partial", "failed"]


class Network(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.registry = Registry(clock=self.clock, wall=self.clock, forget_after_s=1e9)
        self.there: deque[bytes] = deque()
        self.back: deque[bytes] = deque()
        self.operations = Operations(self.registry, self.send, clock=self.clock)
        self.events: dict[str, Event] = {}
        self.ends: dict[str, EventInfo] = {}
        self.lives = 0
        self.connection = 0
        self.operators: list[FakeOperator] = []
        self.start_life()

    def send(self, connection: Connection, message: wire.FromController) -> None:
        if connection == self.connection:
            self.there.append(wire.encode(message))

    @rule()
    def start_life(self) -> None:
        """The instance's cache process is another one from now on."""
        self.lives += 1
        self.operators.append(FakeOperator())
        self.jobs = Jobs(self.operators[-1], clock=self.clock)
        self.reconnect()

    @rule()
    def reconnect(self) -> None:
        """What was on its way is lost."""
        self.connection += 1
        self.there.clear()
        self.back.clear()
        self.jobs.restart()
        said = wire.Register("a", self.lives.to_bytes(16), self.lives, "", 1.0, ("ram",), (), ())
        self.registry.handle(self.connection, said)

    @rule(deadline_s=st.sampled_from([0.5, 10.0, 60.0]), known=st.booleans())
    def order(self, deadline_s: float, known: bool) -> None:
        """Orders that are begun from now on know at once what they are about, or not."""
        self.operators[-1].accepts = Accepted(12, 3) if known else None
        order = Clear(location="ram", cache_salt=str(len(self.events)))
        asked = Operation(instance_id="a", order=order, deadline_s=deadline_s)
        process = self.registry.find("a")
        event = self.operations._open(asked, process)
        self.events[event.event_id] = event

    @rule(count=st.integers(1, 9))
    def deliver_there(self, count: int) -> None:
        for _ in range(min(count, len(self.there))):
            match wire.decode_from_controller(self.there.popleft()):
                case wire.Begin() as message:
                    self.jobs.begin(message)
                case wire.Cancel(event_id):
                    self.jobs.cancel(event_id)
                case wire.Settled(event_id):
                    self.jobs.settled(event_id)

    @rule(count=st.integers(1, 9))
    def deliver_back(self, count: int) -> None:
        for _ in range(min(count, len(self.back))):
            message = wire.decode_from_agent(self.back.popleft())
            self.registry.hear(self.connection)
            assert isinstance(message, wire.AboutOrders)
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
        def tell(message: wire.AboutOrders) -> bool:
            if len(self.back) < room:
                self.back.append(wire.encode(message))
                return True
            return False

        self.jobs.turn(tell)

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

    @precondition(lambda self: self.operators[-1].jobs)
    @rule(which=st.integers(0, 99), state=st.sampled_from(ENDS))
    def finish(self, which: int, state: str) -> None:
        jobs = self.operators[-1].jobs
        jobs[which % len(jobs)].finish(Outcome(state, 7))  # type: ignore[arg-type]

    @precondition(lambda self: self.operators[-1].jobs)
    @rule(which=st.integers(0, 99))
    def report(self, which: int) -> None:
        jobs = self.operators[-1].jobs
        jobs[which % len(jobs)].report(Progress(1, 3))

    @precondition(lambda self: self.operators[-1].jobs)
    @rule(which=st.integers(0, 99))
    def accept(self, which: int) -> None:
        jobs = self.operators[-1].jobs
        job = jobs[which % len(jobs)]
        job.accepted = Accepted(12, 3)
        job.report(Progress(0, 3))

    @precondition(lambda self: self.events)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        event = list(self.events.values())[which % len(self.events)]
        if not event.ended.is_set():
            event.cancelling = True
            self.operations._say(event)

    @invariant()
    def an_order_is_begun_at_most_once(self) -> None:
        begun = [job.order.cache_salt for operator in self.operators for job in operator.jobs]
        assert len(begun) == len(set(begun))

    @invariant()
    def what_failed_before_it_was_accepted_is_refused(self) -> None:
        for event in self.events.values():
            failed = event.state in ("failed", "expired")
            assert (event.refusal is not None) == (failed and event.started_at is None)

    @invariant()
    def an_end_does_not_change_and_comes_by_the_deadline(self) -> None:
        for event in self.events.values():
            info = self.operations.event(event.event_id)
            if info.final:
                assert self.ends.setdefault(info.event_id, info) == info
                assert event.ended.is_set()
            else:
                assert self.clock.now < event.due <= event.deadline

    def teardown(self) -> None:
        """Once the network behaves, everything ends and nobody remembers it for nothing."""
        for _ in range(4):
            self.time_passes(1.1)
            for _ in range(len(self.events) + 1):
                self.deliver_there(99)
                self.turn(99)
                self.deliver_back(99)
            for job in self.operators[-1].jobs:
                job.finish(Outcome("done", 12))
        self.an_end_does_not_change_and_comes_by_the_deadline()
        assert all(event.ended.is_set() for event in self.events.values())
        assert self.jobs.stats()["orders"] == 0
        counts = self.registry.counts
        ended = [
            name for name in counts if name.startswith("operations_") and name[-6:] == "_total"
        ]
        assert sum(counts[name] for name in ended if name != "operations_total") == len(self.events)


TestOrders = Network.TestCase
TestOrders.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
