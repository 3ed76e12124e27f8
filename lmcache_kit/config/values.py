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


_NOT_SET = frozenset({"", "null", "none"})
_SEVERAL_FOLDERS = re.compile(r",\s*(/|~|file:)")
_FOLDER = "a folder is expected: an absolute path, one below ~/, or file:/// and the path"
_SHELL_VARIABLE = re.compile(r"\$[A-Za-z_{(]")


def unquoted(text: str) -> str:
    """Return a text without the quotes that shells, compose files and templates leave around it.

    >>> unquoted(' "file:///kv" '), unquoted('"a","b"')
    ('file:///kv', '"a","b"')
    """
    text = text.strip()
    while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        inner = text[1:-1].strip().replace(f"\\{text[0]}", text[0])
        if text[0] in inner and inner[:1] + inner[-1:] not in {"{}", "[]"}:
            break
        text = inner
    return text


def none_if_not_set(value: Any) -> Any:
    """Return None for a text that says so: ``null`` and ``None`` of templates, and an empty one."""
    return None if isinstance(value, str) and value.strip().lower() in _NOT_SET else value


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
    return value and _expanded(value).absolute()


def anywhere(value: Path | None) -> Path | None:
    """Check a path that means the same from every working directory, since it will be made."""
    if value is None:
        return None
    path = _expanded(value)
    if not path.is_absolute():
        raise ValueError("a path is expected that begins with / or ~/, for example /run/kv.sock")
    return path


def folder(value: Any) -> Path | None:
    """Read an absolute path, one below ``~/``, or ``file://`` and an absolute path.

    ``false`` is none, as in LMCache. What could make a folder below the working directory, or one
    that nobody means, is refused.
    """
    if value is False or (isinstance(value, str) and value.lower() == "false"):
        return None
    if not isinstance(value, str | Path):
        raise ValueError(_FOLDER)
    text = str(value)
    if _SEVERAL_FOLDERS.search(text):
        raise ValueError("one folder is expected, and these are several")
    if _SHELL_VARIABLE.search(text):
        raise ValueError("variables in it are not replaced here: write the folder itself")
    path = _expanded(Path(text.removeprefix("file://") if text.startswith("file:///") else text))
    if not path.is_absolute():
        raise ValueError(_FOLDER)
    return path


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def mapping(value: Any) -> Any:
    """Read a mapping, or one written as JSON, as in a variable, with quotes around it or not."""
    for _ in range(2):
        if not isinstance(value, str):
            break
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from error
    return value


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
SocketPath = Annotated[Path | None, AfterValidator(anywhere)]
Count = Annotated[int, BeforeValidator(no_boolean)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(no_boolean)]
Names = Annotated[tuple[str, ...], BeforeValidator(text_list)]
Options = Annotated[dict[str, dict[str, Any]], BeforeValidator(mapping)]
