"""Moves as the controller prepares them: both ends, and the proof that the controller wants one."""

from __future__ import annotations

import msgspec

from lmcache_kit.controller.registry import Process
from lmcache_kit.errors import ControlError, InvalidQuery, UnknownName
from lmcache_kit.interfaces.operations import Move, Peer
from lmcache_kit.protocol.capability import Capability


def check_location(process: Process, location: str) -> None:
    """Raise UnknownName, which lists the locations of the instance."""
    if location not in process.registration.locations:
        raise UnknownName("location", location, sorted(process.registration.locations))


def check_ends(move: Move, source: Process, destination: Process) -> None:
    """Check that a move is possible between its two ends.

    Raise UnknownName for a location, InvalidQuery when both ends are the same, and ControlError
    for an instance that takes no part in moves.
    """
    check_location(source, move.source_location)
    check_location(destination, move.location)
    if source.instance_id == destination.instance_id:
        if move.source_location == move.location:
            raise InvalidQuery(
                "source and destination are the same",
                hint="Name another instance or location to move to",
            )
        return
    for process in (source, destination):
        if not process.registration.peer_url:
            raise ControlError(
                f"instance {process.instance_id!r} takes no part in moves",
                hint="Set enable_p2p, p2p_host and p2p_init_ports in its configuration",
            )


def with_peer(move: Move, operation_id: str, destination: Process, source: Process) -> Move:
    """Add the address of the source, and the proof that the source asks for.

    A move from one location of a cache process to another needs neither.
    """
    if source is destination:
        return move
    registered = source.registration
    capability = Capability.of(move, operation_id, destination.instance_id)
    peer = Peer(
        operation_id,
        registered.peer_url or "",
        registered.incarnation,
        capability.seal(registered.peer_key),
    )
    return msgspec.structs.replace(move, peer=peer)
