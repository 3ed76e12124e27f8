"""Read the configuration: a YAML file, then the environment, then vLLM's extra configuration.

The later source wins. Every value keeps where it came from, so that an error and
``lmcache-kit show-config`` can say it.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from lmcache_kit.config.lmcache import ALIASES, UNSERVED, is_configuration, is_unserved
from lmcache_kit.config.model import KitConfig
from lmcache_kit.config.redaction import without_passwords
from lmcache_kit.errors import ConfigError

ENV_PREFIX = "LMCACHE_"
EXTRA_PREFIX = "lmcache."
EXTRA_ORIGIN = "kv_connector_extra_config"
DEFAULT_ORIGIN = "default"

_NEAR = 0.75
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlevel = 2
_NOTHING_ASKED = (None, False, 0, "", "false", "False", "0", "null", "none", "None")


class Entry(NamedTuple):
    """A key as it was written, its value, and where it stands."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Loaded:
    """A configuration. ``origins``: for each key ``"default"``, ``"file:line"``, the variable's
    name, or ``"kv_connector_extra_config"``. ``warnings``: what was asked for and is not served.
    """

    config: KitConfig
    origins: dict[str, str]
    warnings: list[str] = field(default_factory=list)


def load_config(
    *,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    extra: Mapping[str, Any] | None = None,
) -> Loaded:
    """Merge ``file`` (``LMCACHE_CONFIG_FILE`` if None), ``LMCACHE_*`` and vLLM's ``extra``.

    Raises ConfigError that names the key, the value and where it stands.
    """
    named = environ.get(f"{ENV_PREFIX}CONFIG_FILE")
    if file:
        from_file = list(_from_file(Path(file)))
    else:
        hint = "LMCACHE_CONFIG_FILE names it"
        from_file = list(_from_file(Path(named), hint=hint)) if named else []
    sources = [
        from_file,
        list(_from_environ(environ)),
        list(_from_extra(extra or {})),
    ]
    values: dict[str, Entry] = {}
    warnings: list[str] = []
    for entries in sources:
        values |= _accept(entries, warnings)
    config = _validated(values)
    origins = dict.fromkeys(KitConfig.model_fields, DEFAULT_ORIGIN)
    origins |= {key: entry.origin for key, entry in values.items()}
    return Loaded(config, origins, list(dict.fromkeys(warnings)))


def nearest(name: str) -> str:
    """The served or known key that is spelt most like ``name``, or an empty string."""
    known = [*KitConfig.model_fields, *ALIASES, *sorted(UNSERVED)]
    return next(iter(difflib.get_close_matches(name.lower(), known, n=1, cutoff=_NEAR)), "")


def _from_file(path: Path, *, hint: str = "") -> Iterator[Entry]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration file {str(path)!r}: {error}", hint=hint
        ) from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply for a configuration") from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path}:{root.start_mark.line + 1}: a configuration is lines of 'key: value'"
        )
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        if key in lines:
            raise ConfigError(f"{path}:{line}: {key!r} stands already in line {lines[key]}")
        lines[key] = line
        yield Entry(key, _yaml_value(path, key, value_node), f"{path}:{line}")


def _yaml_problem(path: Path, error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: not YAML: {problem}"
    return f"{path}:{mark.line + 1}: not YAML (column {mark.column + 1}): {problem}"


def _yaml_value(path: Path, key: str, node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}:{line}: {key}: {error}") from error
    finally:
        loader.dispose()


def _from_environ(environ: Mapping[str, str]) -> Iterator[Entry]:
    for name, value in sorted(environ.items()):
        tail = name.removeprefix(ENV_PREFIX)
        if tail == name or not value.strip() or not is_configuration(tail, value):
            continue
        yield Entry(tail.lower(), value.strip(), name)


def _from_extra(extra: Mapping[str, Any]) -> Iterator[Entry]:
    for name, value in extra.items():
        if name.startswith(EXTRA_PREFIX):
            yield Entry(name.removeprefix(EXTRA_PREFIX), value, EXTRA_ORIGIN)


def _accept(entries: list[Entry], warnings: list[str]) -> dict[str, Entry]:
    """One source's entries by canonical key; what is not served becomes a warning."""
    accepted: dict[str, Entry] = {}
    for entry in entries:
        key = ALIASES.get(entry.key, entry.key)
        if key in KitConfig.model_fields:
            earlier = accepted.setdefault(key, entry)
            if earlier.value != entry.value:
                raise ConfigError(
                    f"{earlier.key} ({earlier.origin}) and {entry.key} ({entry.origin}) mean the "
                    f"same and differ: {_shown(earlier.value)}, {_shown(entry.value)}"
                )
        elif is_unserved(key):
            if entry.value not in _NOTHING_ASKED:
                warnings.append(
                    f"{entry.key} ({entry.origin}) is a key of LMCache that this version does not "
                    "serve; it has no effect"
                )
        else:
            _reject(entry, warnings)
    return accepted


def _reject(entry: Entry, warnings: list[str]) -> None:
    """Other software has variables called ``LMCACHE_*`` too: only a near miss is an error."""
    near = nearest(entry.key)
    if entry.origin == f"{ENV_PREFIX}{entry.key.upper()}" and not near:
        warnings.append(f"{entry.origin} is no configuration key; it has no effect")
        return
    raise ConfigError(
        f"unknown configuration key {entry.key!r} ({entry.origin})",
        hint=f"Did you mean {near!r}?" if near else "'lmcache-kit show-config' lists all keys",
    )


def _validated(values: Mapping[str, Entry]) -> KitConfig:
    # A null in a file means "the default".
    given = {key: entry.value for key, entry in values.items() if entry.value is not None}
    try:
        return KitConfig.model_validate(given)
    except ValidationError as error:
        # Without its cause: that would show values in full, which aliases may make endless.
        problems = [_problem(detail, values) for detail in error.errors()]
        raise ConfigError("; ".join(problems)) from None


def _problem(detail: Mapping[str, Any], values: Mapping[str, Entry]) -> str:
    reason = str(detail["msg"]).removeprefix("Value error, ")
    location = detail["loc"]
    entry = values.get(str(location[0])) if location else None
    if entry is None:
        return reason
    return f"{entry.key}: {_shown(entry.value)} ({entry.origin}): {reason}"


def _shown(value: Any) -> str:
    """In short: aliases may make it endless. Passwords in URLs are left out of what is a text."""
    return _short.repr(without_passwords(value) if isinstance(value, str) else value)
