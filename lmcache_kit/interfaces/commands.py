"""What subcommands of plugins get from the kit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class CommandContext(Protocol):
    """The ``obj`` of the click context of a plugin's command: see ``click.pass_obj``."""

    def options(self, name: str) -> Mapping[str, Any]:
        """Return the options that the configuration has for a backend, codec or transport.

        The configuration is that of ``LMCACHE_CONFIG_FILE`` and ``LMCACHE_*``, with the keys of the
        plugin translated to its options. Empty for a name that the configuration does not mention.
        Raise ConfigError for a configuration that cannot be read.
        """
        ...
