"""The file ``owner.json`` of a store's folder: whose folder it is."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "owner.json"
FORMAT = 1
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Owner:
    """The latest process that opened a store.

    ``subfolder`` is the option: the ``lmcache_instance_id`` where the configuration says no more.
    ``opened`` is in seconds since the epoch.
    """

    subfolder: str
    host: str
    pid: int
    opened: float

    @classmethod
    def of_this_process(cls, subfolder: str) -> Owner:
        """Describe this process, which opens a store now."""
        return cls(subfolder, socket.gethostname(), os.getpid(), time.time())

    def write(self, folder: Path) -> None:
        """Write the file in one step. A folder that cannot take it does without."""
        said = {
            "about": "KV cache of lmcache-kit, one file per chunk. `lmcache-kit gc` removes "
            "folders that no process uses any more.",
            "format": FORMAT,
            **asdict(self),
        }
        temporary = folder / f"{NAME}.tmp"
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(said, file, indent=2)
            temporary.replace(folder / NAME)

    @classmethod
    def read(cls, folder: Path) -> Owner | None:
        """Return what the file says; None without one that can be read."""
        try:
            descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, encoding="utf-8") as file:
                said = json.loads(file.read(_MAX_BYTES))
            return cls(
                str(said["subfolder"]), str(said["host"]), int(said["pid"]), float(said["opened"])
            )
        except (OSError, ValueError, LookupError, TypeError):
            return None
