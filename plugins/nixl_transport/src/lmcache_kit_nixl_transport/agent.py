"""The NIXL agent of this process: memory registration, peers and READ transfers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple
from uuid import uuid4

from lmcache_kit.errors import TransportError
from lmcache_kit_nixl_transport import library
from lmcache_kit_nixl_transport.nixl_errors import TranslateErrors, start_error
from lmcache_kit_nixl_transport.options import NixlOptions
from lmcache_kit_nixl_transport.transfer import CLOSED, AgentClosed, Transfer

MEMORY = "DRAM"
_READING = "reading from a peer"


class Copy(NamedTuple):
    """Copy of ``nbytes`` from address ``remote`` of a peer to address ``local`` of this process."""

    local: int
    remote: int
    nbytes: int


class Agent:
    """Thread-safe wrapper of a NIXL agent. Raises TransportError where NIXL fails.

    ``name`` is unique, since NIXL takes a name for one incarnation. ``requested`` describes UCX's
    variables in the environment, for the message when NIXL does not start.

    A transfer that NIXL has begun cannot be cancelled, even if NIXL reports so when its handle is
    released. Only the end of the agent stops it.
    """

    def __init__(self, options: NixlOptions, requested: str) -> None:
        self.name = uuid4().hex
        self._state = threading.Condition()
        self._closing = threading.Lock()
        self._calls = 0
        self._closed = False
        self._in_flight: dict[Transfer, None] = {}
        self._leaving: set[str] = set()
        self._registered: list[Any] = []
        api = library.load()
        self._failures = library.failures(api)
        try:
            self._nixl = library.new_agent(
                api, self.name, options.backends, options.progress_delay_us
            )
        except self._failures as error:
            raise start_error(options.backends, requested, error) from error
        missing = [name for name in options.backends if name not in self._nixl.backends]
        if missing:
            raise TransportError(
                f"NIXL has no backend {', '.join(missing)} (option backends)",
                hint=f"Known: {', '.join(self._nixl.plugin_list)}",
            )

    def register(self, address: int, nbytes: int) -> None:
        """Register this memory with NIXL until the agent is closed."""
        with self._call(f"registering {nbytes} bytes") as nixl:
            self._registered.append(nixl.register_memory([(address, nbytes, 0, "")], MEMORY))

    def metadata(self) -> bytes:
        """Return the address and the registered memory of this agent, for a peer's :meth:`add`."""
        with self._call("describing this agent") as nixl:
            return bytes(nixl.get_agent_metadata())

    def add(self, name: str, metadata: bytes) -> None:
        """Add the peer ``name``. Raises TransportError while it is being removed."""
        with self._state:
            if name in self._leaving:
                raise TransportError("an earlier read from this peer is still in flight")
        with self._call("adding a peer") as nixl:
            named = nixl.add_remote_agent(metadata)
            named = named.decode(errors="replace") if isinstance(named, bytes) else named
            if named != name:
                nixl.remove_remote_agent(named)
                raise TransportError("a peer's address names one agent and leads to another")

    def remove(self, name: str) -> None:
        """Remove the peer once none of its transfers is in flight."""
        with self._state:
            self._leaving.add(name)
        self._remove_idle()

    def read(self, peer: str, copies: Sequence[Copy]) -> Transfer:
        """Begin a READ. Over CMA, the transfer is finished when this returns."""
        local = [(copy.local, copy.nbytes, 0) for copy in copies]
        remote = [(copy.remote, copy.nbytes, 0) for copy in copies]
        with self._call(_READING) as nixl:
            handle = nixl.initialize_xfer(
                "READ",
                nixl.get_xfer_descs(local, MEMORY),
                nixl.get_xfer_descs(remote, MEMORY),
                peer,
            )
            transfer = Transfer(peer, handle)
            with self._state:
                self._in_flight[transfer] = None
            self._advance(transfer, nixl.transfer)
        return transfer

    def is_done(self, transfer: Transfer) -> bool:
        """Whether all bytes have arrived. Raises TransportError if the transfer failed."""
        if transfer.succeeded:
            return True
        with self._call(_READING) as nixl:
            return self._advance(transfer, nixl.check_xfer_state)

    def settled(self, transfer: Transfer) -> bool:
        """Whether the transfer can change no byte any more. Never raises."""
        try:
            return self.is_done(transfer)
        except TransportError:
            return transfer.finished

    def sweep(self) -> None:
        """Poll abandoned transfers, which no reader polls any more."""
        with self._state:
            abandoned = [transfer for transfer in self._in_flight if transfer.abandoned]
        for transfer in abandoned:
            self.settled(transfer)

    def in_flight(self) -> int:
        """Return how many transfers NIXL has begun and not ended."""
        with self._state:
            return len(self._in_flight)

    def close(self) -> None:
        """End every transfer and deregister the memory. Safe to call twice."""
        with self._closing:
            self._end()

    def _end(self) -> None:
        with self._state:
            self._closed = True
            self._state.wait_for(lambda: self._calls == 0)
            nixl, self._nixl = self._nixl, None
            in_flight = list(self._in_flight)
            self._in_flight.clear()
        if nixl is None:
            return
        for transfer in in_flight:
            transfer.detach()
        while self._registered:
            with suppress(*self._failures):
                nixl.deregister_memory(self._registered.pop())
        # The end of the agent stops transfers in flight, even where a traceback keeps `nixl`.
        nixl.agent = None
        for transfer in in_flight:
            transfer.end()

    def _advance(self, transfer: Transfer, poll: Callable[[Any], str]) -> bool:
        """Poll the transfer's state, within a call of NIXL."""

        def step(handle: Any) -> bool:
            with TranslateErrors(self._failures, _READING):
                state = poll(handle)
            if state == "ERR":
                raise TransportError(f"NIXL fails at {_READING}")
            return state == "DONE"

        try:
            return transfer.advance(step)
        finally:
            if transfer.finished:
                with self._state:
                    self._in_flight.pop(transfer, None)
                    leaving = bool(self._leaving)
                if leaving:
                    self._remove_idle()

    def _remove_idle(self) -> None:
        with self._state:
            idle = self._leaving - {transfer.peer for transfer in self._in_flight}
            self._leaving -= idle
        for name in idle:
            try:
                with self._call("removing a peer") as nixl:
                    nixl.remove_remote_agent(name)
            except TransportError:  # NIXL has removed the peer by itself, or the agent is closing
                continue

    def _call(self, what: str) -> _Call:
        return _Call(self, what)

    def _enter(self) -> Any:
        with self._state:
            if self._closed:
                raise AgentClosed(CLOSED)
            self._calls += 1
            return self._nixl

    def _leave(self) -> None:
        with self._state:
            self._calls -= 1
            if self._closed:
                self._state.notify_all()


class _Call(TranslateErrors):
    """Context of a call to NIXL; :meth:`Agent.close` waits for its end."""

    __slots__ = ("_agent",)

    def __init__(self, agent: Agent, what: str) -> None:
        super().__init__(agent._failures, what)
        self._agent = agent

    def __enter__(self) -> Any:
        return self._agent._enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._agent._leave()
        super().__exit__(kind, error, trace)
