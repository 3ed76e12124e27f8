"""Match a token sequence against the key index: the prefix of it that each holder has."""

from __future__ import annotations

from typing import NamedTuple

from blake3 import blake3

from lmcache_kit.controller.key_index import KeyIndex
from lmcache_kit.keys import KEY_BYTES, TOKEN_BYTES, ChunkKey, chunk_key

END = "end"
MISSING = "missing"
ELSEWHERE = "elsewhere"


class PrefixMatch(NamedTuple):
    """``holders`` (a mask) have the first ``tokens`` tokens; ``stopped`` tells why no more."""

    holders: int
    tokens: int
    stopped: str


class MissPoint(NamedTuple):
    """The place where holders leave the walk: after the chunk ``parent``, at token ``start``.

    ``rest`` has the packed tokens of the chunk they lack. ``held`` is the mask of holders that
    have this chunk, or None when the walk has not looked it up.
    """

    parent: ChunkKey
    start: int
    rest: bytes
    held: int | None


def match(
    index: KeyIndex, namespace: bytes, packed: bytes, chunk_size: int, candidates: int
) -> list[PrefixMatch]:
    """Walk the chain of ``packed`` tokens, and return the matches of holders that have any.

    ``namespace`` is a digest, ``candidates`` the mask of the holders to consider. A holder stays
    in the walk only while it has every chunk so far, so that a gap is never credited.
    """
    total = len(packed) // TOKEN_BYTES
    current = candidates & index.visible
    parent = namespace[:KEY_BYTES]
    found: list[PrefixMatch] = []
    whole = total - total % chunk_size
    step = chunk_size * TOKEN_BYTES
    for offset in range(0, whole * TOKEN_BYTES, step):
        if not current:
            return found
        key = chunk_key(namespace, parent, packed[offset : offset + step])
        held = index.held(key)
        stay = current & held
        if stay != current:
            miss = MissPoint(parent, offset // TOKEN_BYTES, packed[offset : offset + step], held)
            found += _match_rest(index, namespace, miss, current ^ stay)
            current = stay
        parent = key
    if not current:
        return found
    if whole == total:
        return [*found, PrefixMatch(current, total, END)] if total else []
    miss = MissPoint(parent, whole, packed[whole * TOKEN_BYTES :], None)
    for each in _match_rest(index, namespace, miss, current):
        found.append(each._replace(stopped=END) if each.tokens == total else each)
    return found


def _match_rest(
    index: KeyIndex, namespace: bytes, miss: MissPoint, holders: int
) -> list[PrefixMatch]:
    """Return the matches of holders that lack a chunk, but may have the beginning of it."""
    found: list[PrefixMatch] = []
    more = bool(miss.held)
    for tokens, held in _partial_chunks(index, namespace, miss):
        if took := holders & held:
            found.append(PrefixMatch(took, miss.start + tokens, ELSEWHERE if more else MISSING))
            holders ^= took
        more = True
    if holders and miss.start:
        found.append(PrefixMatch(holders, miss.start, ELSEWHERE if more else MISSING))
    return found


def _partial_chunks(index: KeyIndex, namespace: bytes, miss: MissPoint) -> list[tuple[int, int]]:
    """Return token count and holders of each stored beginning of the missing chunk, longest first.

    The whole rest counts as one unless the walk has looked it up.
    """
    room = len(miss.rest) // TOKEN_BYTES
    lengths = sorted(length for length in index.partial_lengths(miss.parent) if length < room)
    if miss.held is None:
        lengths.append(room)
    matched: list[tuple[int, int]] = []
    hasher = blake3(namespace + miss.parent)
    done = 0
    for length in lengths:
        hasher.update(miss.rest[done : length * TOKEN_BYTES])
        done = length * TOKEN_BYTES
        if held := index.held(hasher.digest(KEY_BYTES)):
            matched.append((length, held))
    matched.reverse()
    return matched
