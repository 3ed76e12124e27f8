"""What NIXL's failures mean to somebody who does not know NIXL."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from lmcache_kit.errors import TransportError

_KNOWN = {
    "nixlRemoteDisconnectError": "the peer is gone",
    "nixlNotFoundError": "there is no such peer, or it has no such memory",
    "nixlBackendError": "the peer cannot be reached",
    "nixlMismatchError": "these bytes are no address of this version of NIXL",
    "nixlCancelledError": "it was cancelled",
}


class Explained:
    """A context in which NIXL's ``failures`` at ``what`` become TransportErrors.

    A class, for a generator would be an eighth of what it costs to read 270 KB.
    """

    __slots__ = ("_failures", "_what")

    def __init__(self, failures: tuple[type[Exception], ...], what: str) -> None:
        self._failures = failures
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, self._failures):
            reason = _KNOWN.get(type(error).__name__, "")
            said = f"NIXL fails at {self._what}" + (f": {reason}" if reason else "")
            raise TransportError(f"{said} ({_code(error)})") from error


def no_start(backends: Sequence[str], asked: str, error: Exception) -> TransportError:
    """``asked``: what the environment wants of UCX."""
    said = f"NIXL does not start with {', '.join(backends)} ({_code(error)})"
    if "UCX" not in backends or not asked:
        return TransportError(said)
    return TransportError(
        f"{said}: UCX found no usable transport with {asked} on this host",
        hint="Unset it, or name what this host has, and tcp, which UCX needs to make contact: "
        "UCX_TLS=rc,cma,tcp",
    )


def _code(error: BaseException) -> str:
    return str(error) or type(error).__name__
