"""Options of the backend ``SQLiteBackend``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _absolute(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} must be absolute, such as /var/cache/kv.sqlite")
    return path


class SQLiteOptions(BaseModel):
    """File and size limit.

    ``path``: the file, created when it is missing; ``~`` is the user's home. ``max_size_gib``:
    limit on the size of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[Path, AfterValidator(_absolute)] = Field(
        default=Path("~/.cache/acme-sqlite/kv.sqlite"), validate_default=True
    )
    max_size_gib: float = Field(default=5.0, gt=0, allow_inf_nan=False)
