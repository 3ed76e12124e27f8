"""Read the configuration: a YAML file, then the environment, then vLLM's extra configuration.

The later source wins. Every value keeps its origin, for errors and ``lmcache-kit show-config``.
Mistakes are collected from all sources and raised together.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from pydantic import ValidationError

from lmcache_kit.config.declare import Declaration
from lmcache_kit.config.entries import Entry, reason, shown, shown_value
from lmcache_kit.config.lmcache import INSTEAD, is_configuration, is_unserved, may_be_unserved
from lmcache_kit.config.model import ALIASES, FIELDS_ONLY, KEYS, KitConfig, contradictions
from lmcache_kit.config.redaction import redacted
from lmcache_kit.config.values import none_if_not_set, unquoted
from lmcache_kit.errors import ConfigError, PluginError
from lmcache_kit.first_party import DEFAULT_MEMORY_BACKEND, FIRST_PARTY, provider_of

if TYPE_CHECKING:
    from lmcache_kit.config.plugin_keys import PluginKeys
    from lmcache_kit.plugins import Plugins

ENV_PREFIX = "LMCACHE_"
EXTRA_PREFIX = "lmcache."
EXTRA_ORIGIN = "kv_connector_extra_config"
DEFAULT_ORIGIN = "default"

_NEAR = 0.75
_ZERO = (0, "0", "0.0")
_NOTHING_ASKED: tuple[Any, ...] = (None, False, 0, "", "false", "False", "0", [], {})


@dataclass(frozen=True)
class Loaded:
    """A configuration.

    ``origins``: for each key ``"default"``, ``"file:line"``, the variable's name, or
    ``"kv_connector_extra_config"``; keys of plugins are there if they are given. ``plugin_values``:
    the values of these, as written. ``warnings``: what is given and has no effect, a line for each
    kind.
    """

    config: KitConfig
    origins: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    plugin_values: dict[str, Any] = field(default_factory=dict, repr=False)


class Problem(NamedTuple):
    """A mistake. ``hint`` is the remedy, or empty."""

    message: str
    hint: str = ""


def load_config(
    *,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    extra: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
) -> Loaded:
    """Merge ``file`` (``LMCACHE_CONFIG_FILE`` if None), ``LMCACHE_*`` and vLLM's ``extra``.

    ``plugins``: declare further keys. If None, installed plugins are loaded as soon as a key is not
    the kit's own. Raises ConfigError that names all mistakes, each with key, value and origin.
    """
    reader = _Reader(environ, plugins)
    named = none_if_not_set(unquoted(environ.get(f"{ENV_PREFIX}CONFIG_FILE", "")))
    if file:
        reader.accept(_from_file(Path(file), reader.problems))
    elif named:
        hint = "LMCACHE_CONFIG_FILE names it"
        reader.accept(_from_file(Path(named), reader.problems, hint=hint))
    reader.accept(_from_environ(environ))
    reader.accept(_from_extra(extra or {}))
    reader.note_keys_without_prefix(extra or {})
    return reader.loaded()


def declarations(plugins: Plugins) -> list[Declaration]:
    """Return all keys, those of the kit first, then those of installed plugins."""
    from lmcache_kit.config.plugin_keys import PluginKeys

    return [*KEYS.values(), *PluginKeys(plugins).declarations()]


class _Reader:
    """Collects entries of one source after the other, and what is wrong with them."""

    def __init__(self, environ: Mapping[str, str], plugins: Plugins | None) -> None:
        self.problems: list[Problem] = []
        self._environ = environ
        self._loaded_plugins = plugins
        self._values: dict[str, Entry] = {}
        self._plugin_values: dict[str, Entry] = {}
        self._unserved: list[str] = []  # keys of LMCache
        self._foreign: list[str] = []  # variables
        self._warnings: list[str] = []

    def accept(self, entries: Iterable[Entry]) -> None:
        """Take the entries of one source."""
        accepted: dict[str, Entry] = {}
        for entry in entries:
            key = ALIASES.get(entry.key, entry.key)
            if key in KEYS:
                earlier = accepted.setdefault(key, entry)
                if earlier.value != entry.value:
                    self.problems.append(_two_names(earlier, entry))
            elif key in self._plugin_keys:
                self._accept_of_plugin(entry)
            elif provider_of(key) or is_unserved(key):
                self._not_served(entry)
            else:
                self._unknown(entry)
        self._values |= accepted

    def note_keys_without_prefix(self, extra: Mapping[str, Any]) -> None:
        """Warn about keys in vLLM's ``extra`` that other connectors are free to have as well."""
        found = [name for name in extra if name in KEYS or name in ALIASES]
        if found:
            wanted = ", ".join(f"{EXTRA_PREFIX}{name}" for name in found)
            self._warnings.append(
                f"keys without effect in {EXTRA_ORIGIN}, for want of a prefix; write {wanted}"
            )

    def loaded(self) -> Loaded:
        """Validate what was taken. Raises ConfigError that names all mistakes."""
        values = self._without_zero_memory()
        # A null in a file means "the default".
        given = {key: each for key, each in self._plugin_values.items() if each.value is not None}
        if given:
            translated = self._plugin_keys.translate(values, given)
            values = translated.values
        config, wrong = _validated(values)
        found = [*wrong, *self.problems]
        if given:
            found += map(Problem, translated.problems)
        if config is None or found:
            raise _all(found)
        origins = dict.fromkeys(KEYS, DEFAULT_ORIGIN)
        origins |= {key: entry.origin for key, entry in {**values, **self._plugin_values}.items()}
        written = {key: entry.value for key, entry in self._plugin_values.items()}
        return Loaded(config, origins, self._all_warnings(config, origins), written)

    def _all_warnings(self, config: KitConfig, origins: Mapping[str, str]) -> list[str]:
        warnings = list(self._warnings)
        if self._unserved:
            warnings.append(
                f"keys of LMCache without effect here: {', '.join(dict.fromkeys(self._unserved))}"
            )
        if self._foreign:
            warnings.append(
                "variables without effect, since they are no configuration keys: "
                f"{', '.join(self._foreign)}"
            )
        if not config.local_cpu and config.memory_backend == DEFAULT_MEMORY_BACKEND:
            warnings.append(
                f"local_cpu: false ({origins['local_cpu']}) has no effect: KV passes through "
                f"memory, and max_local_cpu_size lets it have {config.max_local_cpu_size:g} GiB"
            )
        return warnings

    def _without_zero_memory(self) -> dict[str, Entry]:
        """Return the values without a size of 0, which LMCache's files have with ``local_cpu:
        false`` and which would leave no cache."""
        local_cpu, size = (self._values.get(key) for key in ("local_cpu", "max_local_cpu_size"))
        if local_cpu and size and not _is_true(local_cpu.value) and size.value in _ZERO:
            return self._values | {"max_local_cpu_size": size._replace(value=None)}
        return self._values

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

    def _accept_of_plugin(self, entry: Entry) -> None:
        try:
            self._plugin_keys.find(entry)
        except ConfigError as error:
            self.problems.append(Problem(error.message, error.hint))
        else:
            self._plugin_values[entry.key] = entry

    def _not_served(self, entry: Entry) -> None:
        """Take a key of LMCache that nothing installed serves."""
        if entry.value in _NOTHING_ASKED:
            return
        if provider := provider_of(entry.key):
            where = f"{entry.key} ({entry.origin}) sets {provider.kind} {provider.name}"
            try:
                self._plugins.spec(provider.kind, provider.name)
            except PluginError as error:
                self.problems.append(Problem(f"{where}: {error.message}", error.hint))
                return
        instead = INSTEAD.get(entry.key, "")
        note = f"; here it is {instead}" if instead else ""
        self._unserved.append(f"{entry.key} ({entry.origin}{note})")

    def _unknown(self, entry: Entry) -> None:
        """Take a key that neither the kit nor LMCache has. Other software has variables called
        ``LMCACHE_*`` too, so of those only a near miss is an error."""
        near = nearest(entry.key, self._plugin_keys)
        if not near and may_be_unserved(entry.key):
            self._not_served(entry)
        elif not near and _is_variable(entry):
            self._foreign.append(entry.origin)
        else:
            self.problems.append(
                Problem(
                    f"unknown configuration key {redacted(entry.key)!r} ({entry.origin})",
                    f"Did you mean {_spelt_as(entry, near)!r}?"
                    if near
                    else "'lmcache-kit show-config' lists all keys",
                )
            )


