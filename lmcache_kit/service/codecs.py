"""The codecs of this process, by name, each built once."""

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
    """Codecs of plugins, built when they are first asked for. ``options``: by codec name."""

    def __init__(
        self, plugins: Plugins, options: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._plugins = plugins
        self._options = options or {}
        self._built: dict[str, Codec] = {}
        self._warm: set[str] = set()
        self._building = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of all installed codecs."""
        return sorted({offer.spec.name for offer in self._plugins.specs("codec")})

    def get(self, name: str) -> Codec:
        """Return a codec that is warmed up, which may take seconds the first time.

        Raises PluginError and ConfigError.
        """
        codec = self.make(name)
        with self._building:
            if name not in self._warm:
                self._guarded(name, codec.warm_up)
                self._warm.add(name)
        return codec

    def make(self, name: str) -> Codec:
        """Return a codec that may not be warmed up. Raises PluginError and ConfigError."""
        with self._building:
            if name not in self._built:
                target = self._plugins.resolve("codec", name)
                codec = self._guarded(name, partial(target, *self._arguments(name)))
                if not isinstance(codec, Codec):
                    raise PluginBroken(f"codec {name!r} cannot be made: {codec!r} is no Codec")
                self._built[name] = codec
            return self._built[name]

    def _guarded(self, name: str, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except ConfigError:
            raise
        except Exception as error:  # plugin code: name the codec, whatever it raises
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
    """Return how many threads may encode at once; half of the cores remain for serving."""
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // 2))
