"""Lookups in an index that is filled by hand."""

from __future__ import annotations

import asyncio
from array import array

import msgspec
import pytest

from lmcache_kit.controller.commands import Commands
from lmcache_kit.controller.instances import Instances
from lmcache_kit.controller.registry import Registry
from lmcache_kit.errors import ControlError, InvalidQuery, UnknownName
from lmcache_kit.interfaces.frontend import LookupQuery
from lmcache_kit.keys import Namespace
from lmcache_kit.protocol.control import Batch, PartialChunkEntry, Register
from tests.control.fakes import NAMESPACE, chunks_of
from tests.support.clocks import FakeClock

PROMPT = list(range(100, 112))


class Filled:
    """A registry in which instances hold what a test says."""

    def __init__(self, clock: FakeClock | None = None) -> None:
        self.registry = Registry(clock=clock, wall=clock) if clock else Registry()
        commands = Commands(self.registry.counts, lambda connection, message: None)
        self.instances = Instances(self.registry, commands)
        self.seqs: dict[tuple[str, str], int] = {}

    def put(
        self,
        instance_id: str,
        tokens: list[int],
        picked: slice = slice(None),
        *,
        location: str = "ram",
        namespace: Namespace = NAMESPACE,
    ) -> None:
        if not self.registry.on(instance_id):
            register = Register(
                instance_id, b"i" * 16, 1.0, "", 1.0, ("disk", "ram"), (), (namespace,)
            )
            self.registry.handle(instance_id, register)
        some = chunks_of(tokens, namespace)[picked]
        seq = self.seqs[instance_id, location] = self.seqs.get((instance_id, location), 0) + 1
        partial = tuple(PartialChunkEntry(c.key, c.parent, c.tokens) for c in some if c.partial)
        added = b"".join(chunk.key for chunk in some)
        self.registry.handle(instance_id, Batch(location, seq, added, b"", partial))

    def ask(self, tokens: list[int], **query: object) -> list[tuple[str, str, int, str]]:
        answer = self.instances.lookup(LookupQuery(tokens, **query))  # type: ignore[arg-type]
        return [
            (instance.instance_id, found.location, found.tokens, found.stopped)
            for instance in answer.instances
            for found in instance.locations
        ]


@pytest.fixture
def index() -> Filled:
    return Filled()


def test_all_tokens_of_a_stored_prompt_are_found(index: Filled) -> None:
    index.put("a", PROMPT)
    assert index.ask(PROMPT) == [("a", "ram", 12, "end")]


def test_a_prompt_shorter_than_a_chunk_is_found(index: Filled) -> None:
    index.put("a", PROMPT[:3])
    assert index.ask(PROMPT[:3]) == [("a", "ram", 3, "end")]


def test_a_longer_prompt_finds_the_partial_chunk_that_it_begins_with(index: Filled) -> None:
    index.put("a", PROMPT[:6])
    assert index.ask(PROMPT) == [("a", "ram", 6, "missing")]
    assert index.ask(PROMPT[:7]) == [("a", "ram", 6, "missing")]


def test_the_longest_of_several_partial_chunks_counts(index: Filled) -> None:
    index.put("a", PROMPT[:5])
    index.put("a", PROMPT[:7])
    index.put("b", PROMPT[:6])
    assert index.ask(PROMPT) == [("a", "ram", 7, "missing"), ("b", "ram", 6, "elsewhere")]


def test_a_partial_chunk_of_other_tokens_does_not_count(index: Filled) -> None:
    index.put("a", PROMPT[:7])
    assert index.ask([*PROMPT[:5], 9, 9, 9]) == [("a", "ram", 4, "missing")]
    assert index.ask([*PROMPT[:4], 9, 9, 9]) == [("a", "ram", 4, "missing")]


def test_a_gap_ends_the_match(index: Filled) -> None:
    index.put("a", PROMPT, slice(0, 1))
    index.put("a", PROMPT, slice(2, 3))
    assert index.ask(PROMPT) == [("a", "ram", 4, "missing")]


def test_a_gap_that_another_holder_fills_is_told(index: Filled) -> None:
    index.put("a", PROMPT, slice(0, 1))
    index.put("b", PROMPT, slice(1, 2))
    assert index.ask(PROMPT) == [("a", "ram", 4, "elsewhere")]


def test_locations_of_an_instance_count_each_alone_the_longest_first(index: Filled) -> None:
    index.put("a", PROMPT, slice(0, 1), location="ram")
    index.put("a", PROMPT, slice(0, 2), location="disk")
    assert index.ask(PROMPT) == [("a", "disk", 8, "missing"), ("a", "ram", 4, "elsewhere")]


def test_instances_come_longest_first_and_then_by_name(index: Filled) -> None:
    for name, count in (("c", 1), ("b", 3), ("a", 1), ("d", 3)):
        index.put(name, PROMPT, slice(0, count))
    assert [found[0] for found in index.ask(PROMPT)] == ["b", "d", "a", "c"]


def test_one_instance_can_be_asked_for(index: Filled) -> None:
    index.put("a", PROMPT, slice(0, 1))
    index.put("b", PROMPT)
    assert index.ask(PROMPT, instance_id="a") == [("a", "ram", 4, "elsewhere")]


