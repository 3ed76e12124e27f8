"""Moves, as the controller sees them: who gives, who takes, and what proves that we want it."""

from __future__ import annotations

import msgspec

from lmcache_kit.controller.registry import Process
from lmcache_kit.errors import ControlError, InvalidQuery, UnknownName
from lmcache_kit.interfaces.operations import Move, Peer
from lmcache_kit.protocol.capability import Capability


def check_location(process: Process, location: str) -> None:
    """Raises UnknownName, listing the locations of this instance."""
    if location not in process.said.locations:
        raise UnknownName("location", location, sorted(process.said.locations))


def check_ends(order: Move, source: Process, destination: Process) -> None:
    """Raises UnknownName for a location, InvalidQuery for two ends that cannot be meant, and
    ControlError for one that takes no part in moves."""
    check_location(source, order.source_location)
    check_location(destination, order.location)
    if source.instance_id == destination.instance_id:
        if order.source_location == order.location:
            raise InvalidQuery(
                "source and destination are the same",
                hint="Name another instance or location to move to",
            )
        return
    for process in (source, destination):
        if not process.said.peer_url:
            raise ControlError(
                f"instance {process.instance_id!r} takes no part in moves",
                hint="Set enable_p2p, p2p_host and p2p_init_ports in its configuration",
            )


def with_peer(order: Move, event_id: str, destination: Process, source: Process) -> Move:
    """The order as its destination gets it: it says where to fetch from, and carries the proof
    that the source asks for. From one location of a cache process to another neither is needed."""
    if source is destination:
        return order
    said = source.said
    claim = Capability.of(order, event_id, destination.instance_id)
    peer = Peer(event_id, said.peer_url or "", said.incarnation, claim.seal(said.peer_key))
    return msgspec.structs.replace(order, peer=peer)
