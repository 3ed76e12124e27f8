"""What the environment tells UCX, and what we tell it."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

TLS = "UCX_TLS"
DEVICES = "UCX_NET_DEVICES"


def asked() -> str:
    """What somebody wants of UCX: ``UCX_TLS=rc``; empty if nobody said anything."""
    said = [f"{name}={os.environ[name]}" for name in (TLS, DEVICES) if name in os.environ]
    return " and ".join(said)


def allows(transports: Collection[str], environ: Mapping[str, str] = os.environ) -> bool:
    """``UCX_TLS`` leaves UCX one of these at least, named as UCX does, its groups included."""
    said = environ.get(TLS, "all")
    names = {name.strip() for name in said.removeprefix("^").split(",")}
    if said.startswith("^"):
        return not names & set(transports)
    return bool(names & {"all", *transports})


@contextmanager
def loopback_only(host: str) -> Iterator[None]:
    """UCX listens on every network interface; where peers reach us by loopback, on that alone."""
    if DEVICES in os.environ or not _is_loopback(host):
        yield
        return
    os.environ[DEVICES] = "lo"
    try:
        yield
    finally:
        del os.environ[DEVICES]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
