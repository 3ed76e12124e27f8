"""The plugins of this repository, as data: the only module of the core that names them.

Messages say by this table which distribution to install for a name or a key, and the defaults of
the configuration and of the command line come from here. No code path depends on a name.
"""

from __future__ import annotations

from typing import NamedTuple

from lmcache_kit.specs import Kind


class FirstParty(NamedTuple):
    """A plugin of ours. ``keys``: keys of LMCache that it serves once it is installed."""

    kind: Kind
    name: str
    distribution: str
    keys: tuple[str, ...] = ()


FIRST_PARTY: tuple[FirstParty, ...] = (
    FirstParty("backend", "LocalCPUBackend", "lmcache-kit-cpu-backend"),
    FirstParty(
        "backend",
        "LocalDiskBackend",
        "lmcache-kit-disk-backend",
        keys=("local_disk", "max_local_disk_size"),
    ),
    FirstParty("backend", "ValkeyBackend", "lmcache-kit-valkey-backend", keys=("remote_url",)),
    FirstParty("codec", "cachegen", "lmcache-kit-cachegen"),
    FirstParty("frontend", "http", "lmcache-kit-http-api"),
    FirstParty("transport", "nixl", "lmcache-kit-nixl-transport", keys=("nixl_backends",)),
    FirstParty("transport", "tcp", "lmcache-kit-tcp-transport"),
)

DEFAULT_MEMORY_BACKEND = "LocalCPUBackend"
DEFAULT_CODEC = "cachegen"
DEFAULT_FRONTEND = "http"


def distribution_of(kind: Kind, name: str) -> str:
    """Return the distribution of ours that provides a name, or an empty string."""
    found = (each.distribution for each in FIRST_PARTY if (each.kind, each.name) == (kind, name))
    return next(found, "")


def provider_of(key: str) -> FirstParty | None:
    """Return the plugin of ours that serves a key of the configuration, or None."""
    return next((each for each in FIRST_PARTY if key in each.keys), None)


def install_command(*kinds: Kind) -> str:
    """Return the command that installs all of ours of these kinds.

    >>> install_command("codec")
    'pip install lmcache-kit-cachegen'
    """
    wanted = [each.distribution for each in FIRST_PARTY if each.kind in kinds]
    return f"pip install {' '.join(wanted)}"
