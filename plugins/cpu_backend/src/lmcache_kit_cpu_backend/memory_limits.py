"""Memory that is available on this machine, within the limits of its cgroups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Available(NamedTuple):
    """Available memory in bytes, and the source of the number."""

    nbytes: int
    source: str


def probe() -> str:
    """Return the reason why the backend cannot work here; empty when it can."""
    if not hasattr(os, "memfd_create"):
        return "it needs memfd_create(2), which exists on Linux only"
    return ""


def available_memory(root: Path = Path("/")) -> Available | None:
    """Return the least of what the machine and each enclosing cgroup leave; None if unknown."""
    limits = [*_machine(root), *_cgroups(root)]
    return min(limits, key=lambda limit: limit.nbytes, default=None)


def _machine(root: Path) -> Iterator[Available]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("MemAvailable:"):
            yield Available(int(line.split()[1]) * 1024, "MemAvailable of /proc/meminfo")


def _cgroups(root: Path) -> Iterator[Available]:
    """Yield the limits of cgroups v1 and v2, from this process's group up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base, limit, current = "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, current = (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        group = Path(path.lstrip("/"))
        for part in (group, *group.parents):
            folder = root / base / part
            stat = _statistics(folder / "memory.stat")
            used = (_number(folder / current) or 0) - stat.get(
                "total_inactive_file", stat.get("inactive_file", 0)
            )  # a cgroup counts inactive pages of files, and the system can drop them
            most = _number(folder / limit)
            if most is not None:
                yield Available(max(0, most - used), f"the limit in {folder / limit}")
            # Cgroups v1 say here what enclosing groups allow that a container cannot see.
            enclosing = stat.get("hierarchical_memory_limit")
            if enclosing is not None and enclosing != most:
                left = max(0, enclosing - used)
                yield Available(left, f"hierarchical_memory_limit in {folder / 'memory.stat'}")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _statistics(path: Path) -> dict[str, int]:
    try:
        fields = [line.split(maxsplit=1) for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {each[0]: int(each[1]) for each in fields if len(each) == 2 and each[1].isdigit()}
