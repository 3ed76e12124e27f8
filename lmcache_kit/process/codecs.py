"""The codecs of this process, by name, each made once."""

from __future__ import annotations

import pkgutil
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lmcache_kit.errors import ConfigError, PluginBroken
from lmcache_kit.interfaces import Codec

if TYPE_CHECKING:
    from lmcache_kit.plugins import Plugins


class Codecs:
    """Made from plugins when they are first asked for. ``options``: of each, by its name."""

    def __init__(
        self, plugins: Plugins, options: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._plugins = plugins
        self._options = options or {}
        self._made: dict[str, Codec] = {}
        self._making = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Those that are installed."""
        return sorted({offer.spec.name for offer in self._plugins.specs("codec")})

    def get(self, name: str) -> Codec:
        """Import and warm up takes time at the first call. Raises PluginError or ConfigError."""
        with self._making:
            if name not in self._made:
                self._made[name] = self._make(name)
            return self._made[name]

    def _make(self, name: str) -> Codec:
        target = self._plugins.resolve("codec", name)
        arguments = self._arguments(name)
        try:
            codec = target(*arguments)
            if not isinstance(codec, Codec):
                raise TypeError(f"{codec!r} is no Codec")
            codec.warm_up()
        except ConfigError:
            raise
        except Exception as error:  # a codec is somebody's plugin: say whose, whatever it raises
            raise PluginBroken(
                f"codec {name!r} cannot be made: {type(error).__name__}: {error}"
            ) from error
        return codec

    def _arguments(self, name: str) -> list[object]:
        given = self._options.get(name)
        if given is None:
            return []
        config = self._plugins.spec("codec", name).config
        if not config:
            raise ConfigError(f"codec_options: codec {name!r} takes no options")
        try:
            return [pkgutil.resolve_name(config)(**given)]
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(map(str, [name, *detail["loc"]]))
            raise ConfigError(f"codec_options: {where}: {detail['msg']}") from None