def test_a_salt_finds_only_what_was_stored_under_it(index: Filled) -> None:
    index.put("a", PROMPT)
    salted = NAMESPACE.variant(cache_salt="tenant")
    some = chunks_of(PROMPT[:4], salted)
    index.registry.handle("a", Batch("ram", 2, some[0].key, b""))
    assert index.ask(PROMPT, cache_salt="tenant") == [("a", "ram", 4, "missing")]
    assert index.ask(PROMPT, cache_salt="other") == []


def test_the_longest_match_over_an_instances_namespaces_counts(index: Filled) -> None:
    other = msgspec.structs.replace(NAMESPACE, chunk_size=6)
    index.put("a", PROMPT[:4])
    index.put("b", PROMPT[:6], namespace=other)
    assert index.ask(PROMPT) == [("b", "ram", 6, "missing"), ("a", "ram", 4, "missing")]


def test_no_tokens_find_nothing(index: Filled) -> None:
    index.put("a", PROMPT)
    assert index.ask([]) == []


def test_an_array_of_tokens_finds_the_same(index: Filled) -> None:
    index.put("a", PROMPT)
    assert index.instances.lookup(LookupQuery(array("I", PROMPT))).instances[0].best.tokens == 12


@pytest.mark.parametrize("wrong", [-1, 2**32, 2**70, 1.5, "3", None])
def test_what_is_no_token_is_named(index: Filled, wrong: object) -> None:
    with pytest.raises(
        InvalidQuery, match=r"tokens\[2\] is .*integer from 0 to 4294967295"
    ) as info:
        index.ask([1, 2, wrong, -5])  # type: ignore[list-item]
    assert isinstance(info.value, ControlError)
    assert isinstance(info.value, ValueError)


def test_a_model_that_nobody_registered_is_unknown_and_the_known_ones_are_told(
    index: Filled,
) -> None:
    index.put("a", PROMPT)
    other = msgspec.structs.replace(NAMESPACE, model="other")
    index.put("b", PROMPT, namespace=other)
    known = sorted([NAMESPACE.model, "other"])
    with pytest.raises(UnknownName, match="unknown model 'nope'") as info:
        index.ask(PROMPT, model="nope")
    assert info.value.known == known
    assert [found[0] for found in index.ask(PROMPT, model="other")] == ["b"]


def test_of_one_instance_only_its_own_models_are_known(index: Filled) -> None:
    index.put("a", PROMPT)
    index.put("b", PROMPT, namespace=msgspec.structs.replace(NAMESPACE, model="other"))
    with pytest.raises(UnknownName, match="unknown model 'other'") as info:
        index.ask(PROMPT, model="other", instance_id="a")
    assert info.value.known == [NAMESPACE.model]


def test_a_model_whose_instance_is_silent_is_known_and_finds_nothing() -> None:
    clock = FakeClock()
    index = Filled(clock)
    index.put("a", PROMPT)
    clock.now += 60
    assert index.ask(PROMPT, model=NAMESPACE.model) == []


class Addressed:
    """A registry with instances that registered from hosts and addresses."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.index = Filled(self.clock)

    def register(self, name: str, host: str, ip: str) -> None:
        self.clock.now += 1
        incarnation = name.encode().ljust(16)
        message = Register(name, incarnation, 1.0, host, 1.0, ("ram",), (), (NAMESPACE,))
        self.index.registry.handle(name, message, ip)

    def at(self, address: str) -> list[str]:
        return list(asyncio.run(self.index.instances.at_address(address)))


@pytest.fixture
def addressed() -> Addressed:
    made = Addressed()
    made.register("first", "gpu-1.example", "10.0.0.7")
    made.register("second", "gpu-1.example", "::ffff:10.0.0.7")
    made.register("third", "gpu-2", "fd00::7")
    made.register("fourth", "", "::1")
    return made


def test_all_instances_of_an_address_are_named_the_latest_first(addressed: Addressed) -> None:
    assert addressed.at("10.0.0.7") == ["second", "first"]
    assert addressed.at("10.0.0.8") == []


def test_of_the_instances_of_an_address_those_that_are_alive_come_first(
    addressed: Addressed,
) -> None:
    addressed.clock.now += 60
    addressed.index.registry.hear("first")
    assert addressed.at("10.0.0.7") == ["first", "second"]


@pytest.mark.parametrize("name", ["gpu-1.example", "GPU-1.Example."])
def test_instances_are_found_by_the_name_of_their_host(addressed: Addressed, name: str) -> None:
    assert addressed.at(name) == ["second", "first"]


@pytest.mark.parametrize("written", ["fd00::7", "FD00:0:0::0007", "[fd00::7]", "fd00::7%eth0"])
def test_an_ipv6_address_may_be_written_in_each_of_its_ways(
    addressed: Addressed, written: str
) -> None:
    assert addressed.at(written) == ["third"]


def test_an_ipv4_address_is_found_when_it_is_written_as_ipv6(addressed: Addressed) -> None:
    assert addressed.at("::ffff:10.0.0.7") == ["second", "first"]


def test_a_name_that_leads_to_an_address_finds_who_registered_from_there(
    addressed: Addressed,
) -> None:
    addressed.register("local", "", "127.0.0.1")
    assert "local" in addressed.at("localhost")


@pytest.mark.parametrize("name", ["", " ", ".", "no.such.name.invalid", "a" * 300, "\0", "a..b"])
def test_a_name_that_leads_nowhere_finds_nobody(addressed: Addressed, name: str) -> None:
    assert addressed.at(name) == []
