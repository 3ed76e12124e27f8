"""All errors that the kit raises; the tree comes first.

``KitError``
 +-- ``ConfigError``            (ValueError)    the configuration cannot be used
 +-- ``PluginError``            (RuntimeError)  a plugin cannot be used
 |    +-- ``PluginNotFound``    (LookupError)   no installed plugin provides the name
 |    +-- ``DuplicateName``                     two distributions provide the same name
 |    +-- ``PluginBroken``                      the plugin is installed and fails to load
 +-- ``CacheUnavailable``       (ConnectionError)  no cache process answers
 |    +-- ``CacheTimeout``      (TimeoutError)     the cache process did not answer in time
 |    +-- ``CacheStartFailed``                     this machine does not let it start now
 +-- ``ProtocolError``          (ValueError)    bytes from a peer are no valid message
 +-- ``UnsupportedModel``       (ValueError)    this model's KV cannot be cached
 +-- ``CodecError``             (ValueError)    a blob cannot be decoded here
 |    +-- ``CorruptBlob``                       the blob is damaged
 |    +-- ``BlobMismatch``                      the blob is of another chunk
 |    +-- ``UnknownVersion``    (LookupError)   the blob has another format version
 |    +-- ``UnknownProfile``    (LookupError)   the blob's profile is not loaded
 +-- ``BackendError``           (OSError)         a store cannot be read or written
 +-- ``TransportError``         (ConnectionError)  a transfer between cache processes failed
 |    +-- ``TransferTimeout``   (TimeoutError)     the transfer did not complete in time
 +-- ``ControlError``           (RuntimeError)  a control operation cannot be done
      +-- ``InvalidQuery``     (ValueError)    the request itself is wrong
      +-- ``UnknownName``       (LookupError)   no such instance, location, event ...
      +-- ``NoWorker``          (ConnectionError)  no cache process of the instance is alive
      +-- ``DeadlineExceeded``  (TimeoutError)  the operation did not finish in time
      +-- ``OperationFailed``                  the cache process could not carry it out

A message names the thing, the value, the known set and the remedy. ``hint`` holds the remedy, so
that frontends can show it separately.
"""

from __future__ import annotations

from collections.abc import Callable


class KitError(Exception):
    """Base of all errors of the kit. ``hint`` is the remedy, or empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class ConfigError(KitError, ValueError):
    """The configuration cannot be used; the message names the key and its source."""


class PluginError(KitError, RuntimeError):
    """A plugin cannot be used; the message names plugin and distribution."""


class PluginNotFound(PluginError, LookupError):
    """No installed plugin provides the name; the hint has the pip command if one is known."""


class DuplicateName(PluginError):
    """Two distributions provide the same name."""


class PluginBroken(PluginError):
    """The plugin is installed and fails to load, or fails its own probe."""


class CacheUnavailable(KitError, ConnectionError):
    """No cache process answers: it was never started, has ended, or cannot be reached."""


class CacheTimeout(CacheUnavailable, TimeoutError):
    """The cache process did not answer within the deadline."""


class CacheStartFailed(CacheUnavailable):
    """The cache process cannot start on this machine now; the message names folder and reason.

    The configuration is not wrong: the start may succeed later.
    """


class ProtocolError(KitError, ValueError):
    """Bytes from a peer are no valid message, or exceed the size limit."""


class UnsupportedModel(KitError, ValueError):
    """This model's KV layout cannot be cached by this version."""


class CodecError(KitError, ValueError):
    """A blob cannot be decoded here."""


class CorruptBlob(CodecError):
    """The blob is damaged: cut short, or changed."""


class BlobMismatch(CodecError):
    """The blob is intact, and of a chunk of another shape or position."""


class UnknownVersion(CodecError, LookupError):
    """The blob has a format version that this codec does not read."""


class UnknownProfile(CodecError, LookupError):
    """The profile that the blob was encoded with is not loaded."""


class BackendError(KitError, OSError):
    """A store cannot be read or written: unreachable, failing, or closed.

    A store that is full raises this only when something else than its own limit fills it.
    """


class TransportError(KitError, ConnectionError):
    """A transfer between two cache processes failed."""


class TransferTimeout(TransportError, TimeoutError):
    """The bytes did not arrive before the deadline.

    ``settled()`` is true once no more bytes can arrive. Until then the target memory must not be
    used for anything else.
    """

    def __init__(self, message: str, *, settled: Callable[[], bool] = lambda: True) -> None:
        super().__init__(message)
        self.settled = settled


class ControlError(KitError, RuntimeError):
    """A control-plane operation cannot be done."""


class InvalidQuery(ControlError, ValueError):
    """The request itself is wrong; the message names the field and the value."""


class UnknownName(ControlError, LookupError):
    """No such instance, location, method or event.

    ``kind`` and ``name`` say what is unknown. ``known`` lists the names that exist. ``more`` is
    appended to the hint.
    """

    def __init__(self, kind: str, name: str, known: list[str], more: str = "") -> None:
        listed = ", ".join(known) if known else "none"
        super().__init__(f"unknown {kind} {name!r}", hint=f"Known: {listed}{more and '. '}{more}")
        self.kind = kind
        self.name = name
        self.known = known


class NoWorker(ControlError, ConnectionError):
    """The instance is known and none of its cache processes is alive."""


class DeadlineExceeded(ControlError, TimeoutError):
    """The operation did not finish by its deadline."""


class OperationFailed(ControlError):
    """The cache process could not carry out the operation."""
