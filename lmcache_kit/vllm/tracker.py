"""What the scheduler's side knows of one request: its chunks, and which are still to be saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lmcache_kit.keys import KEY_BYTES, ChunkKey, chunk_key, pack_tokens

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from lmcache_kit.keys import Namespace
    from lmcache_kit.process.client import PendingLookup
    from lmcache_kit.protocol.local import Found

SKIP_SAVE = "lmcache.skip_save"
TAG_PREFIX = "lmcache.tag."


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """``decode``: also what was generated. ``unfull``: also a last chunk that is not full."""

    chunk_size: int
    decode: bool
    unfull: bool


class Hit(NamedTuple):
    """A lookup's answer (None: a miss), when it came, and how many tokens vLLM held itself."""

    found: Found | None
    at: float
    computed: int


class Due(NamedTuple):
    """A chunk to save."""

    start: int
    end: int
    parent: ChunkKey
    tokens: bytes


@dataclass(slots=True)
class Tracked:
    """``asked``: the lookup under way. ``saved``: the first so many tokens are in the cache, or on
    their way to it."""

    request: Request
    namespace: bytes
    saves: bool
    hit: Hit | None = None
    asked: PendingLookup | None = None
    saved: int = 0
    _keys: list[ChunkKey] = field(default_factory=list)

    def packed(self) -> bytes:
        """All tokens of the request, packed."""
        return pack_tokens(self.request.all_token_ids[:])

    def due(self, valid: int, policy: SavePolicy, *, finished: bool = False) -> Iterator[Due]:
        """Chunks to save, now that the KV of the first ``valid`` tokens is there.

        Full chunks as they fill up; the partial one at the prompt's end when that is reached, and
        the one at the very end when the request is ``finished``.
        """
        size = policy.chunk_size
        prompt = self.request.num_prompt_tokens
        limit = valid if policy.decode else min(valid, prompt)
        start = self.saved // size * size
        while start + size <= limit:
            if start + size > self.saved:
                yield self._due(start, start + size, size)
            start += size
        ends_here = limit == prompt or finished
        if policy.unfull and ends_here and limit > max(start, self.saved):
            yield self._due(start, limit, size)

    def _due(self, start: int, end: int, size: int) -> Due:
        self.saved = end
        return Due(start, end, self._parent(start, size), self._tokens(start, end))

    def _parent(self, start: int, size: int) -> ChunkKey:
        """Key of the chunk that ends at ``start``; the chain grows as far as is asked."""
        while len(self._keys) * size < start:
            begin = len(self._keys) * size
            parent = self._keys[-1] if self._keys else self.namespace[:KEY_BYTES]
            self._keys.append(chunk_key(self.namespace, parent, self._tokens(begin, begin + size)))
        return self._keys[start // size - 1] if start else self.namespace[:KEY_BYTES]

    def _tokens(self, start: int, end: int) -> bytes:
        return pack_tokens(self.request.all_token_ids[start:end])


def whole_tokens(found: Found) -> int:
    """How far from the first token on the cache holds chunks that match in full."""
    end = 0
    for chunk in found.chunks:
        if chunk.usable < chunk.tokens:
            break
        end = chunk.end
    return end


def track(request: Request, base: Namespace) -> Tracked | None:
    """None for a request that the cache must not touch.

    Multimodal inputs and prompt embeddings are not in the token ids that name chunks; pooling
    models need every token computed; a streaming session takes tokens back; ids that no vocabulary
    has cannot be packed.
    """
    if (
        request.mm_features
        or request.prompt_embeds is not None
        or request.prompt_token_ids is None
        or request.pooling_params is not None
        or request.resumable
    ):
        return None
    try:
        pack_tokens(request.prompt_token_ids)
    except OverflowError:
        return None
    wishes: dict[str, Any] = request.kv_transfer_params or {}
    lora = request.lora_request
    namespace = base.variant(
        lora=lora.lora_name if lora else "",
        cache_salt=request.cache_salt or "",
        tags=tuple(
            (name.removeprefix(TAG_PREFIX), str(value))
            for name, value in wishes.items()
            if name.startswith(TAG_PREFIX)
        ),
    )
    return Tracked(request, namespace.digest, saves=not wishes.get(SKIP_SAVE, False))
