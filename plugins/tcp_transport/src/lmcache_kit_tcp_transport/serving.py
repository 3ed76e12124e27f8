"""The serving side of a connection: answers requests with frames."""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from lmcache_kit_tcp_transport.connection import Connection
from lmcache_kit_tcp_transport.offers import Offer, Offers
from lmcache_kit_tcp_transport.wire import (
    HEADER_BYTES,
    MAX_REASON_BYTES,
    Frame,
    Kind,
    Op,
    Request,
    UnsupportedVersion,
    pack_frame,
    unpack_request,
)

STALL_S = 60.0
"""Time without progress after which a peer that takes no bytes is disconnected."""


def answer_all(peer: Connection, memory: memoryview, offers: Offers) -> None:
    """Answer requests until the connection ends, which raises TransportError."""
    while True:
        header = peer.receive_exactly(HEADER_BYTES)
        try:
            request = unpack_request(header)
        except UnsupportedVersion as error:
            _refuse(peer, error.message)
            raise
        _answer(peer, request, memory, offers)


def _answer(peer: Connection, request: Request, memory: memoryview, offers: Offers) -> None:
    if request.op is Op.HELLO:
        peer.send(pack_frame(Frame(Kind.HELLO)), stall_s=STALL_S)
        return
    with offers.sending(request.token, peer) as offer:
        if offer is None:
            _refuse(peer, "the offer is unknown or withdrawn")
        elif len(offer.regions) != request.regions:
            _refuse(
                peer, f"{request.regions} regions are requested, and {len(offer.regions)} offered"
            )
        else:
            _send(peer, offer, memory)


def _send(peer: Connection, offer: Offer, memory: memoryview) -> None:
    # This frame goes out with the first region's header and bytes, without a packet of its own.
    header = pack_frame(Frame(Kind.READING, number=len(offer.regions)))
    for number, ((offset, nbytes), checksum) in enumerate(offer.regions):
        header += pack_frame(Frame(Kind.REGION, number, nbytes, checksum))
        peer.send(header, memory[offset : offset + nbytes], stall_s=STALL_S)
        header = b""
    if header:
        peer.send(header, stall_s=STALL_S)


def _refuse(peer: Connection, reason: str) -> None:
    text = reason.encode()[:MAX_REASON_BYTES]
    frame = Frame(Kind.REFUSED, nbytes=len(text), checksum=xxh3_64_intdigest(text))
    peer.send(pack_frame(frame) + text, stall_s=STALL_S)
