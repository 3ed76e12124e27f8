"""One NIXL agent: what this transport asks of NIXL, and what it makes of NIXL's answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple
from uuid import uuid4

from lmcache_kit.errors import TransportError
from lmcache_kit_nixl_transport import library
from lmcache_kit_nixl_transport.options import NixlOptions
from lmcache_kit_nixl_transport.reasons import Explained, no_start
from lmcache_kit_nixl_transport.transfer import CLOSED, AgentClosed, Transfer

MEMORY = "DRAM"
_READING = "reading from a peer"


class Copy(NamedTuple):
    """``nbytes`` from the address ``remote`` of a peer to the address ``local`` of ours."""

    local: int
    remote: int
    nbytes: int


class Agent:
    """Thread-safe. ``name`` is new with each: NIXL takes a name for one incarnation.

    Raises TransportError where NIXL fails. A transfer that NIXL has begun cannot be cancelled, even
    if NIXL says so when its handle is released; only the end of the agent stops it. ``asked``: what
    the environment wants of UCX, for the reason why NIXL does not start.
    """

    def __init__(self, options: NixlOptions, asked: str) -> None:
        self.name = uuid4().hex
        self._state = threading.Condition()
        self._closing = threading.Lock()
        self._calls = 0
        self._closed = False
        self._flying: dict[Transfer, None] = {}
        self._leaving: set[str] = set()
        self._registered: list[Any] = []
        api = library.load()
        self._failures = library.failures(api)
        try:
            self._nixl = library.new_agent(
                api, self.name, options.backends, options.progress_delay_us
            )
        except self._failures as error:
            raise no_start(options.backends, asked, error) from error
        missing = [name for name in options.backends if name not in self._nixl.backends]
        if missing:
            raise TransportError(
                f"NIXL has no backend {', '.join(missing)}",
                hint=f"Known: {', '.join(self._nixl.plugin_list)}",
            )

    def register(self, address: int, nbytes: int) -> None:
        """Let NIXL read and write this memory, for as long as the agent lives."""
        with self._call(f"registering {nbytes} bytes") as nixl:
            self._registered.append(nixl.register_memory([(address, nbytes, 0, "")], MEMORY))

    def metadata(self) -> bytes:
        """How to reach this agent and what it registered, for a peer's :meth:`add`."""
        with self._call("telling its address") as nixl:
            return bytes(nixl.get_agent_metadata())

    def add(self, name: str, metadata: bytes) -> None:
        """Know the peer ``name`` from now on."""
        with self._state:
            if name in self._leaving:
                raise TransportError("what was read from this peer before is still under way")
        with self._call("a peer's address") as nixl:
            said = nixl.add_remote_agent(metadata)
            said = said.decode(errors="replace") if isinstance(said, bytes) else said
            if said != name:
                nixl.remove_remote_agent(said)
                raise TransportError("a peer's address names one agent and leads to another")

    def remove(self, name: str) -> None:
        """Forget the peer, once nothing that comes from it is under way."""
        with self._state:
            self._leaving.add(name)
        self._remove_idle()

    def read(self, peer: str, copies: Sequence[Copy]) -> Transfer:
        """Begin to read. By CMA, all has come when this returns."""
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
                self._flying[transfer] = None
            self._advance(transfer, nixl.transfer)
        return transfer

    def landed(self, transfer: Transfer) -> bool:
        """All of it has. Raises TransportError if it failed; then no more comes."""
        if transfer.complete:
            return True
        with self._call(_READING) as nixl:
            return self._advance(transfer, nixl.check_xfer_state)

    def settled(self, transfer: Transfer) -> bool:
        """It changes no byte any more. Never raises."""
        try:
            return self.landed(transfer)
        except TransportError:
            return transfer.over

    def sweep(self) -> None:
        """Look at what nobody waits for any more."""
        with self._state:
            abandoned = [transfer for transfer in self._flying if transfer.abandoned]
        for transfer in abandoned:
            self.settled(transfer)

    def in_flight(self) -> int:
        """Return how many transfers NIXL has begun and not ended."""
        with self._state:
            return len(self._flying)

    def close(self) -> None:
        """End every transfer and give the memory back. Safe to call twice."""
        with self._closing:
            self._end()

    def _end(self) -> None:
        with self._state:
            self._closed = True
            self._state.wait_for(lambda: self._calls == 0)
            nixl, self._nixl = self._nixl, None
            flying = list(self._flying)
            self._flying.clear()
        if nixl is None:
            return
        for transfer in flying:
            transfer.detach()
        while self._registered:
            with suppress(*self._failures):
                nixl.deregister_memory(self._registered.pop())
        nixl.agent = None  # its end stops what is under way, even where a traceback keeps `nixl`
        for transfer in flying:
            transfer.end()

    def _advance(self, transfer: Transfer, ask: Callable[[Any], str]) -> bool:
        """Within a call of NIXL: ask it how the transfer is."""

        def step(handle: Any) -> bool:
            with Explained(self._failures, _READING):
                state = ask(handle)
            if state == "ERR":
                raise TransportError(f"NIXL fails at {_READING}")
            return state == "DONE"

        try:
            return transfer.advance(step)
        finally:
            if transfer.over:
                with self._state:
                    self._flying.pop(transfer, None)
                    leaving = bool(self._leaving)
                if leaving:
                    self._remove_idle()

    def _remove_idle(self) -> None:
        with self._state:
            idle = self._leaving - {transfer.peer for transfer in self._flying}
            self._leaving -= idle
        for name in idle:
            try:
                with self._call("forgetting a peer") as nixl:
                    nixl.remove_remote_agent(name)
            except TransportError:  # NIXL has forgotten it by itself, or we are closing
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


class _Call(Explained):
    """A call of NIXL; :meth:`Agent.close` waits for its end."""

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
