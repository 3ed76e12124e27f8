"""Any order of stores, moves, pins and clears among three caches, against a naive model of them."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_kit.keys import chain, pack_tokens
from tests.peer.conftest import BASE, Place

CHUNK = 16
ALPHABET = {"a": range(16), "b": range(100, 116), "c": range(200, 216), "t": range(300, 305)}
"""Pieces of prompts: three whole chunks and a partial one, which can only be the last."""

places = st.integers(0, 2)
prompts = st.sampled_from(["a", "at", "ab", "abt", "abc", "abct", "b", "bt"])


class Moves(RuleBasedStateMachine):
    """``stored[i]``: the prompts whose last chunk is at place i; every chunk is named by the
    prompt that ends with it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Place] = [Place(f"place{number}", mib=8) for number in range(3)]
        self.stored: list[set[str]] = [set(), set(), set()]
        self.pinned: list[dict[str, set[str]]] = [{}, {}, {}]
        self.pins = 0

    @rule(at=places, prompt=prompts)
    def store(self, at: int, prompt: str) -> None:
        self.places[at].store(tokens(prompt))
        self.stored[at] |= beginnings(prompt)

    @rule(at=places, prompt=prompts)
    def pin(self, at: int, prompt: str) -> None:
        self.pins += 1
        self.places[at].engine.memory_tier.pin(None, pack_tokens(tokens(prompt)), str(self.pins))
        self.pinned[at][str(self.pins)] = self.found(at, prompt)

    @rule(at=places)
    def unpin_all(self, at: int) -> None:
        self.places[at].engine.memory_tier.unpin(None, None)
        self.pinned[at].clear()

    @rule(source=places, goal=places, prompt=st.none() | prompts, copy=st.booleans())
    def move(self, source: int, goal: int, prompt: str | None, copy: bool) -> None:
        if source == goal:
            return
        wanted = set(self.stored[source]) if prompt is None else self.found(source, prompt)
        asked = None if prompt is None else tokens(prompt)
        outcome = self.places[goal].move(self.places[source], asked, copy=copy)
        assert outcome.state == "done", outcome.message
        assert outcome.progress.chunks_done == len(wanted)
        self.stored[goal] |= wanted
        if not copy:
            self.stored[source] -= self.free_to_go(source, wanted)

    @invariant()
    def each_place_holds_what_it_should(self) -> None:
        for place, stored in zip(self.places, self.stored, strict=True):
            assert place.everything() == {key(prompt) for prompt in stored}
            for prompt in stored:
                assert place.hit(tokens(prompt)) == len(tokens(prompt)) or not (
                    beginnings(prompt) <= stored
                )

    @invariant()
    def nothing_is_held_for_anybody(self) -> None:
        assert all(place.idle for place in self.places)

    def found(self, at: int, prompt: str) -> set[str]:
        """What a walk along the prompt finds: also a tail for a prompt that goes on otherwise is
        a match of none of its tokens here, because no two pieces begin alike."""
        found: set[str] = set()
        for end in range(1, len(prompt) + 1):
            if prompt[:end] not in self.stored[at]:
                break
            found.add(prompt[:end])
        return found

    def free_to_go(self, at: int, wanted: set[str]) -> set[str]:
        kept = set().union(*self.pinned[at].values()) if self.pinned[at] else set()
        gone: set[str] = set()
        for prompt in sorted(wanted, key=len, reverse=True):
            left = self.stored[at] - gone
            followed = any(other[:-1] == prompt for other in left)
            if prompt not in kept and not followed:
                gone.add(prompt)
        return gone

    def teardown(self) -> None:
        for place in self.places:
            place.close()


def tokens(prompt: str) -> list[int]:
    return [token for piece in prompt for token in ALPHABET[piece]]


def beginnings(prompt: str) -> set[str]:
    return {prompt[:end] for end in range(1, len(prompt) + 1)}


def key(prompt: str) -> bytes:
    return list(chain(BASE.digest, pack_tokens(tokens(prompt)), CHUNK))[-1].key


TestMoves = Moves.TestCase
TestMoves.settings = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
