"""Plugin hooks: the backend ``LocalDiskBackend`` and the command ``gc``."""

from __future__ import annotations

from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import BackendSpec, CommandSpec, ConfigKey


@hookimpl
def register_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="LocalDiskBackend",
            target="lmcache_kit_disk_backend.backend:LocalDiskBackend",
            summary="KV cache in files on a local disk; survives restarts",
            config="lmcache_kit_disk_backend.options:DiskOptions",
            keys=(
                ConfigKey(
                    "local_disk",
                    option="path",
                    help="Folder for KV on disk, a path or `file://` and a path; adds this tier",
                    type="folder",
                    selects=True,
                    needs="max_local_disk_size",
                ),
                ConfigKey(
                    "max_local_disk_size",
                    option="max_size_gib",
                    help="GiB of files in `local_disk`, at most, for this instance",
                    type="number",
                    default=0.0,
                ),
            ),
            inherits={"lmcache_instance_id": "subfolder"},
        )
    ]


@hookimpl
def register_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="gc",
            target="lmcache_kit_disk_backend.command:command",
            summary="List folders of KV on disk, and remove those that nobody uses.",
        )
    ]
