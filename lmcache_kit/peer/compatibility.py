"""Compare namespaces of two instances, to see whether chunks of one are of use to the other."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_kit.cache.descriptors import NamespaceInfo
from lmcache_kit.keys import Namespace


def difference(info: NamespaceInfo, theirs: Sequence[Namespace], ours: Sequence[Namespace]) -> str:
    """Name the fields in which our workers differ from those that stored a nameinfo.

    ``theirs`` and ``ours`` are base namespaces. Empty when chunks fit: when a base is shared, and
    also when none is known here, since workers may yet start. A digest that is no base's own is of
    a variant of one, by LoRA, salt or tags, and fits where that base is shared.

    >>> from lmcache_kit.layout import KVLayout
    >>> a, b = (Namespace("m", KVLayout("float16", 2, 1, 64), size) for size in (16, 256))
    >>> difference(NamespaceInfo(a.digest, 16, 1, ()), [a], [b])
    'chunk_size is 16 there and 256 here'
    """
    if not ours:
        return ""
    stored = [base for base in theirs if base.digest == info.digest]
    like = [base for base in theirs if _shape(base) == (info.chunk_size, info.world_size)]
    possible = stored or like
    if not possible:
        return "no worker there has registered a namespace like this"
    if {base.digest for base in possible} & {base.digest for base in ours}:
        return ""
    differences = [tuple(one.differences(other)) for one in possible for other in ours]
    fewest = min(len(each) for each in differences)
    named = next(each for each in differences if len(each) == fewest)
    return ", ".join(f"{name} is {there} there and {here} here" for name, there, here in named)


def _shape(base: Namespace) -> tuple[int, int]:
    return base.chunk_size, base.tensor_parallel
