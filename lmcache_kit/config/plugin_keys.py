"""Keys that plugins declare: find them, and turn their values into options of the plugin."""

from __future__ import annotations

import pkgutil
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError

from lmcache_kit.config.declare import Declaration
from lmcache_kit.config.entries import Entry, reason, shown
from lmcache_kit.config.lmcache import is_unserved
from lmcache_kit.config.model import ALIASES, KEYS
from lmcache_kit.config.redaction import HIDDEN, is_address, redacted
from lmcache_kit.config.values import mapping, read, text_list
from lmcache_kit.errors import ConfigError
from lmcache_kit.first_party import provider_of
from lmcache_kit.plugins import Offer, Plugins
from lmcache_kit.plugins.records import attempt
from lmcache_kit.specs import ConfigKey, Kind

OPTIONS_OF: Mapping[Kind, str] = {
    "backend": "backend_options",
    "codec": "codec_options",
    "transport": "transport_options",
}
"""The key of the kit that holds the options of each kind of plugin."""


class PluginKey(NamedTuple):
    """A key, and the offer that declares it."""

    key: ConfigKey
    offer: Offer


@dataclass(frozen=True)
class Translated:
    """Values of the kit's keys with the plugins' keys moved into them, and what is wrong."""

    values: dict[str, Entry]
    problems: list[str]


