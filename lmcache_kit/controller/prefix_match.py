"""How much of a token sequence each holder has, from its first token on and without a gap."""

from __future__ import annotations

from typing import NamedTuple

from blake3 import blake3

from lmcache_kit.controller.key_index import KeyIndex
from lmcache_kit.keys import KEY_BYTES, TOKEN_BYTES, ChunkKey, chunk_key

END = "end"
MISSING = "missing"
ELSEWHERE = "elsewhere"


class PrefixMatch(NamedTuple):
    """``holders`` (a mask) have the first ``tokens`` tokens, and why it ends there."""

    holders: int
    tokens: int
    stopped: str


class MissPoint(NamedTuple):
    """The place where holders leave the walk: after ``parent``, at token ``start``.

    ``rest``: packed tokens of the chunk they lack. ``whole``: who has all of it; None when
    nobody looked yet.
    """

    parent: ChunkKey
    start: int
    rest: bytes
    whole: int | None


def match(
    index: KeyIndex, namespace: bytes, packed: bytes, chunk_size: int, candidates: int
) -> list[PrefixMatch]:
    """Walk the chain of ``packed`` tokens; holders that have nothing are left out.

    ``namespace`` is a digest, ``candidates`` the mask of holders that are asked for. A holder
    stays in the walk only while it has every chunk so far, so that a gap is never credited.
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
            gap = MissPoint(parent, offset // TOKEN_BYTES, packed[offset : offset + step], held)
            found += _end(index, namespace, gap, current ^ stay)
            current = stay
        parent = key
    if not current:
        return found
    if whole == total:
        return [*found, PrefixMatch(current, total, END)] if total else []
    gap = MissPoint(parent, whole, packed[whole * TOKEN_BYTES :], None)
    for stretch in _end(index, namespace, gap, current):
        ended = stretch.tokens == total
        found.append(stretch._replace(stopped=END) if ended else stretch)
    return found


def _end(index: KeyIndex, namespace: bytes, gap: MissPoint, holders: int) -> list[PrefixMatch]:
    """Stretches of holders that lack a chunk; they may have a beginning of it."""
    found: list[PrefixMatch] = []
    more = bool(gap.whole)
    for tokens, held in _tails(index, namespace, gap):
        if took := holders & held:
            found.append(PrefixMatch(took, gap.start + tokens, ELSEWHERE if more else MISSING))
            holders ^= took
        more = True
    if holders and gap.start:
        found.append(PrefixMatch(holders, gap.start, ELSEWHERE if more else MISSING))
    return found


def _tails(index: KeyIndex, namespace: bytes, gap: MissPoint) -> list[tuple[int, int]]:
    """Token counts and holders of stored partial chunks that the gap starts with, longest first.

    All of it is tried too, unless somebody has done so.
    """
    room = len(gap.rest) // TOKEN_BYTES
    lengths = sorted(length for length in index.tail_lengths(gap.parent) if length < room)
    if gap.whole is None:
        lengths.append(room)
    matched: list[tuple[int, int]] = []
    hasher = blake3(namespace + gap.parent)
    done = 0
    for length in lengths:
        hasher.update(gap.rest[done : length * TOKEN_BYTES])
        done = length * TOKEN_BYTES
        if held := index.held(hasher.digest(KEY_BYTES)):
            matched.append((length, held))
    matched.reverse()
    return matched
