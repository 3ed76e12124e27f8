from __future__ import annotations

import pytest

from lmcache_kit.cache.index.builtin_policies import make_eviction_policy
from lmcache_kit.cache.index.policies import FIFO, LFU, LRU
from lmcache_kit.interfaces import EvictionPolicy


def after(policy: EvictionPolicy, history: str) -> str:
    """Feeds ``+a`` (added), ``.a`` (touched) and ``-a`` (removed); returns who leaves, in order."""
    steps = {"+": policy.added, ".": policy.touched, "-": policy.removed}
    for step, key in zip(history[::2], history[1::2], strict=True):
        steps[step](key.encode())
    return b"".join(policy.victims()).decode()


def test_lru_lets_the_one_go_that_was_not_used_for_longest() -> None:
    assert after(LRU(), "+a+b+c.a.b") == "cab"


def test_fifo_lets_the_one_go_that_came_first() -> None:
    assert after(FIFO(), "+a+b+c.a.a.b") == "abc"


def test_lfu_lets_the_one_go_that_was_used_least() -> None:
    assert after(LFU(), "+a+b+c.a.a.b") == "cba"


def test_lfu_lets_the_one_go_that_was_not_used_for_longest_of_those_used_equally() -> None:
    assert after(LFU(), "+a+b+c.b.a.c") == "bac"


@pytest.mark.parametrize("policy", [LRU(), FIFO(), LFU()])
def test_who_was_removed_does_not_leave_again(policy: EvictionPolicy) -> None:
    assert after(policy, "+a+b.a-a") == "b"


@pytest.mark.parametrize("policy", [LRU(), FIFO(), LFU()])
def test_who_comes_back_starts_anew(policy: EvictionPolicy) -> None:
    assert after(policy, "+a.a.a-a+b+a") == "ba"


@pytest.mark.parametrize("policy", [LRU(), FIFO(), LFU()])
def test_without_chunks_nobody_leaves(policy: EvictionPolicy) -> None:
    assert after(policy, "+a-a") == ""


@pytest.mark.parametrize(
    ("name", "kind"), [("LRU", LRU), ("lru", LRU), ("Fifo", FIFO), ("lfu", LFU)]
)
def test_policies_are_made_by_name_in_any_case(name: str, kind: type[EvictionPolicy]) -> None:
    assert type(make_eviction_policy(name)) is kind


def test_each_location_gets_a_policy_of_its_own() -> None:
    assert make_eviction_policy("LRU") is not make_eviction_policy("LRU")


def test_a_name_of_another_plugin_is_left_to_that_plugin() -> None:
    assert make_eviction_policy("ARC") is None
