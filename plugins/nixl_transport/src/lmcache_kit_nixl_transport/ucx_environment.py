"""UCX's environment variables: read, and set for the time in which UCX starts."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

TLS = "UCX_TLS"
DEVICES = "UCX_NET_DEVICES"


def requested() -> str:
    """Return UCX's variables that are set, such as ``UCX_TLS=rc``; empty if none is."""
    settings = [f"{name}={os.environ[name]}" for name in (TLS, DEVICES) if name in os.environ]
    return " and ".join(settings)


def allows(transports: Collection[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``UCX_TLS`` allows at least one of these transports (UCX's names and groups)."""
    value = environ.get(TLS, "all")
    names = {name.strip() for name in value.removeprefix("^").split(",")}
    if value.startswith("^"):
        return not names & set(transports)
    return bool(names & {"all", *transports})


@contextmanager
def loopback_only(host: str) -> Iterator[None]:
    """Restrict UCX to the loopback interface if ``host`` is a loopback address.

    Otherwise UCX listens on every network interface. A value in the environment is kept.
    """
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
