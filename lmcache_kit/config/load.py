"""Read the configuration: a YAML file, then the environment, then vLLM's extra configuration.

The later source wins. Every value keeps its origin, for errors and ``lmcache-kit show-config``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from lmcache_kit.config.declare import Declaration
from lmcache_kit.config.entries import Entry, reason, shown, shown_value
from lmcache_kit.config.lmcache import UNSERVED, is_configuration, is_unserved
from lmcache_kit.config.model import ALIASES, KEYS, KitConfig
from lmcache_kit.errors import ConfigError, PluginError
from lmcache_kit.first_party import FIRST_PARTY, provider_of

if TYPE_CHECKING:
    from lmcache_kit.config.plugin_keys import PluginKeys
    from lmcache_kit.plugins import Plugins

ENV_PREFIX = "LMCACHE_"
EXTRA_PREFIX = "lmcache."
EXTRA_ORIGIN = "kv_connector_extra_config"
DEFAULT_ORIGIN = "default"

_NEAR = 0.75
_NOTHING_ASKED = (None, False, 0, "", "false", "False", "0", "null", "none", "None")


@dataclass(frozen=True)
class Loaded:
    """A configuration.

    ``origins``: for each key ``"default"``, ``"file:line"``, the variable's name, or
    ``"kv_connector_extra_config"``; keys of plugins are there if they are given. ``plugin_values``:
    the values of these, as written. ``warnings``: keys that are given and have no effect.
    """

    config: KitConfig
    origins: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    plugin_values: dict[str, Any] = field(default_factory=dict)


def load_config(
    *,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    extra: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
) -> Loaded:
    """Merge ``file`` (``LMCACHE_CONFIG_FILE`` if None), ``LMCACHE_*`` and vLLM's ``extra``.

    ``plugins``: declare further keys. If None, installed plugins are loaded as soon as a key is not
    the kit's own. Raises ConfigError that names the key, the value and its origin.
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
    reader = _Reader(environ, plugins)
    for entries in sources:
        reader.accept(entries)
    return reader.loaded()


def declarations(plugins: Plugins) -> list[Declaration]:
    """Return all keys, those of the kit first, then those of installed plugins."""
    from lmcache_kit.config.plugin_keys import PluginKeys

    return [*KEYS.values(), *PluginKeys(plugins).declarations()]


class _Reader:
    """Collects entries of one source after the other."""

    def __init__(self, environ: Mapping[str, str], plugins: Plugins | None) -> None:
        self._environ = environ
        self._loaded_plugins = plugins
        self._values: dict[str, Entry] = {}
        self._plugin_values: dict[str, Entry] = {}
        self._warnings: list[str] = []

    def accept(self, entries: list[Entry]) -> None:
        """Take the entries of one source. Raises ConfigError for a key that is not known."""
        accepted: dict[str, Entry] = {}
        for entry in entries:
            key = ALIASES.get(entry.key, entry.key)
            if key in KEYS:
                earlier = accepted.setdefault(key, entry)
                if earlier.value != entry.value:
                    raise ConfigError(
                        f"{earlier.key} ({earlier.origin}) and {entry.key} ({entry.origin}) mean "
                        f"the same and differ: {shown_value(earlier.value)}, "
                        f"{shown_value(entry.value)}"
                    )
            elif key in self._plugin_keys:
                self._plugin_values[key] = entry
            elif provider_of(key) or is_unserved(key):
                self._not_served(entry)
            else:
                self._reject(entry)
        self._values |= accepted

    def loaded(self) -> Loaded:
        """Validate what was taken. Raises ConfigError that names all mistakes."""
        values, problems = self._values, list[str]()
        # A null in a file means "the default".
        given = {key: each for key, each in self._plugin_values.items() if each.value is not None}
        if given:
            translated = self._plugin_keys.translate(values, given)
            values, problems = translated.values, translated.problems
        config = _validated(values, problems)
        origins = dict.fromkeys(KEYS, DEFAULT_ORIGIN)
        origins |= {key: entry.origin for key, entry in {**values, **self._plugin_values}.items()}
        written = {key: entry.value for key, entry in self._plugin_values.items()}
        return Loaded(config, origins, list(dict.fromkeys(self._warnings)), written)

    @cached_property
    def _plugins(self) -> Plugins:
        if self._loaded_plugins is not None:
            return self._loaded_plugins
        # Deferred: a configuration without plugins' keys needs no registry.
        from lmcache_kit.plugins import Plugins

        # Whoever composes a cache from this configuration loads them again and logs failures.
        return Plugins.load(environ=self._environ, log_failures=False)

    @cached_property
    def _plugin_keys(self) -> PluginKeys:
        from lmcache_kit.config.plugin_keys import PluginKeys

        return PluginKeys(self._plugins)

    def _not_served(self, entry: Entry) -> None:
        """Take a key of LMCache that nothing installed serves."""
        if entry.value in _NOTHING_ASKED:
            return
        if provider := provider_of(entry.key):
            where = f"{entry.key} ({entry.origin}) sets {provider.kind} {provider.name}"
            try:
                self._plugins.spec(provider.kind, provider.name)
            except PluginError as error:
                raise ConfigError(f"{where}: {error.message}", hint=error.hint) from error
        self._warnings.append(
            f"{entry.key} ({entry.origin}) is a key of LMCache that this version does not serve; "
            "it has no effect"
        )

    def _reject(self, entry: Entry) -> None:
        """Refuse an unknown key. Other software has variables called ``LMCACHE_*`` too, so of those
        only a near miss is an error."""
        near = nearest(entry.key, self._plugin_keys)
        if entry.origin == f"{ENV_PREFIX}{entry.key.upper()}" and not near:
            self._warnings.append(f"{entry.origin} is no configuration key; it has no effect")
            return
        raise ConfigError(
            f"unknown configuration key {entry.key!r} ({entry.origin})",
            hint=f"Did you mean {near!r}?" if near else "'lmcache-kit show-config' lists all keys",
        )


def nearest(name: str, plugin_keys: Iterable[str] = ()) -> str:
    """Return the known key that is spelt most like ``name``, or an empty string."""
    ours = [key for each in FIRST_PARTY for key in each.keys]
    known = dict.fromkeys([*KEYS, *ALIASES, *plugin_keys, *ours, *sorted(UNSERVED)])
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


def _validated(values: Mapping[str, Entry], problems: list[str]) -> KitConfig:
    given = {key: entry.value for key, entry in values.items() if entry.value is not None}
    try:
        config = KitConfig.model_validate(given)
    except ValidationError as error:
        # Without its cause: that would show values in full, which aliases may make endless.
        problems = [*(_problem(detail, values) for detail in error.errors()), *problems]
        raise ConfigError("; ".join(problems)) from None
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _problem(detail: Mapping[str, Any], values: Mapping[str, Entry]) -> str:
    location = detail["loc"]
    entry = values.get(str(location[0])) if location else None
    why = reason(str(detail["msg"]))
    return f"{shown(entry)}: {why}" if entry else why
