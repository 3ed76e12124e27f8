"""Bytes with a short repr, for failing assertions."""

from __future__ import annotations

from xxhash import xxh3_64_hexdigest

_SHOWN_WHOLE = 64


class Bytes(bytes):
    """Bytes whose repr is one line, however long they are.

    Where ``CI`` is set, or with ``-vv``, pytest compares the whole reprs by :mod:`difflib`. For two
    values of a megabyte that takes hours and looks like a hang.
    """

    def __repr__(self) -> str:
        if len(self) <= _SHOWN_WHOLE:
            return super().__repr__()
        return f"<{len(self)} bytes, xxh3 {xxh3_64_hexdigest(self)}, from {self[:8]!r} on>"
