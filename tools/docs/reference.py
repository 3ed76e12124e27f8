"""The pages of the reference, made from the code."""

from __future__ import annotations

import inspect
import json
import pkgutil

from lmcache_kit_http_api.errors import from_exception

from lmcache_kit import errors
from lmcache_kit.config.declare import Declaration
from lmcache_kit.config.lmcache import FAMILIES, INSTEAD, OPEN_FAMILIES, UNSERVED
from lmcache_kit.config.load import declarations
from lmcache_kit.config.model import ALIASES, KitConfig
from lmcache_kit.plugins import Offer, Plugins
from lmcache_kit.specs import KINDS
from tools.docs import commands, keys, metrics, rest, source
from tools.docs.rest import kind_of
from tools.docs.source import prose, table


def pages() -> dict[str, str]:
    """Text by page."""
    return {
        **source.pages(),
        **commands.page(),
        **rest.page(),
        **metrics.page(),
        "reference/configuration.md": _configuration(),
        "reference/options.md": _options(),
        source.ERRORS: _errors(),
        "reference/lmcache_keys.md": _lmcache_keys(),
    }


def error_classes() -> list[type[errors.KitError]]:
    """All errors of the kit, as they stand in their file."""
    found = [each for _, each in inspect.getmembers(errors, inspect.isclass)]
    ours = [each for each in found if issubclass(each, errors.KitError)]
    return sorted(ours, key=lambda each: inspect.getsourcelines(each)[1])


def _errors() -> str:
    lead, _, *rest_of_it = inspect.cleandoc(errors.__doc__ or "").split("\n\n")
    tree = "\n".join(map(_branch, error_classes()))
    rows = [
        (f"<a id='{each.__name__}'></a>`{each.__name__}`", prose(each.__doc__), _status(each))
        for each in error_classes()
    ]
    return "\n\n".join(
        [
            "# Errors",
            lead.replace(", the tree first", "") + " Import them from `lmcache_kit.errors`.",
            f"```text\n{tree}\n```",
            *(prose(part) for part in rest_of_it),
            "## Each of them",
            "The last column is what REST answers. What else goes wrong in the controller is a 500 "
            "with the code `internal_error`; requests that are wrong by themselves have "
            "[codes of their own](../packages/http_api.md#errors).",
            table(("Error", "Meaning", "REST"), rows),
        ]
    )


def _branch(error: type[errors.KitError]) -> str:
    """Its line in the tree: how deep it is, and which builtin error it is as well."""
    depth = sum(issubclass(each, errors.KitError) for each in error.__mro__) - 1
    also = [each.__name__ for each in error.__bases__ if each.__module__ == "builtins"]
    return f"{'    ' * depth}{error.__name__}" + (f" ({also[0]})" if depth and also else "")


def _status(error: type[errors.KitError]) -> str:
    if not issubclass(error, errors.ControlError):
        return ""
    if issubclass(error, errors.UnknownName):
        return f"{from_exception(error('name', '', [])).status} `unknown_...`"
    answer = from_exception(error(""))
    return f"{answer.status} `{answer.body.error.code}`"


def _configuration() -> str:
    rows = [
        (
            f"<a id='{each.name}'></a>`{each.name}`<br>`LMCACHE_{each.name.upper()}`",
            _type(each),
            f"`{json.dumps(each.default)}`",
            each.scope,
            keys.meaning(each),
        )
        for each in declarations(Plugins.load())
    ]
    return "\n\n".join(
        [
            "---\nhide: [toc]\n---",
            "# Configuration, key by key",
            "Types, limits, defaults and variables, as they are declared. "
            "[Configuration](../configuration.md) says how values are given and how tiers work. "
            "In vLLM's `kv_connector_extra_config` a key has the prefix `lmcache.`.",
            "Scope `cache`: the cache process reads it, and one that runs with another value is "
            "replaced once no client uses it. `client`: each vLLM process reads it for itself. "
            "`accepted`: it has no effect.",
            table(("Key and variable", "Type", "Default", "Scope", "Meaning"), rows),
        ]
    )


def _type(key: Declaration) -> str:
    schema = KitConfig.model_json_schema()["properties"].get(key.name)
    kind = kind_of(schema) if schema else key.type
    return kind.replace(" or null", "").replace("object", "mapping")


def _options() -> str:
    """Options of plugins, as their models declare them."""
    plugins = Plugins.load()
    offers = [offer for kind in KINDS for offer in plugins.specs(kind) if offer.spec.config]
    return "\n\n".join(
        [
            "# Options of plugins",
            "Options of backends stand under `backend_options`, those of codecs under "
            "`codec_options` and those of transports under `transport_options`, each by its name; "
            "those of frontends are `--frontend-option NAME.KEY=VALUE` of the controller.",
            *(part for offer in offers for part in _options_of(offer)),
        ]
    )


def _options_of(offer: Offer) -> list[str]:
    schema = pkgutil.resolve_name(offer.spec.config).model_json_schema()
    rows = [
        (
            f"`{name}`",
            kind_of(each).replace(" or null", ""),
            f"`{json.dumps(each['default'])}`" if "default" in each else "",
            str(each.get("description", "")),
        )
        for name, each in schema["properties"].items()
    ]
    name = offer.spec.name
    return [
        f"## {offer.kind.capitalize()} `{name}` {{#{name}}}",
        schema.get("description", ""),
        table(("Option", "Type", "Default", "Meaning"), rows),
    ]


def _lmcache_keys() -> str:
    found = declarations(Plugins.load())
    known = [each for each in found if each.lmcache]
    served = [(_linked(each.name), each.summary) for each in known if each.scope != "accepted"]
    idle = [(_linked(each.name), each.help) for each in known if each.scope == "accepted"]
    aliases = [(f"`{old}`", _linked(new)) for old, new in ALIASES.items()]
    return "\n\n".join(
        [
            "# LMCache's keys",
            "Made from the declarations by which the kit reads configurations. What to do with "
            "them is in [Come from LMCache](../howto/lmcache.md).",
            "## Served",
            table(("Key", "Meaning"), served),
            "## Served by another name as well",
            table(("LMCache's name", "Means"), aliases),
            "## Accepted, and not needed",
            table(("Key", "Why"), idle),
            "## Not served",
            "One warning names all that a configuration has. They have no effect. There is no "
            "warning about one whose value asks for nothing (`null`, `false`, `0`).",
            ", ".join(f"`{key}`" for key in sorted(UNSERVED)),
            "And all that begin with one of these: "
            + ", ".join(f"`{prefix}`" for prefix in OPEN_FAMILIES)
            + ". Further ones that begin with "
            + ", ".join(f"`{prefix}`" for prefix in FAMILIES)
            + " are taken for keys of another version of LMCache, unless they are spelt nearly "
            "like a served key, which is an error.",
            table(("Instead of", "Here"), [(f"`{key}`", each) for key, each in INSTEAD.items()]),
            "## Ours alone",
            ", ".join(_linked(each.name) for each in found if not each.lmcache),
        ]
    )


def _linked(key: str) -> str:
    return f"[`{key}`](configuration.md#{key})"
