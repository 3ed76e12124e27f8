"""Answer to "who holds the KV of these tokens?", from the index alone."""

from __future__ import annotations

import sys
import uuid
from array import array
from collections.abc import Sequence

from lmcache_kit.controller.key_index import Owner, bits
from lmcache_kit.controller.prefix_match import match
from lmcache_kit.controller.registry import Registry
from lmcache_kit.errors import InvalidQuery
from lmcache_kit.interfaces.frontend import InstanceMatch, LocationMatch, LookupAnswer, LookupQuery
from lmcache_kit.keys import TOKEN_BYTES, pack_tokens

_TOKENS_END = 1 << (8 * TOKEN_BYTES)


def lookup(registry: Registry, query: LookupQuery) -> LookupAnswer:
    """Raises UnknownName for an instance that is not known, InvalidQuery for impossible tokens."""
    candidates = -1
    if query.instance_id is not None:
        process = registry.find(query.instance_id)
        candidates = sum(each.holder.mask for each in process.followers.values())
    packed = pack(query.tokens)
    best: dict[Owner, LocationMatch] = {}
    index = registry.index
    for base in registry.namespaces():
        if query.model is not None and base.model != query.model:
            continue
        namespace = base.variant(cache_salt=query.cache_salt).digest
        for stretch in match(index, namespace, packed, base.chunk_size, candidates):
            for bit in bits(stretch.holders):
                owner = index.owner(bit)
                known = best.get(owner)
                if known is None or known.tokens < stretch.tokens:
                    best[owner] = LocationMatch(owner.location, stretch.tokens, stretch.stopped)
    return LookupAnswer(uuid.uuid4().hex, _by_instance(registry, best))


def pack(tokens: Sequence[int]) -> bytes:
    """Tokens as little-endian u32; an ``array("I")`` of them is fastest.

    Raises InvalidQuery for the first one that is no token.
    """
    if isinstance(tokens, array) and tokens.typecode == "I" and sys.byteorder == "little":
        return tokens.tobytes()
    try:
        return pack_tokens(tokens)
    except (OverflowError, TypeError):
        for at, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < _TOKENS_END:
                raise InvalidQuery(
                    f"tokens[{at}] is {token!r:.50}",
                    hint=f"A token is an integer from 0 to {_TOKENS_END - 1}",
                ) from None
        raise


def _by_instance(registry: Registry, best: dict[Owner, LocationMatch]) -> tuple[InstanceMatch, ...]:
    """Of equally long ones that of the higher tier first."""
    grouped: dict[str, list[LocationMatch]] = {}
    for owner, found in best.items():
        grouped.setdefault(owner.instance_id, []).append(found)
    for instance_id, locations in grouped.items():
        tiers = registry.find(instance_id).said.locations
        locations.sort(key=lambda found: (-found.tokens, tiers.index(found.location)))
    instances = [InstanceMatch(name, tuple(found)) for name, found in grouped.items()]
    instances.sort(key=lambda instance: (-instance.best.tokens, instance.instance_id))
    return tuple(instances)
