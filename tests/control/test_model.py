"""Index and wire against a naive model, over a network that loses, repeats, swaps and garbles.

Real sessions, announcers and a real registry; only sockets and time are pretended. Whatever
happened, once the network behaves again the index is the union of what the engines hold.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import deque
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache_kit.agent.controller_client import ControllerClient, Identity
from lmcache_kit.agent.event_log import EventLog
from lmcache_kit.agent.location_feed import LocationFeed
from lmcache_kit.agent.sync_barrier import Barrier
from lmcache_kit.controller.lookup import lookup
from lmcache_kit.controller.registry import Registry
from lmcache_kit.errors import ProtocolError
from lmcache_kit.interfaces.frontend import LookupQuery
from lmcache_kit.protocol import control as wire
from tests.control.fakes import NAMESPACE, FakeClock, FakeEngine, chunks_of

OTHER = NAMESPACE.variant(lora="other")
PROMPTS = [
    (NAMESPACE, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    (NAMESPACE, [1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 22, 23, 24]),
    (NAMESPACE, [1, 2, 3, 4, 9]),
    (NAMESPACE, [1, 2]),
    (NAMESPACE, list(range(50, 75))),
    (OTHER, [1, 2, 3, 4, 5, 6]),
]
CHUNKS = list({c.key: c for base, tokens in PROMPTS for c in chunks_of(tokens, base)}.values())
INSTANCES = ["a", "b", "c"]


@dataclass
class Life:
    """One life of a cache process, and the two directions of its connection."""

    instance_id: str
    incarnation: bytes
    engine: FakeEngine
    announcer: EventLog
    session: ControllerClient
    waits: list[tuple[Barrier, set[bytes]]] = field(default_factory=list)
    connection: int = 0
    stopped: bool = False
    out: deque[bytes] = field(default_factory=deque)
    back: deque[bytes] = field(default_factory=deque)


class Network(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.connections = 0
        self.lives: list[Life] = []
        self.started = 0
        self.start_controller()

    def start_controller(self) -> None:
        self.registry = Registry(clock=self.clock, wall=self.clock, forget_after_s=20.0)

    def connect(self, life: Life) -> None:
        """ZMQ drops what was queued, and the other side sees a stranger."""
        self.connections += 1
        life.connection = self.connections
        life.out.clear()
        life.back.clear()

    @initialize()
    def begin(self) -> None:
        for name in INSTANCES[:2]:
            self.start_life(name)

    # The cache processes.

    @rule(name=st.sampled_from(INSTANCES))
    def start_life(self, name: str) -> None:
        """A later life; an earlier one may still be there, and is if nobody stopped it."""
        if len(self.lives) >= 5:
            return
        self.started += 1
        engine = FakeEngine("ram")
        engine.store(random.Random(self.started).sample(CHUNKS, self.started % 4))
        announcer = EventLog("ram", max_notes=12, max_past_keys=30, keys_per_message=3)
        announcer.begin_with(engine.memory_tier.subscribe(announcer))
        incarnation = self.started.to_bytes(16, "big")
        identity = Identity(name, incarnation, started=float(self.started), heartbeat_s=1.0)
        # The session asks its engine's location nowhere, only its announcer's.
        session = ControllerClient([LocationFeed(engine, announcer)], identity, clock=self.clock)
        session.register_namespace(NAMESPACE)
        session.register_namespace(OTHER)
        life = Life(name, incarnation, engine, announcer, session)
        self.connect(life)
        self.lives.append(life)

    def some(self, which: int) -> Life:
        return self.lives[which % len(self.lives)]

    @rule(which=st.integers(0, 99), picked=st.sets(st.sampled_from(CHUNKS), max_size=9))
    def store(self, which: int, picked: set) -> None:
        self.some(which).engine.store(sorted(picked))

    @rule(which=st.integers(0, 99), picked=st.sets(st.sampled_from(CHUNKS), max_size=5))
    def evict(self, which: int, picked: set) -> None:
        life = self.some(which)
        keys = [chunk.key for chunk in sorted(picked)]
        life.engine.evict(keys)
        for _, noted in life.waits:
            noted.difference_update(keys)

    @rule(which=st.integers(0, 99))
    def confirm(self, which: int) -> None:
        """A thread of the cache process waits until the index holds what lies there now."""
        life = self.some(which)
        life.waits.append(
            (life.session.streams["ram"].confirmations.ask(), set(life.engine.chunks))
        )

    @rule(which=st.integers(0, 99), room=st.integers(0, 9))
    def turn(self, which: int, room: int) -> None:
        """The agent's thread runs; the connection takes ``room`` messages."""
        life = self.some(which)
        if not life.stopped:
            self.run_turn(life, room)

    def run_turn(self, life: Life, room: int) -> None:
        def send(message: wire.FromAgent) -> bool:
            nonlocal room
            room -= 1
            if room >= 0:
                life.out.append(wire.encode(message))
            return room >= 0

        while life.back:
            life.session.handle(wire.decode_from_controller(life.back.popleft()))
        life.session.turn(send)

    @rule(which=st.integers(0, 99))
    def freeze_or_thaw(self, which: int) -> None:
        life = self.some(which)
        life.stopped = not life.stopped

    @precondition(lambda self: len(self.lives) > 1)
    @rule(which=st.integers(0, 99), politely=st.booleans())
    def end_life(self, which: int, politely: bool) -> None:
        life = self.some(which)
        if politely and life.session.registered:
            life.out.append(wire.encode(wire.Goodbye()))
            self.deliver_all(life)
        self.lives.remove(life)

    # The network.

    def deliver(self, life: Life, frame: bytes) -> None:
        try:
            message = wire.decode_from_agent(frame)
            answers = self.registry.handle(life.connection, message)
        except ProtocolError:
            return
        for connection, answer in answers:
            if isinstance(answer, wire.Confirmed):
                self.is_true(life, answer)
            for each in self.lives:
                if each.connection == connection:
                    each.back.append(wire.encode(answer))

    def is_true(self, life: Life, said: wire.Confirmed) -> None:
        process = self.registry.on(life.connection)
        assert process
        assert process.said.incarnation == life.incarnation
        held = self.held(process.followers["ram"].holder.bit)
        for wait, noted in life.waits:
            if wait.seq is not None and wait.seq <= said.seq:
                assert noted <= held

    def deliver_all(self, life: Life) -> None:
        while life.out:
            self.deliver(life, life.out.popleft())

    @rule(which=st.integers(0, 99), count=st.integers(1, 6))
    def arrive(self, which: int, count: int) -> None:
        life = self.some(which)
        for _ in range(min(count, len(life.out))):
            self.deliver(life, life.out.popleft())

    @rule(which=st.integers(0, 99), lost=st.integers(0, 9))
    def exchange(self, which: int, lost: int) -> None:
        """What the agent's thread says arrives, but for one message perhaps."""
        life = self.some(which)
        if not life.stopped:
            self.run_turn(life, 9)
            self.lose(which, lost, back=False)
            self.deliver_all(life)

    @rule(
        which=st.integers(0, 99),
        picked=st.sets(st.sampled_from(CHUNKS), min_size=1, max_size=4),
        lost=st.integers(0, 9),
    )
    def move_in(self, which: int, picked: set, lost: int) -> None:
        """What comes from a peer is stored and waited for."""
        self.exchange(which, 99)
        self.store(which, picked)
        self.confirm(which)
        self.exchange(which, lost)
        self.exchange(which, 99)

    @rule(which=st.integers(0, 99), at=st.integers(0, 5), back=st.booleans())
    def lose(self, which: int, at: int, back: bool) -> None:
        queue = self.some(which).back if back else self.some(which).out
        if at < len(queue):
            del queue[at]

    @rule(which=st.integers(0, 99), at=st.integers(0, 5))
    def repeat(self, which: int, at: int) -> None:
        out = self.some(which).out
        if at < len(out):
            out.append(out[at])

    @rule(which=st.integers(0, 99), at=st.integers(0, 5))
    def swap(self, which: int, at: int) -> None:
        out = self.some(which).out
        if at + 1 < len(out):
            out[at], out[at + 1] = out[at + 1], out[at]

    @rule(which=st.integers(0, 99), at=st.integers(0, 200), bit=st.integers(0, 7))
    def garble(self, which: int, at: int, bit: int) -> None:
        """A frame with a bit flipped comes from a stranger."""
        life = self.some(which)
        if life.out:
            frame = bytearray(life.out[-1])
            frame[at % len(frame)] ^= 1 << bit
            with contextlib.suppress(ProtocolError):
                message = wire.decode_from_agent(bytes(frame))
                # A registration that still reads as one is one, of somebody with another name.
                if not isinstance(message, wire.Register):
                    assert self.registry.handle(-1, message) in ([], [(-1, wire.NotRegistered())])

    @rule(which=st.integers(0, 99), frame=st.binary(max_size=40))
    def rubbish(self, which: int, frame: bytes) -> None:
        self.deliver(self.some(which), frame)

    @rule(which=st.integers(0, 99))
    def reconnect(self, which: int) -> None:
        self.connect(self.some(which))

    @rule()
    def restart_controller(self) -> None:
        self.start_controller()
        for life in self.lives:
            self.connect(life)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 2.5, 7.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.registry.expire()

    @rule(steps=st.integers(1, 600))
    def sweep(self, steps: int) -> None:
        for _ in range(steps):
            self.registry.index.sweep()

    # What always holds.

    def held(self, bit: int) -> set[bytes]:
        return {
            key for shard in self.registry.index._shards for key, m in shard.items() if m >> bit & 1
        }

    @invariant()
    def only_the_living_are_visible(self) -> None:
        visible = 0
        for process in self.registry.processes():
            for follower in process.followers.values():
                if process.alive:
                    visible |= follower.holder.mask
        assert self.registry.index.visible == visible

    @invariant()
    def one_life_per_instance(self) -> None:
        names = [process.instance_id for process in self.registry.processes()]
        assert len(names) == len(set(names))

    @invariant()
    def digests_are_those_of_the_keys(self) -> None:
        for process in self.registry.processes():
            for follower in process.followers.values():
                keys = self.held(follower.holder.bit)
                xor = 0
                for key in keys:
                    xor ^= int.from_bytes(key[:8], "little")
                assert (follower.holder.keys, follower.holder.xor) == (len(keys), xor)

    @invariant()
    def lookups_credit_what_is_held_without_a_gap(self) -> None:
        for _, tokens in PROMPTS:
            longer = [*tokens, 98, 99]
            expected = {}
            for process in self.registry.processes():
                keys = self.held(process.followers["ram"].holder.bit)
                credit = max(naive_credit(keys, base, longer) for base in (NAMESPACE, OTHER))
                if process.alive and credit:
                    expected[process.instance_id] = credit
            answer = lookup(self.registry, LookupQuery(longer))
            assert {each.instance_id: each.best.tokens for each in answer.instances} == expected

    def settle(self, rounds: int) -> None:
        for _ in range(rounds):
            for life in self.lives:
                self.run_turn(life, 9)
            for life in self.lives:
                self.deliver_all(life)
            self.clock.now += 0.2
            self.registry.expire()

    def teardown(self) -> None:
        """The network behaves again: after a while the index is right."""
        for life in self.lives:
            life.stopped = False
        self.settle(rounds=200)
        asked = self.registry.counts["resyncs_total"]
        for life in self.lives:
            life.engine.store(CHUNKS[:2])
            life.engine.evict([CHUNKS[1].key])
        self.settle(rounds=30)
        assert self.registry.counts["resyncs_total"] == asked
        latest = {}
        for life in self.lives:
            if (
                life.instance_id not in latest
                or latest[life.instance_id].incarnation < life.incarnation
            ):
                latest[life.instance_id] = life
        known = {
            process.instance_id: process for process in self.registry.processes() if process.alive
        }
        assert known.keys() == latest.keys()
        for name, life in latest.items():
            assert known[name].said.incarnation == life.incarnation
            bit = known[name].followers["ram"].holder.bit
            assert self.held(bit) == life.engine.chunks.keys()
            assert all(wait.confirmed for wait, _ in life.waits)
        while self.registry.index.sweep():
            pass
        everything = set().union(*(life.engine.chunks.keys() for life in latest.values()))
        if len(known) == len(self.registry.processes()):
            assert len(self.registry.index) == len(everything)


def naive_credit(keys: set[bytes], namespace, tokens: list[int]) -> int:
    """Tokens from the first on, chunk by chunk, then the longest beginning of the next one."""
    size = namespace.chunk_size
    credit = 0
    for end in range(size, len(tokens) + 1, size):
        if chunks_of(tokens[:end], namespace)[-1].key not in keys:
            break
        credit = end
    for more in range(size - 1, 0, -1):
        end = credit + more
        if end <= len(tokens) and chunks_of(tokens[:end], namespace)[-1].key in keys:
            return end
    return credit


class TestNetwork(Network.TestCase):
    settings = settings(
        max_examples=150,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )

    def setUp(self) -> None:
        """Thousands of lives are turned away here, each with its warning."""
        logging.disable(logging.WARNING)

    def tearDown(self) -> None:
        logging.disable(logging.NOTSET)
