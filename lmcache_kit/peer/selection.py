"""Which transports a move may go by, and in which order they are tried."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_kit.specs import TransportSpec

AUTO = "auto"
ONE_SIDED = "one-sided"
ANY_NETWORK = "any-network"
"""Capability of transports that work wherever two processes reach each other by TCP."""


def candidates(channel: str, specs: Sequence[TransportSpec]) -> list[str]:
    """Return names in the order to try for ``transfer_channel: <channel>``, of those in ``specs``.

    ``auto`` is all of them, one-sided ones first; a name is that one, then those for any network.

    >>> rdma = TransportSpec("rdma", "m:R", "", capabilities=frozenset({"one-sided"}))
    >>> stream = TransportSpec("stream", "m:S", "", capabilities=frozenset({"any-network"}))
    >>> candidates("auto", [stream, rdma]), candidates("rdma", [stream, rdma])
    (['rdma', 'stream'], ['rdma', 'stream'])
    >>> candidates("stream", [stream, rdma])
    ['stream']
    """
    if channel == AUTO:
        ordered = sorted(specs, key=lambda spec: (ONE_SIDED not in spec.capabilities, spec.name))
        return [spec.name for spec in ordered]
    anywhere = sorted(spec.name for spec in specs if ANY_NETWORK in spec.capabilities)
    names = {spec.name for spec in specs}
    return [name for name in dict.fromkeys((channel, *anywhere)) if name in names]
