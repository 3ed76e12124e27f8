"""CURVE encryption and authentication of the monitor port: key files and sockets.

The controller authenticates itself by its key, and admits only workers whose public keys it has.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.auth import load_certificate
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from lmcache_kit.errors import ConfigError

log = logging.getLogger(__name__)

CONTROLLER = "controller"
WORKERS = "workers"

_DOMAIN = b"lmcache_kit"
_MAKE = "Make keys with 'lmcache-kit keys'"
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@dataclass(frozen=True, slots=True)
class ControllerKeys:
    """The controller's pair, and the public keys of all workers that may connect."""

    public: bytes
    secret: bytes = field(repr=False)
    workers: frozenset[bytes]

    @classmethod
    def load(cls, folder: Path) -> ControllerKeys:
        """Load ``controller.key_secret`` and ``workers/*.key``. Raises ConfigError."""
        public, secret = _pair("--curve", folder / f"{CONTROLLER}.key_secret")
        files = sorted((folder / WORKERS).glob("*.key"))
        if not files:
            raise ConfigError(
                f"--curve: no worker's key is in {folder / WORKERS}, so nobody could connect",
                hint=f"Make one with 'lmcache-kit keys {folder} --worker NAME'",
            )
        return cls(public, secret, frozenset(_public("--curve", file) for file in files))

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether the worker with this public key may connect; called by zmq.auth."""
        return key in self.workers


@dataclass(frozen=True, slots=True)
class WorkerKeys:
    """A worker's pair of keys, and the public key of its controller."""

    controller: bytes
    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def load(cls, controller_key: Path, worker_key: Path) -> WorkerKeys:
        """Load the controller's public file and the worker's secret one. Raises ConfigError."""
        controller = _public("controller_key", controller_key)
        return cls(controller, *_pair("worker_key", worker_key))

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Encrypt a socket. To be called before it connects."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.controller)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)


class ZapAuthenticator:
    """Admits only workers with known keys to sockets of ``context``, and counts the others."""

    def __init__(
        self, context: zmq.asyncio.Context, keys: ControllerKeys, counts: Counter[str]
    ) -> None:
        self._keys = keys
        self._counts = counts
        self._authenticator = AsyncioAuthenticator(context)
        self._authenticator.configure_curve_callback(_DOMAIN.decode(), keys)
        self._authenticator.start()
        self._protected: list[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]] = []
        self._tasks: list[asyncio.Task[None]] = []

    def protect(self, socket: zmq.asyncio.Socket) -> None:
        """Encrypt a socket. To be called before it is bound."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        # Refuse all connections while no authenticator runs; ZMQ's default is to admit all.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        events = socket.get_monitor_socket(_FAILED)
        self._protected.append((socket, events))
        self._tasks.append(asyncio.create_task(self._count_refused(events)))

    async def stop(self) -> None:
        """Stop to authenticate. To be called before the sockets are closed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for socket, events in self._protected:
            with suppress(zmq.ZMQError):  # a socket that could not be bound is closed
                socket.disable_monitor()
            events.close(linger=0)
        self._authenticator.stop()
        self._tasks, self._protected = [], []
        await asyncio.sleep(0)  # the authenticator's task ends

    async def _count_refused(self, events: zmq.asyncio.Socket) -> None:
        while True:
            message = await recv_monitor_message(events)
            self._counts["connections_refused_total"] += 1
            log.debug("a connection was refused: %s", zmq.Event(message["event"]).name)


@contextmanager
def handshakes(socket: zmq.Socket[bytes], keys: WorkerKeys | None) -> Iterator[zmq.Socket[bytes]]:
    """Monitor failed handshakes for :func:`refusal`; to be entered before ``socket`` connects.

    Without keys a connection lost in mid-handshake says nothing, and ZMQ connects again by itself.
    """
    events = socket.get_monitor_socket(
        _FAILED if keys else _FAILED & ~zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    )
    try:
        yield events
    finally:
        socket.disable_monitor()
        events.close(linger=0)


def refusal(events: zmq.Socket[bytes], keys: WorkerKeys | None) -> str:
    """Explain why the controller refused the connection; empty when it did not."""
    try:
        message = recv_monitor_message(events, zmq.NOBLOCK)
    except zmq.Again:
        return ""
    if message["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return (
            "the controller does not know worker_key; put its public .key file into workers/ of "
            "the folder that the controller's --curve names, and restart the controller"
        )
    if message["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return (
            "the connection ended in the handshake; is controller_key this controller's, and was "
            "it started with --curve?"
        )
    if message["value"] != zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return "what listens at controller_url does not answer as a controller"
    if keys:
        return (
            "the controller does not encrypt; start it with --curve, or take controller_key and "
            "worker_key out of this configuration"
        )
    return "the controller wants encryption; configure controller_key and worker_key"


def _pair(what: str, file: Path) -> tuple[bytes, bytes]:
    public, secret = _read(what, file)
    if secret is None:
        raise ConfigError(
            f"{what}: {file} holds no secret key", hint="Name the file that ends in .key_secret"
        )
    if zmq.curve_public(secret) != public:
        raise ConfigError(f"{what}: the two keys in {file} do not belong together", hint=_MAKE)
    if file.stat().st_mode & 0o077:
        log.warning("%s: others may read the secret key in %s; chmod 600 it", what, file)
    return public, secret


def _public(what: str, file: Path) -> bytes:
    public, secret = _read(what, file)
    if secret is not None:
        raise ConfigError(
            f"{what}: {file} holds a secret key, which only its owner may have",
            hint="Use the file that ends in .key, and make new keys if this one was given away",
        )
    return public


def _read(what: str, file: Path) -> tuple[bytes, bytes | None]:
    """Read a key file. Errors show neither their cause nor the content, which may be secret."""
    try:
        public, secret = load_certificate(file)
        for key in (public, secret):
            if key is not None and len(z85.decode(key)) != 32:
                raise ValueError
    except OSError as error:
        reason = error.strerror or "there is no such file"
        raise ConfigError(f"{what}: {file} cannot be read: {reason}", hint=_MAKE) from None
    except (ValueError, LookupError, struct.error):
        raise ConfigError(f"{what}: {file} is not a key file", hint=_MAKE) from None
    return public, secret
