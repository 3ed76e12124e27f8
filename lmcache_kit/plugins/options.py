"""Check the options that a configuration gives to a plugin."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lmcache_kit.errors import ConfigError
from lmcache_kit.specs import Kind, Spec


def validated(key: str, kind: Kind, spec: Spec, given: Mapping[str, Any]) -> object:
    """Return an instance of ``spec.config``.

    Raises ConfigError that names ``key``, the plugin's name and every wrong option, or says that a
    ``kind`` of this name takes no options.
    """
    if not spec.config:
        raise ConfigError(f"{key}: {kind} {spec.name!r} takes no options")
    try:
        options: object = pkgutil.resolve_name(spec.config)(**given)
    except ValidationError as error:
        found = (
            f"{'.'.join(map(str, [spec.name, *detail['loc']]))}: {detail['msg']}"
            for detail in error.errors()
        )
        raise ConfigError(f"{key}: {'; '.join(found)}") from None
    return options
