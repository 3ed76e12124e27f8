"""The namespaces that workers of this process registered, and which of them a request means."""

from __future__ import annotations

from lmcache_kit.errors import UnknownName
from lmcache_kit.keys import Namespace


class NamespaceRegistry:
    """Base namespaces, in the order they came. Safe to use from any thread."""

    def __init__(self) -> None:
        self._bases: dict[Namespace, None] = {}

    def register(self, namespace: Namespace) -> None:
        """Chunks are stored under this base namespace."""
        self._bases = {**self._bases, namespace: None}

    @property
    def bases(self) -> tuple[Namespace, ...]:
        return tuple(self._bases)

    def chosen(
        self, tokens: bytes | None, model: str | None, cache_salt: str
    ) -> list[bytes] | None:
        """Digests of the namespaces that a request is about; None for all. Raises UnknownName."""
        if tokens is None and model is None and not cache_salt:
            return None
        bases = self.bases
        if model is not None:
            known = sorted({base.model for base in bases})
            if model not in known:
                raise UnknownName("model", model, known)
            bases = tuple(base for base in bases if base.model == model)
        return [base.variant(cache_salt=cache_salt).digest for base in bases]
