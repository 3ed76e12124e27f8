"""The registered namespaces, and the choice among them by model and salt."""

from __future__ import annotations

import logging
from collections.abc import Collection

from lmcache_kit.errors import UnknownName
from lmcache_kit.keys import Namespace

logger = logging.getLogger(__name__)


class NamespaceRegistry:
    """The base namespaces of engines, in order of registration. Thread-safe."""

    def __init__(self) -> None:
        self._bases: dict[Namespace, None] = {}

    def register(self, namespace: Namespace, in_use: Collection[Namespace] = ()) -> list[Namespace]:
        """Register a base namespace under which chunks are stored.

        Return those of the same model that it replaces: no engine uses them, as ``in_use`` says.
        Their chunks stay until they are evicted, and the log says what tells them apart.
        """
        replaced = [
            base
            for base in self._bases
            if base.model == namespace.model
            and base.digest != namespace.digest
            and base not in in_use
        ]
        if replaced and namespace not in self._bases:
            differences = list(replaced[-1].differences(namespace))
            asked_for = [name for name, _, _ in differences] == ["generation"]
            logger.log(
                logging.INFO if asked_for else logging.WARNING,
                "KV that is cached of model %r is not used any more: %s",
                namespace.model,
                ", ".join(
                    f"{name} was {before or 'not set'} and is {now or 'not set'}"
                    for name, before, now in differences
                ),
            )
        self._bases = {**self._bases, namespace: None}
        return replaced

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
