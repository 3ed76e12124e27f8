"""Which transports a move may go by, and in which order they are tried."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_kit.specs import TransportSpec

AUTO = "auto"
ONE_SIDED = "one-sided"
ANYWHERE = "tcp"
"""The transport that works wherever two processes can talk at all."""


def candidates(channel: str, specs: Sequence[TransportSpec]) -> list[str]:
    """Names in the order to try for ``transfer_channel: <channel>``, of those in ``specs``.

    ``auto`` is all of them, one-sided ones first; a name is that one, and TCP where it cannot
    serve.

    >>> nixl = TransportSpec("nixl", "m:N", "", capabilities=frozenset({"one-sided"}))
    >>> tcp = TransportSpec("tcp", "m:T", "")
    >>> candidates("auto", [tcp, nixl]), candidates("nixl", [tcp, nixl]), candidates("tcp", [tcp])
    (['nixl', 'tcp'], ['nixl', 'tcp'], ['tcp'])
    """
    if channel == AUTO:
        ordered = sorted(specs, key=lambda spec: (ONE_SIDED not in spec.capabilities, spec.name))
        return [spec.name for spec in ordered]
    names = {spec.name for spec in specs}
    return [name for name in dict.fromkeys((channel, ANYWHERE)) if name in names]
