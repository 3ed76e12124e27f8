"""How values of keys may be written: in YAML, in a variable, or in JSON of vLLM."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from lmcache_kit.specs import KeyType

_HOST_PORT = re.compile(
    r"(?:tcp://)?(?:\[(?P<six>[0-9a-fA-F:.%]+)\]|(?P<host>[^\s:/\[\]]+)):(?P<port>\d+)"
)


def int_list(value: Any) -> Any:
    """Read ``8001``, ``"8001"``, ``"8001, 8002"``, ``"[8001, 8002]"`` or a list."""
    if isinstance(value, str):
        value = [part.strip() for part in value.strip().strip("[]").split(",") if part.strip()]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return value


def text_list(value: Any) -> Any:
    """Read ``UCX``, ``"UCX, GDS"`` or a list."""
    if isinstance(value, str):
        return [part.strip(" '\"") for part in value.strip().strip("[]").split(",") if part.strip()]
    return value


def address(value: Any) -> Any:
    """Check ``HOST:PORT``, which ``tcp://`` may precede."""
    if value is None or not isinstance(value, str):
        return value
    match = _HOST_PORT.fullmatch(value)
    if not match or not 0 < int(match["port"]) < 65536:
        raise ValueError("an address is HOST:PORT, for example localhost:9001")
    return value


def absolute(value: Path | None) -> Path | None:
    """Make a path absolute: the cache process has another working directory."""
    try:
        return value and value.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def folder(value: Any) -> Path | None:
    """Read a path, or ``file://`` and a path; ``false`` is none, as in LMCache."""
    if value is False or (isinstance(value, str) and value.lower() == "false"):
        return None
    if not isinstance(value, str | Path):
        raise ValueError("a folder is expected, for example /var/cache/kv")
    return absolute(Path(str(value).removeprefix("file://")))


def mapping(value: Any) -> Any:
    """Read a mapping, or one written as JSON, as in a variable."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def no_boolean(value: Any) -> Any:
    """Refuse booleans, which are integers to Python: ``chunk_size: true`` is a mistake."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def number(value: Any) -> float:
    """Read a finite number."""
    value = no_boolean(value)
    try:
        read = float(value)
    except (TypeError, OverflowError):
        read = math.nan
    except ValueError as error:
        raise ValueError("a number is expected") from error
    if not math.isfinite(read):
        raise ValueError("a finite number is expected")
    return read


def read(kind: KeyType, value: Any) -> Any:
    """Read the value of a key of a plugin. Raises ValueError that says what is expected.

    >>> read("list", "UCX, GDS"), read("folder", "file:///kv"), read("number", "2")
    (['UCX', 'GDS'], '/kv', 2.0)
    """
    if kind == "folder":
        path = folder(value)
        return str(path) if path else None
    if kind == "number":
        return number(value)
    return text_list(value) if kind == "list" else value


Port = Annotated[int, Field(ge=1, le=65535), BeforeValidator(no_boolean)]
Rank = Annotated[int, Field(ge=0, le=65535), BeforeValidator(no_boolean)]
Ports = Annotated[tuple[Port, ...] | None, BeforeValidator(int_list)]
Ranks = Annotated[tuple[Rank, ...] | None, BeforeValidator(int_list)]
Address = Annotated[str | None, BeforeValidator(address)]
KeyFile = Annotated[Path | None, AfterValidator(absolute)]
Count = Annotated[int, BeforeValidator(no_boolean)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(no_boolean)]
Names = Annotated[tuple[str, ...], BeforeValidator(text_list)]
Options = Annotated[dict[str, dict[str, Any]], BeforeValidator(mapping)]
