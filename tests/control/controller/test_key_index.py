"""The index alone: digests, dead holders, and bits that are used again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache_kit.controller.key_index import KeyIndex, Owner, bits
from lmcache_kit.protocol.control import PartialChunkEntry

KEYS = [bytes([i]) * 16 for i in range(40)]
OWNER = Owner("a", "ram")


def test_a_hidden_holder_is_not_found_and_keeps_its_keys() -> None:
    index = KeyIndex()
    holder = index.open(OWNER)
    index.show(holder)
    index.add(holder, KEYS[:2])
    index.hide(holder)
    assert index.held(KEYS[0]) == 0
    index.show(holder)
    assert index.held(KEYS[0]) == holder.mask


def test_a_closed_holder_is_gone_at_once_and_swept_later() -> None:
    index = KeyIndex()
    dead, other = index.open(OWNER), index.open(OWNER)
    for holder in (dead, other):
        index.show(holder)
    index.add(dead, KEYS[:20])
    index.add(other, KEYS[:1])
    index.close(dead)
    assert index.held(KEYS[0]) == other.mask
    assert index.held(KEYS[1]) == 0
    assert (len(index), index.dead) == (20, 1)
    while index.sweep():
        pass
    assert (len(index), index.dead, index.holders) == (1, 0, 1)


def test_a_bit_is_not_used_again_before_it_is_clean() -> None:
    index = KeyIndex()
    first = index.open(OWNER)
    index.add(first, KEYS)
    index.sweep()
    index.close(first)
    index.sweep()
    second = index.open(OWNER)
    assert second.bit != first.bit
    while index.sweep():
        pass
    assert index.open(OWNER).bit == first.bit
    assert not list(index.keys_of(second))


def test_a_holder_that_dies_during_a_sweep_waits_for_the_next_one() -> None:
    index = KeyIndex()
    first, second = index.open(OWNER), index.open(OWNER)
    index.add(first, KEYS)
    index.add(second, KEYS)
    index.close(first)
    for _ in range(20):
        index.sweep()
    index.close(second)
    for _ in range(256 - 20):
        index.sweep()
    assert index.dead == 1
    assert index.open(OWNER).bit == first.bit
    while index.sweep():
        pass
    assert len(index) == 0


def test_tails_go_with_the_last_holder_of_their_key() -> None:
    index = KeyIndex()
    a, b = index.open(OWNER), index.open(OWNER)
    tail = PartialChunkEntry(KEYS[1], KEYS[0], 3)
    for holder in (a, b):
        index.add(holder, KEYS[1:2], (tail,))
    index.remove(a, KEYS[1:2])
    assert list(index.partial_lengths(KEYS[0])) == [3]
    index.remove(b, KEYS[1:2])
    assert list(index.partial_lengths(KEYS[0])) == []


def test_a_tail_of_a_key_that_nobody_holds_is_not_kept() -> None:
    index = KeyIndex()
    index.add(index.open(OWNER), KEYS[:1], (PartialChunkEntry(KEYS[1], KEYS[0], 3),))
    assert list(index.partial_lengths(KEYS[0])) == []


@given(st.lists(st.tuples(st.booleans(), st.sets(st.sampled_from(KEYS)))))
def test_the_digest_is_that_of_the_keys_whatever_is_repeated(
    changes: list[tuple[bool, set[bytes]]],
) -> None:
    index = KeyIndex()
    holder = index.open(OWNER)
    truth: set[bytes] = set()
    for add, keys in changes:
        (index.add if add else index.remove)(holder, keys)
        truth = truth | keys if add else truth - keys
    xor = 0
    for key in truth:
        xor ^= int.from_bytes(key[:8], "little")
    assert (holder.keys, holder.xor) == (len(truth), xor)
    assert set(index.keys_of(holder)) == truth


@given(st.sets(st.integers(0, 2000)))
def test_bits_are_listed_from_the_lowest(numbers: set[int]) -> None:
    assert list(bits(sum(1 << number for number in numbers))) == sorted(numbers)
