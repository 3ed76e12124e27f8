"""The transports of this process, each made once, on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmcache_kit.errors import KitError, PluginNotFound, TransportError
from lmcache_kit.first_party import install_command
from lmcache_kit.interfaces import Transport
from lmcache_kit.peer.selection import AUTO, candidates
from lmcache_kit.plugins.options import validated
from lmcache_kit.protocol.peer import Address
from lmcache_kit.specs import TransportSpec

if TYPE_CHECKING:
    from lmcache_kit.plugins import Plugins

log = logging.getLogger(__name__)

READY_S = 5.0
_STARTING = "it is still starting"


class Transports:
    """The transports that ``channel`` allows; ``names`` are in the order to try.

    Each is made with ``memory``, ``host`` and its ``options``, which are by name. Raises
    PluginNotFound when the transport that ``channel`` names, or any at all, is not installed, and
    ConfigError for options that do not fit. A transport that does not work on this machine is no
    error: :meth:`get` says why.
    """

    def __init__(
        self,
        plugins: Plugins,
        channel: str,
        memory: memoryview,
        host: str,
        options: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._plugins = plugins
        self._memory = memory
        self._host = host
        if channel != AUTO:
            plugins.spec("transport", channel)
        specs = [offer.spec for offer in plugins.specs("transport")]
        found = [spec for spec in specs if isinstance(spec, TransportSpec)]
        self.names: Sequence[str] = candidates(channel, found)
        if not self.names:
            raise PluginNotFound(
                "enable_p2p needs a transport, and none is installed",
                hint=install_command("transport"),
            )
        self._options = {name: options.get(name) for name in self.names}
        for name, given in self._options.items():
            _arguments(plugins, name, given)
        self._made: dict[str, Transport | str] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(
            target=self._make_all, name="lmcache-kit-transports", daemon=True
        )

    def start(self) -> None:
        """Begin to make the transports."""
        self._thread.start()

    def get(self, name: str, timeout_s: float = READY_S) -> Transport | str:
        """Return a transport, or why it cannot be used."""
        with self._changed:
            if name in self.names:
                self._changed.wait_for(lambda: name in self._made or self._closed, timeout_s)
                return self._made.get(name, _STARTING)
        return f"transfer_channel leaves {', '.join(self.names)}"

    def addresses(self) -> tuple[Address, ...]:
        """Return the address of each transport, for peers."""
        deadline = time.monotonic() + READY_S
        found = []
        for name in self.names:
            transport = self.get(name, max(0.0, deadline - time.monotonic()))
            if isinstance(transport, str):
                found.append(Address(name, unusable=transport))
                continue
            try:
                found.append(Address(name, transport.address()))
            except TransportError as error:
                found.append(Address(name, unusable=error.message))
        return tuple(found)

    def close(self) -> None:
        """Close all transports, which ends their transfers. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        made, self._made = self._made, {}
        for transport in made.values():
            if not isinstance(transport, str):
                transport.close()

    def _make_all(self) -> None:
        for name in self.names:
            made = make(self._plugins, name, self._memory, self._host, self._options[name])
            if isinstance(made, str):
                log.warning("transport %s cannot be used here: %s", name, made)
            with self._changed:
                self._made[name] = made
                self._changed.notify_all()
                if self._closed:
                    return


def make(
    plugins: Plugins,
    name: str,
    memory: memoryview,
    host: str,
    options: Mapping[str, Any] | None,
) -> Transport | str:
    """Make a transport over this memory; return why not when it fails."""
    try:
        target = plugins.resolve("transport", name)
        made = target(memory, host, *_arguments(plugins, name, options))
    except KitError as error:
        return str(error)
    # A transport is a plugin and may raise anything; others may serve without it.
    except Exception as error:
        log.exception("transport %s could not be made", name)
        return f"{type(error).__name__}: {error}"
    return made if isinstance(made, Transport) else f"{made!r} is no Transport"


def _arguments(plugins: Plugins, name: str, given: Mapping[str, Any] | None) -> list[object]:
    """Return the options as arguments. Raises ConfigError for options that do not fit."""
    spec = plugins.spec("transport", name)
    if not spec.config and not given:
        return []
    return [validated("transport_options", "transport", spec, given or {})]
