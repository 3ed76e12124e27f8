"""The codecs of this process, by name, each made once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache_kit.errors import ConfigError, PluginBroken
from lmcache_kit.interfaces import Codec
from lmcache_kit.plugins.options import validated

if TYPE_CHECKING:
    from lmcache_kit.plugins import Plugins

MAX_THREADS = 4
_T = TypeVar("_T")


class Codecs:
    """Made from plugins when they are first asked for. ``options``: of each, by its name."""

    def __init__(
        self, plugins: Plugins, options: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._plugins = plugins
        self._options = options or {}
        self._made: dict[str, Codec] = {}
        self._warm: set[str] = set()
        self._making = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Those that are installed."""
        return sorted({offer.spec.name for offer in self._plugins.specs("codec")})

    def get(self, name: str) -> Codec:
        """A codec that is warmed up, which may take seconds. Raises PluginError or ConfigError."""
        codec = self.make(name)
        with self._making:
            if name not in self._warm:
                self._guarded(name, codec.warm_up)
                self._warm.add(name)
        return codec

    def make(self, name: str) -> Codec:
        """The same without warming up, to see whether it can be had at all."""
        with self._making:
            if name not in self._made:
                target = self._plugins.resolve("codec", name)
                codec = self._guarded(name, partial(target, *self._arguments(name)))
                if not isinstance(codec, Codec):
                    raise PluginBroken(f"codec {name!r} cannot be made: {codec!r} is no Codec")
                self._made[name] = codec
            return self._made[name]

    def _guarded(self, name: str, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except ConfigError:
            raise
        except Exception as error:  # a codec is somebody's plugin: say whose, whatever it raises
            raise PluginBroken(
                f"codec {name!r} cannot be made: {type(error).__name__}: {error}"
            ) from error

    def _arguments(self, name: str) -> list[object]:
        given = self._options.get(name)
        if given is None:
            return []
        spec = self._plugins.spec("codec", name)
        return [validated("codec_options", "codec", spec, given)]


def encoding_threads() -> int:
    """How many threads may encode at a time: half of the cores are left to whoever we serve."""
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // 2))
