"""The registered namespaces, and the choice among them by model and salt."""

from __future__ import annotations

from lmcache_kit.errors import UnknownName
from lmcache_kit.keys import Namespace


class NamespaceRegistry:
    """The base namespaces of workers, in order of registration. Thread-safe."""

    def __init__(self) -> None:
        self._bases: dict[Namespace, None] = {}

    def register(self, namespace: Namespace) -> None:
        """Register a base namespace under which chunks are stored."""
        self._bases = {**self._bases, namespace: None}

    @property
    def bases(self) -> tuple[Namespace, ...]:
        return tuple(self._bases)

    def chosen(
        self, tokens: bytes | None, model: str | None, cache_salt: str
    ) -> list[bytes] | None:
        """Return the digests of the namespaces a request means; None for all.

        Raises UnknownName.
        """
        if tokens is None and model is None and not cache_salt:
            return None
        bases = self.bases
        if model is not None:
            known = sorted({base.model for base in bases})
            if model not in known:
                raise UnknownName("model", model, known)
            bases = tuple(base for base in bases if base.model == model)
        return [base.variant(cache_salt=cache_salt).digest for base in bases]
