"""The pages of the reference, made from the code."""

from __future__ import annotations

import inspect
import json
from typing import Any

from lmcache_kit_http_api.errors import from_exception

from lmcache_kit import errors
from lmcache_kit.config.lmcache import _UNSERVED_PREFIXES, ALIASES, UNSERVED
from lmcache_kit.config.model import KitConfig
from tools.docs import commands, rest, source
from tools.docs.rest import kind_of
from tools.docs.source import prose, table

OWN_KEYS = frozenset(
    {
        "backend_options",
        "cache_linger_s",
        "cache_process",
        "cache_socket",
        "cache_start_timeout_s",
        "codec_options",
        "controller_key",
        "lease_ttl_s",
        "max_pinned_share",
        "p2p_tls_ca",
        "p2p_tls_cert",
        "p2p_tls_key",
        "store_codec",
        "tiers",
        "transport_options",
        "worker_key",
    }
)
"""Keys that LMCache does not have."""


def pages() -> dict[str, str]:
    """Text by page."""
    return {
        **source.pages(),
        **commands.page(),
        **rest.page(),
        "reference/configuration.md": _configuration(),
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
        (f"<a id='{key}'></a>`{key}`<br>`LMCACHE_{key.upper()}`", kind, default, meaning)
        for key, kind, default, meaning in _keys()
    ]
    return "\n\n".join(
        [
            "---\nhide: [toc]\n---",
            "# Configuration, key by key",
            "Types, limits, defaults and variables, as the code has them. "
            "[Configuration](../configuration.md) says more of what each key does, and where it is "
            "set. In vLLM's `kv_connector_extra_config` a key has the prefix `lmcache.`.",
            table(("Key and variable", "Type", "Default", "Meaning"), rows),
        ]
    )


def _keys() -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each key."""
    schemas: dict[str, Any] = KitConfig.model_json_schema()["properties"]
    return [
        (
            key,
            kind_of(schema).replace(" or null", "").replace("object", "mapping"),
            f"`{json.dumps(schema.get('default'))}`",
            str(schema.get("description", "")),
        )
        for key, schema in schemas.items()
    ]


def _lmcache_keys() -> str:
    known = [(key, meaning) for key, _, _, meaning in _keys() if key not in OWN_KEYS]
    served = [(_linked(key), meaning) for key, meaning in known if not _idle(meaning)]
    idle = [(_linked(key), meaning) for key, meaning in known if _idle(meaning)]
    aliases = [(f"`{old}`", _linked(new)) for old, new in ALIASES.items()]
    return "\n\n".join(
        [
            "# LMCache's keys",
            "Made from the lists by which the kit reads configurations. What to do with them is in "
            "[Come from LMCache](../howto/lmcache.md).",
            "## Served",
            table(("Key", "Meaning"), served),
            "## Served by another name as well",
            table(("LMCache's name", "Means"), aliases),
            "## Accepted, and not needed",
            table(("Key", "Why"), idle),
            "## Not served",
            "Each is named by one warning and has no effect. There is no warning if its value asks "
            "for nothing (`null`, `false`, `0`).",
            ", ".join(f"`{key}`" for key in sorted(UNSERVED)),
            "And all others that begin with one of these: "
            + ", ".join(f"`{prefix}`" for prefix in _UNSERVED_PREFIXES)
            + ".",
            "## Ours alone",
            ", ".join(_linked(key) for key in KitConfig.model_fields if key in OWN_KEYS),
        ]
    )


def _linked(key: str) -> str:
    return f"[`{key}`](configuration.md#{key})"


def _idle(meaning: str) -> bool:
    return meaning.startswith("accepted") or "no port is opened" in meaning
