"""RDMA devices of this host that UCX may use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lmcache_kit_nixl_transport.ucx_environment import DEVICES, allows

SYSFS = Path("/sys/class/infiniband")
_KINDS = ("", "_v", "_x", "_verbs", "_mlx5")
_UCX_NAMES = ("ib", *(name + kind for name in ("rc", "dc", "ud") for kind in _KINDS))


def active_devices(sysfs: Path = SYSFS, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return devices with an active port that ``UCX_TLS`` and ``UCX_NET_DEVICES`` allow."""
    if not allows(_UCX_NAMES, environ):
        return ()
    ports = (state.parent for state in sysfs.glob("*/ports/*/state") if _is_active(state))
    names = {(port.parent.parent.name, port.name) for port in ports}
    wanted = environ.get(DEVICES, "all").split(",")
    return tuple(
        sorted(
            {
                device
                for device, port in names
                if {"all", device, f"{device}:{port}"} & {name.strip() for name in wanted}
            }
        )
    )


def _is_active(state: Path) -> bool:
    try:
        return "ACTIVE" in state.read_text()
    except OSError:
        return False
