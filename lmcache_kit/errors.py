"""Every error that the kit raises, the tree first.

``KitError``
 +-- ``ConfigError``            (ValueError)    the configuration cannot be used
 +-- ``PluginError``            (RuntimeError)  a plugin cannot be used
 |    +-- ``PluginNotFound``    (LookupError)   nothing installed provides what was named
 |    +-- ``DuplicateName``                     two distributions provide the same name
 |    +-- ``PluginBroken``                      it is installed and fails to load
 +-- ``CacheUnavailable``       (ConnectionError)  no cache process answers
 |    +-- ``CacheTimeout``      (TimeoutError)     it did not answer in time
 +-- ``ProtocolError``          (ValueError)    bytes from a peer do not mean anything
 +-- ``UnsupportedModel``       (ValueError)    this model's KV cannot be cached
 +-- ``CodecError``             (ValueError)    encoded bytes cannot be decoded here
 |    +-- ``CorruptBlob``                       they are damaged
 |    +-- ``BlobMismatch``                      they are of another chunk
 |    +-- ``UnknownVersion``    (LookupError)   they are of another version of the format
 |    +-- ``UnknownProfile``    (LookupError)   the profile they were made with is not at hand
 +-- ``BackendError``           (OSError)         a store cannot be read or written
 +-- ``TransportError``         (ConnectionError)  bytes do not get from one process to another
 |    +-- ``TransferTimeout``   (TimeoutError)     they did not in time
 +-- ``ControlError``           (RuntimeError)  a control operation cannot be done
      +-- ``InvalidQuery``     (ValueError)    what was asked for makes no sense
      +-- ``UnknownName``       (LookupError)   no such instance, location, event ...
      +-- ``NoWorker``          (ConnectionError)  the instance is known and nobody answers for it
      +-- ``DeadlineExceeded``  (TimeoutError)
      +-- ``OperationFailed``                  the cache process tried and could not

A message names the thing, the value and the known set, and says what to do next. ``hint`` holds
that last part, so that frontends can show it apart.
"""

from __future__ import annotations

from collections.abc import Callable


class KitError(Exception):
    """Base of all errors of the kit. ``hint`` says what to do next; it may be empty."""

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
    """Nothing that is installed provides the name; the hint has the pip command if one is known."""


class DuplicateName(PluginError):
    """Two distributions provide the same name."""


class PluginBroken(PluginError):
    """The plugin is installed and fails to load, or fails its own probe."""


class CacheUnavailable(KitError, ConnectionError):
    """No cache process answers: never started, gone, or not reachable."""


class CacheTimeout(CacheUnavailable, TimeoutError):
    """The cache process did not answer within the deadline."""


class ProtocolError(KitError, ValueError):
    """Bytes from a peer are not a valid message, or are larger than allowed."""


class UnsupportedModel(KitError, ValueError):
    """This model's KV layout cannot be cached by this version."""


class CodecError(KitError, ValueError):
    """Encoded bytes cannot be decoded here."""


class CorruptBlob(CodecError):
    """The bytes are not what an encoder wrote: cut short, or changed."""


class BlobMismatch(CodecError):
    """The bytes are intact, and of a chunk of another shape or place."""


class UnknownVersion(CodecError, LookupError):
    """The bytes are of a version of the format that this one does not read."""


class UnknownProfile(CodecError, LookupError):
    """The profile that the bytes were made with is not at hand."""


class BackendError(KitError, OSError):
    """A store cannot be read or written: not reachable, failing, full for other reasons than its
    own limit, or closed."""


class TransportError(KitError, ConnectionError):
    """Bytes do not get from one cache process to another."""


class TransferTimeout(TransportError, TimeoutError):
    """They did not in time. ``settled`` tells whether none can come any more: until it is true
    the memory that they were meant for must not be used for anything else."""

    def __init__(self, message: str, *, settled: Callable[[], bool] = lambda: True) -> None:
        super().__init__(message)
        self.settled = settled


class ControlError(KitError, RuntimeError):
    """A control-plane operation cannot be done."""


class InvalidQuery(ControlError, ValueError):
    """The request itself is wrong; the message names the field and the value."""


class UnknownName(ControlError, LookupError):
    """No such instance, location, method or event. ``known`` lists those that exist, and ``more``
    is to be said after them."""

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
    """The cache process tried to carry the operation out and could not."""