def nearest(name: str, plugin_keys: Iterable[str] = ()) -> str:
    """Return the served key that is spelt most like ``name``, or an empty string.

    >>> nearest("chunksize"), nearest("instance_id"), nearest("enable_blendin")
    ('chunk_size', 'lmcache_instance_id', '')
    """
    ours = [key for each in FIRST_PARTY for key in each.keys]
    served = [key for key, each in KEYS.items() if each.scope != "accepted"]
    aliases = [alias for alias, key in ALIASES.items() if key in served]
    known = dict.fromkeys([*served, *aliases, *plugin_keys, *ours])
    name = name.lower().replace("-", "_").replace(".", "_")
    for candidate in (f"lmcache_{name}", name.removeprefix("lmcache_")):
        if candidate in known:
            return candidate
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)), "")


def _is_true(value: Any) -> bool:
    return str(value).lower() not in ("false", "0", "no", "off", "f", "n")


def _is_variable(entry: Entry) -> bool:
    return entry.origin.startswith(ENV_PREFIX) and ":" not in entry.origin


def _spelt_as(entry: Entry, key: str) -> str:
    """Return a key as it is spelt where the entry comes from."""
    if _is_variable(entry):
        return f"{ENV_PREFIX}{key.upper()}"
    return f"{EXTRA_PREFIX}{key}" if entry.origin == EXTRA_ORIGIN else key


