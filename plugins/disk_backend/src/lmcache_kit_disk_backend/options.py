"""Options of the backend ``LocalDiskBackend``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.functional_validators import AfterValidator, BeforeValidator

_GIB = 1 << 30


_SEVERAL = re.compile(r",\s*(/|~|file:)")
_SHELL_VARIABLE = re.compile(r"\$[A-Za-z_{(]")


def _folder(path: object) -> object:
    """Read ``file:///``, and refuse texts that would make a folder that nobody means."""
    if _SEVERAL.search(str(path)):
        raise ValueError(f"{str(path)!r} is several folders; one is expected")
    if _SHELL_VARIABLE.search(str(path)):
        raise ValueError(
            f"{str(path)!r}: variables in it are not replaced; write the folder itself"
        )
    if isinstance(path, str) and path.startswith("file:///"):
        return path.removeprefix("file://")
    return path


def _absolute(path: Path) -> Path:
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: the home folder is unknown: {error}") from error
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} must be absolute, such as /var/cache/lmcache_kit")
    return path


def _user_cache() -> Path:
    return _absolute(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lmcache_kit")


class DiskOptions(BaseModel):
    """Options of the backend: the folder of the blobs, and the limit of their size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[Path, BeforeValidator(_folder), AfterValidator(_absolute)] = Field(
        default_factory=_user_cache,
        description="folder on a local disk, absolute or `file:///`; `~` is the user's own. "
        "`~/.cache/lmcache_kit` if absent",
    )
    max_size_gib: float = Field(
        default=5.0,
        gt=0,
        allow_inf_nan=False,
        description="GiB of files at most, in blocks of the file system",
    )
    subfolder: str = Field(
        default="",
        description="name of the folder in `path` that is used, such as the instance's; several "
        "backends can share one `path` so, each with its own `max_size_gib`",
    )

    @property
    def capacity_bytes(self) -> int:
        return int(self.max_size_gib * _GIB)
