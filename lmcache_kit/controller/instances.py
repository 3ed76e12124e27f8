"""Instances: lookups, workers and health. One half of the controller that frontends see."""

from __future__ import annotations

import asyncio
import ipaddress
import sys
import uuid
from array import array
from collections.abc import Sequence

from lmcache_kit.controller.commands import Commands
from lmcache_kit.controller.key_index import Owner, bits
from lmcache_kit.controller.prefix_match import match
from lmcache_kit.controller.registry import Process, Registry
from lmcache_kit.errors import InvalidQuery, UnknownName
from lmcache_kit.interfaces.frontend import (
    InstanceMatch,
    LocationMatch,
    LookupAnswer,
    LookupQuery,
    ModelInfo,
    WorkerInfo,
)
from lmcache_kit.keys import TOKEN_BYTES, pack_tokens

RESOLVE_S = 2.0
_TOKENS_END = 1 << (8 * TOKEN_BYTES)


class Instances:
    """An :class:`~lmcache_kit.interfaces.frontend.InstancesAPI` over the registry and its index.

    ``health_timeout_s`` is the time that a worker has to answer.
    """

    def __init__(
        self, registry: Registry, commands: Commands, *, health_timeout_s: float = 2.0
    ) -> None:
        self._registry = registry
        self._commands = commands
        self._health_timeout_s = health_timeout_s

    def lookup(self, query: LookupQuery) -> LookupAnswer:
        """Match the tokens in every registered namespace that the query admits."""
        registry, index, counts = self._registry, self._registry.index, self._registry.counts
        counts["lookups_total"] += 1
        counts["lookup_tokens_total"] += len(query.tokens)
        candidates, process = -1, None
        if query.instance_id is not None:
            process = registry.find(query.instance_id)
            candidates = sum(replica.holder.mask for replica in process.replicas.values())
        if query.model is not None:
            registry.check_model(query.model, process)
        packed = pack(query.tokens)
        best: dict[Owner, LocationMatch] = {}
        for base in registry.namespaces():
            if query.model is not None and base.model != query.model:
                continue
            namespace = base.variant(cache_salt=query.cache_salt).digest
            for found in match(index, namespace, packed, base.chunk_size, candidates):
                for bit in bits(found.holders):
                    owner = index.owner(bit)
                    known = best.get(owner)
                    if known is None or known.tokens < found.tokens:
                        best[owner] = LocationMatch(owner.location, found.tokens, found.stopped)
        instances = self._by_instance(best)
        if instances:
            counts["lookup_hits_total"] += 1
            counts["lookup_hit_tokens_total"] += instances[0].best.tokens
        return LookupAnswer(uuid.uuid4().hex, instances)

    async def health(self, instance_id: str) -> dict[int, int]:
        """Ask the cache process, which answers for all of its ranks."""
        process = self._registry.reachable(instance_id)
        result = await self._commands.ask(process, "ping", self._health_timeout_s)
        code = 1 if result.error else 0
        return {worker.rank: code for worker in sorted(process.registration.workers)}

    def workers(
        self, instance_id: str | None = None, worker_ids: Sequence[int] | None = None
    ) -> list[WorkerInfo]:
        """List workers by instance and rank."""
        if instance_id is None:
            processes = self._registry.processes()
        else:
            processes = [self._registry.find(instance_id)]
        infos = [info for process in processes for info in _workers(process)]
        if worker_ids is None:
            return infos
        known = sorted({info.worker_id for info in infos})
        for wanted in worker_ids:
            if wanted not in known:
                raise UnknownName("worker", str(wanted), list(map(str, known)))
        return [info for info in infos if info.worker_id in worker_ids]

    async def at_address(self, address: str) -> tuple[str, ...]:
        """Return the instances at an address, those alive first, the latest registration first.

        A host name means the processes that registered under it, and those at its addresses.
        """
        name, addresses = await resolve(address)
        at = [
            process
            for process in self._registry.processes()
            if addresses & {canonical(process.ip), canonical(process.registration.host)}
            or (name and _host_name(process.registration.host) == name)
        ]
        at.sort(key=lambda process: (process.alive, process.registered_at), reverse=True)
        return tuple(process.instance_id for process in at)

    def _by_instance(self, best: dict[Owner, LocationMatch]) -> tuple[InstanceMatch, ...]:
        """Group matches by instance. Of equally long ones the higher tier comes first."""
        grouped: dict[str, list[LocationMatch]] = {}
        for owner, found in best.items():
            grouped.setdefault(owner.instance_id, []).append(found)
        for instance_id, locations in grouped.items():
            tiers = self._registry.find(instance_id).registration.locations
            locations.sort(key=lambda found: (-found.tokens, tiers.index(found.location)))
        instances = [InstanceMatch(name, tuple(found)) for name, found in grouped.items()]
        instances.sort(key=lambda instance: (-instance.best.tokens, instance.instance_id))
        return tuple(instances)


async def resolve(address: str) -> tuple[str, set[str]]:
    """Return the host name in ``address``, or an empty one, and its IP addresses.

    A name that the resolver does not know, or not in time, has no addresses.
    """
    if ip := canonical(address):
        return "", {ip}
    name = _host_name(address)
    if not name:  # which a resolver takes for this host
        return "", set()
    try:
        async with asyncio.timeout(RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(name, None)
    # A name can be one that no encoding allows, or contain a zero byte.
    except (OSError, TimeoutError, ValueError):
        return name, set()
    return name, {ip for *_, (host, *_) in found if (ip := canonical(str(host)))}


def canonical(address: str) -> str:
    """Return an IP address in its one short form; empty for anything else.

    ``[::1]``, ``0:0::1`` and ``::1%lo`` are ``::1``, and ``::ffff:10.0.0.7`` is ``10.0.0.7``.
    """
    try:
        ip = ipaddress.ip_address(address.strip().removeprefix("[").removesuffix("]"))
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ipaddress.IPv6Address(int(ip))
    return str(ip)


def _host_name(text: str) -> str:
    return text.strip().removesuffix(".").lower()


def pack(tokens: Sequence[int]) -> bytes:
    """Pack tokens as little-endian u32; an ``array("I")`` of them is fastest.

    Raise InvalidQuery, which names the first element that is not a token.
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


def _workers(process: Process) -> list[WorkerInfo]:
    models = tuple(
        ModelInfo(
            each.model,
            each.weights,
            each.config,
            each.generation,
            each.chunk_size,
            each.digest.hex(),
        )
        for each in process.registration.namespaces
    )
    return [
        WorkerInfo(
            instance_id=process.instance_id,
            worker_id=worker.rank,
            ip=process.ip or process.registration.host,
            port=worker.port,
            peer_init_url=process.registration.peer_url,
            registration_time=process.registered_at,
            last_heartbeat_time=process.heard_at,
            alive=process.alive,
            models=models,
        )
        for worker in sorted(process.registration.workers)
    ]