def _two_names(one: Entry, other: Entry) -> Problem:
    return Problem(
        f"{one.key} ({one.origin}) and {other.key} ({other.origin}) mean the same and differ: "
        f"{shown_value(one.key, one.value)}, {shown_value(other.key, other.value)}"
    )


def _all(problems: list[Problem]) -> ConfigError:
    """Return one error for all mistakes."""
    if len(problems) == 1:
        return ConfigError(problems[0].message, hint=problems[0].hint)
    texts = (str(ConfigError(each.message, hint=each.hint)) for each in problems)
    return ConfigError("; ".join(texts))


def _from_file(path: Path, problems: list[Problem], *, hint: str = "") -> Iterator[Entry]:
    root = _yaml_root(path, problems, hint)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        where = f"{path}:{root.start_mark.line + 1}"
        problems.append(Problem(f"{where}: a configuration is lines of 'key: value'"))
        return
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        if key in lines:
            problems.append(Problem(f"{path}:{line}: {key!r} stands already in line {lines[key]}"))
            continue
        lines[key] = line
        try:
            value = _yaml_value(value_node)
        except ValueError as error:
            line = value_node.start_mark.line + 1
            problems.append(Problem(f"{path}:{line}: {key}: {error}"))
        else:
            yield Entry(key, none_if_not_set(value), f"{path}:{line}")


def _yaml_root(path: Path, problems: list[Problem], hint: str) -> yaml.Node | None:
    try:
        text = path.read_text(encoding="utf-8")
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read the configuration file {str(path)!r}: {error}"
        problems.append(Problem(message, hint))
    except yaml.YAMLError as error:
        problems.append(Problem(_yaml_problem(path, error)))
    except RecursionError:
        problems.append(Problem(f"{path}: nested too deeply for a configuration"))
    else:
        return root
    return None


def _yaml_problem(path: Path, error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: not YAML: {problem}"
    return f"{path}:{mark.line + 1}: not YAML (column {mark.column + 1}): {problem}"


def _yaml_value(node: yaml.Node) -> Any:
    """Return the value. Raises ValueError without the value itself, which may be secret."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ValueError(error.problem) from None
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError):  # it has no checks
        raise ValueError(f"no value of the type {node.tag}") from None
    finally:
        loader.dispose()


def _from_environ(environ: Mapping[str, str]) -> Iterator[Entry]:
    for name, text in sorted(environ.items()):
        tail = name.removeprefix(ENV_PREFIX)
        value = none_if_not_set(unquoted(text))
        if tail == name or value is None or not is_configuration(tail, value):
            continue
        yield Entry(tail.lower(), value, name)


def _from_extra(extra: Mapping[str, Any]) -> Iterator[Entry]:
    for name, value in extra.items():
        if name.startswith(EXTRA_PREFIX):
            yield Entry(name.removeprefix(EXTRA_PREFIX), none_if_not_set(value), EXTRA_ORIGIN)


def _validated(values: Mapping[str, Entry]) -> tuple[KitConfig | None, list[Problem]]:
    """Return the configuration, and what is wrong; None if nothing can be said of the rest."""
    given = {key: entry.value for key, entry in values.items() if entry.value is not None}
    try:
        return KitConfig.model_validate(given), []
    except ValidationError as error:
        details = [each for each in error.errors() if each["loc"]]
    wrong = {str(detail["loc"][0]) for detail in details}
    told = (
        f"{shown(values[str(detail['loc'][0])])}: {reason(detail['msg'])}" for detail in details
    )
    problems = [Problem(text) for text in dict.fromkeys(told)]
    fields = KitConfig.model_validate(
        {key: value for key, value in given.items() if key not in wrong}, context=FIELDS_ONLY
    )
    for found in contradictions(fields):
        if wrong.isdisjoint(found.keys):
            places = dict.fromkeys(values[key].origin for key in found.keys if key in given)
            problems.append(Problem(f"{found.message} ({', '.join(places)})"))
    return None, problems
