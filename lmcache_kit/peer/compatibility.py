"""Whether chunks of one instance can be of use to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmcache_kit.cache.descriptors import NamespaceInfo
from lmcache_kit.keys import Namespace


def difference(space: NamespaceInfo, theirs: Sequence[Namespace], ours: Sequence[Namespace]) -> str:
    """In what the workers here differ from those that stored a namespace; empty if in nothing.

    ``theirs`` and ``ours`` are base namespaces. Where none is known here, what comes may be for
    workers that are yet to start. A digest of nobody's base is a variant of one, by LoRA, salt or
    tags, and fits where that base is shared.

    >>> from lmcache_kit.layout import KVLayout
    >>> a, b = (Namespace("m", KVLayout("float16", 2, 1, 64), size) for size in (16, 256))
    >>> difference(NamespaceInfo(a.digest, 16, 1, ()), [a], [b])
    'chunk_size is 16 there and 256 here'
    """
    if not ours:
        return ""
    stored = [base for base in theirs if base.digest == space.digest]
    like = [base for base in theirs if _shape(base) == (space.chunk_size, space.world_size)]
    possible = stored or like
    if not possible:
        return "no worker there has said what it serves"
    if any(base in ours for base in possible):
        return ""
    differences = [tuple(_differences(one, other)) for one in possible for other in ours]
    fewest = min(len(each) for each in differences)
    return ", ".join(next(each for each in differences if len(each) == fewest))


def _shape(base: Namespace) -> tuple[int, int]:
    return base.chunk_size, base.tensor_parallel


def _differences(theirs: Namespace, ours: Namespace) -> Iterator[str]:
    fields = [name for name in Namespace.__struct_fields__ if name != "layout"]
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in fields]
    pairs += [
        (name, getattr(theirs.layout, name), getattr(ours.layout, name))
        for name in theirs.layout.__struct_fields__
    ]
    for name, there, here in pairs:
        if there != here:
            yield f"{name} is {there} there and {here} here"
