"""Translation of NIXL's exceptions into TransportErrors with a plain cause."""

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


class TranslateErrors:
    """Context in which NIXL's ``failures`` become TransportErrors; ``what`` names the action.

    A class, since a generator would take an eighth of the time of a read of 270 KB.
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
            message = f"NIXL fails at {self._what}" + (f": {reason}" if reason else "")
            raise TransportError(f"{message} ({_code(error)})") from error


def start_error(backends: Sequence[str], requested: str, error: Exception) -> TransportError:
    """Return the error for an agent that does not start; ``requested`` are UCX's variables."""
    message = f"NIXL does not start with {', '.join(backends)} ({_code(error)})"
    if "UCX" not in backends or not requested:
        return TransportError(message)
    return TransportError(
        f"{message}: UCX found no usable transport with {requested} on this host",
        hint="Unset it, or name what this host has, and tcp, which UCX needs to make contact: "
        "UCX_TLS=rc,cma,tcp",
    )


def _code(error: BaseException) -> str:
    return str(error) or type(error).__name__