class PluginKeys:
    """All keys that installed plugins declare. A key of the kit itself cannot be taken."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._declared: dict[str, list[PluginKey]] = defaultdict(list)
        for kind in OPTIONS_OF:
            for offer in plugins.specs(kind):
                for key in offer.spec.keys:
                    if key.name not in KEYS and key.name not in ALIASES:
                        self._declared[key.name].append(PluginKey(key, offer))

    def __contains__(self, name: str) -> bool:
        return name in self._declared

    def __iter__(self) -> Iterator[str]:
        return iter(self._declared)

    def find(self, entry: Entry) -> PluginKey:
        """Return who declares the key. Raises ConfigError when two plugins do."""
        found = self._declared[entry.key]
        if len(found) > 1:
            owners = " and ".join(sorted(each.offer.plugin.distribution for each in found))
            raise ConfigError(
                f"{entry.key} ({entry.origin}) is a key of {owners}",
                hint="Uninstall one, or block it with LMCACHE_KIT_PLUGINS",
            )
        return found[0]

    def declarations(self) -> list[Declaration]:
        """Return what the plugins declare, as the kit's own keys are declared."""
        return [
            Declaration(
                name,
                found[0].key.default,
                f"{found[0].key.help.rstrip('.')}.",
                scope="cache",
                lmcache=provider_of(name) is not None or is_unserved(name),
                plugin=found[0].offer.spec.name,
                type=found[0].key.type,
            )
            for name, found in self._declared.items()
        ]

    def without_secrets(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values of keys and of mappings of options, for people to see."""
        shown = {key: redacted(each, "" if key in KEYS else key) for key, each in values.items()}
        for name, found in self._declared.items():
            if name in shown and any(
                each.key.option in secret_options(each.offer) for each in found
            ):
                shown[name] = HIDDEN if values[name] is not None else None
        for kind, where in OPTIONS_OF.items():
            for offer in self._plugins.specs(kind):
                options = shown.get(where, {}).get(offer.spec.name, {})
                options |= dict.fromkeys(secret_options(offer) & options.keys(), HIDDEN)
        return shown

    def translate(self, values: Mapping[str, Entry], given: Mapping[str, Entry]) -> Translated:
        """Turn ``given`` keys of plugins into options, and selected backends into tiers.

        Options that stand under ``backend_options`` and the like win over keys. Values that do not
        fit the options' model are problems, named by their key; those of other options are left to
        whoever makes the plugin.
        """
        translated = dict(values)
        problems: list[str] = []
        by_offer: dict[tuple[Kind, str], dict[str, Entry]] = defaultdict(dict)
        for name, entry in given.items():
            offer = self.find(entry).offer
            by_offer[offer.kind, offer.spec.name][name] = entry
        for (kind, name), entries in sorted(by_offer.items()):
            offer = self.find(next(iter(entries.values()))).offer
            keys = {key.name: key for key in offer.spec.keys}
            hidden = _hidden(offer, keys)
            read_options = _read(keys, entries, hidden, problems)
            if not read_options:
                continue
            selecting = [each for each in entries if keys[each].selects and each in read_options]
            if selecting:
                _select(name, entries[selecting[0]], translated)
            elif kind == "backend" and name not in _names(translated):
                continue  # its keys say how, and none says that
            inherited = {option: _value(key, values) for key, option in offer.spec.inherits.items()}
            options = {keys[each].option: value for each, value in read_options.items()}
            problems += _refused(
                offer, options, {keys[each].option: entries[each] for each in entries}, hidden
            )
            origin = next(iter(entries.values()))
            _add_options(OPTIONS_OF[kind], name, inherited | options, origin, translated)
        return Translated(translated, problems)


def _read(
    keys: Mapping[str, ConfigKey],
    entries: Mapping[str, Entry],
    hidden: Container[str],
    problems: list[str],
) -> dict[str, Any]:
    """Return the values that set something, by key. ``hidden``: keys that are not shown."""
    values: dict[str, Any] = {}
    for name, entry in entries.items():
        try:
            value = read(keys[name].type, entry.value)
        except ValueError as error:
            problems.append(f"{shown(entry, secret=name in hidden)}: {error}")
            continue
        if value not in (None, [], "", keys[name].default):
            values[name] = value
    for name in values:
        needs = keys[name].needs
        if needs and needs not in values:
            where = f"{name} ({entries[name].origin})"
            problems.append(f"{where} needs {needs}: {keys[needs].help}")
    return values


def _select(backend: str, by: Entry, values: dict[str, Entry]) -> None:
    """Put a backend behind the tiers that are named, unless it is one of them."""
    tiers = _names(values)
    if backend not in tiers:
        origin = values["tiers"].origin if "tiers" in values else by.origin
        values["tiers"] = Entry("tiers", [*tiers, backend], origin)


def _names(values: Mapping[str, Entry]) -> list[str]:
    """Return the tiers that are named; none where the value is wrong, which is found later."""
    named = text_list(values["tiers"].value) if "tiers" in values else None
    return list(named) if isinstance(named, list | tuple) else []


def _add_options(
    where: str, name: str, options: Mapping[str, Any], by: Entry, values: dict[str, Entry]
) -> None:
    entry = values.get(where, Entry(where, {}, by.origin))
    made = attempt(lambda: mapping(entry.value))
    if isinstance(made, dict) and isinstance(made.get(name, {}), dict):
        merged = {**made, name: {**options, **made.get(name, {})}}
        values[where] = Entry(where, merged, entry.origin)


def _value(key: str, values: Mapping[str, Entry]) -> Any:
    entry = values.get(key)
    return KEYS[key].default if entry is None or entry.value is None else entry.value


def _refused(
    offer: Offer,
    options: Mapping[str, Any],
    entries: Mapping[str, Entry],
    hidden: Container[str],
) -> Iterator[str]:
    """Check options by their model; only problems with what a key has set."""
    model = _model(offer)
    if model is None:
        return  # whoever makes the plugin says so
    try:
        model.model_validate(dict(options))
    except ValidationError as error:
        for detail in error.errors():
            entry = entries.get(str(detail["loc"][0])) if detail["loc"] else None
            if entry is not None:
                what = shown(entry, secret=entry.key in hidden)
                yield f"{what}: {redacted(reason(detail['msg']))}"


def _model(offer: Offer) -> type[BaseModel] | None:
    """Return the model of the options, or None if there is none that can be imported."""
    model = attempt(lambda: pkgutil.resolve_name(offer.spec.config)) if offer.spec.config else None
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _hidden(offer: Offer, keys: Mapping[str, ConfigKey]) -> set[str]:
    """Return the keys whose options are secret."""
    secret = secret_options(offer)
    return {name for name, key in keys.items() if key.option in secret}


def secret_options(offer: Offer) -> set[str]:
    """Return the options that their model declares as secret, by ``SecretStr``.

    One that is named as a URL is not among them: of that only the user and password are hidden.
    """
    model = _model(offer)
    if model is None:
        return set()
    return {
        name
        for name, each in model.model_fields.items()
        if not is_address(name)
        and not {SecretStr, SecretBytes}.isdisjoint((each.annotation, *get_args(each.annotation)))
    }
