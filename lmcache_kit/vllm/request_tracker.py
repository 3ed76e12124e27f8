"""State that the scheduler keeps per request: its lookup, and the chunks still to be saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lmcache_kit.keys import KEY_BYTES, ChunkKey, chunk_key, pack_tokens

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from lmcache_kit.keys import Namespace
    from lmcache_kit.protocol.local import Found
    from lmcache_kit.vllm.adapters import Adapters

_FALSE = frozenset({"", "0", "false", "no", "none", "null", "off"})
SKIP_SAVE = "lmcache.skip_save"
TAG_PREFIX = "lmcache.tag."


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """Choose the chunks to save: full ones of the prompt always.

    ``decode`` adds chunks with generated tokens, ``unfull`` a last chunk that is not full.
    """

    chunk_size: int
    decode: bool
    unfull: bool


class RunningLookup(Protocol):
    """A lookup whose answer may still be under way."""

    def poll(self, wait_s: float = 0.0) -> Found | None: ...

    def abandon(self) -> None: ...


class LookupResult(NamedTuple):
    """Answer to a lookup.

    ``found`` is None for a miss. ``received_at`` is a time of the scheduler's clock. ``computed``
    counts the tokens that vLLM holds in its own prefix cache.
    """

    found: Found | None
    received_at: float
    computed: int


class PendingSave(NamedTuple):
    """A chunk to save: tokens ``[start, end)``, packed, and the key of the chunk before."""

    start: int
    end: int
    parent: ChunkKey
    tokens: bytes


@dataclass(slots=True)
class RequestTracker:
    """Follow one request from its lookup to its last save.

    ``num_saved_tokens`` counts the leading tokens that are in the cache or on their way to it.
    ``namespace`` is a digest, and so is ``lora``, of the request's adapter if there is one.
    ``may_save`` is false for a request that asks not to be saved. After ``load_failed`` nothing
    more is loaded, since the same load might fail for ever.
    """

    request: Request
    namespace: bytes
    may_save: bool
    result: LookupResult | None = None
    pending_lookup: RunningLookup | None = None
    num_saved_tokens: int = 0
    lora: str = ""
    load_failed: bool = False
    _keys: list[ChunkKey] = field(default_factory=list)

    def packed(self) -> bytes:
        """Return all tokens of the request, packed."""
        return pack_tokens(self.request.all_token_ids[:])

    def pending_saves(
        self, valid: int, policy: SavePolicy, *, finished: bool = False
    ) -> Iterator[PendingSave]:
        """Yield the chunks to save once the KV of the first ``valid`` tokens is computed.

        Full chunks are yielded as they fill up. A partial chunk is yielded at the end of the
        prompt, and at the end of the sequence when the request is ``finished``. Chunks that are
        yielded count as saved.
        """
        size = policy.chunk_size
        prompt = self.request.num_prompt_tokens
        limit = valid if policy.decode else min(valid, prompt)
        start = self.num_saved_tokens // size * size
        while start + size <= limit:
            if start + size > self.num_saved_tokens:
                yield self._pending_save(start, start + size, size)
            start += size
        ends_here = limit == prompt or finished
        if policy.unfull and ends_here and limit > max(start, self.num_saved_tokens):
            yield self._pending_save(start, limit, size)

    def _pending_save(self, start: int, end: int, size: int) -> PendingSave:
        self.num_saved_tokens = end
        return PendingSave(start, end, self._parent(start, size), self._tokens(start, end))

    def _parent(self, start: int, size: int) -> ChunkKey:
        """Return the key of the chunk that ends at ``start``, extending the chain as needed."""
        while len(self._keys) * size < start:
            begin = len(self._keys) * size
            parent = self._keys[-1] if self._keys else self.namespace[:KEY_BYTES]
            self._keys.append(chunk_key(self.namespace, parent, self._tokens(begin, begin + size)))
        return self._keys[start // size - 1] if start else self.namespace[:KEY_BYTES]

    def _tokens(self, start: int, end: int) -> bytes:
        return pack_tokens(self.request.all_token_ids[start:end])


def fully_matched_tokens(found: Found) -> int:
    """Count the leading tokens that lie in chunks which match in full."""
    end = 0
    for chunk in found.chunks:
        if chunk.usable < chunk.tokens:
            break
        end = chunk.end
    return end


def track_request(request: Request, base: Namespace, adapters: Adapters) -> RequestTracker | None:
    """Return a tracker, or None for a request that must bypass the cache.

    These requests bypass it: multimodal inputs and prompt embeddings, which the token ids in chunk
    keys do not cover; pooling requests, which need every token computed; resumable requests, which
    may take tokens back; token ids outside of 32 bits, which cannot be packed; LoRA adapters whose
    content is not known.
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
    params: dict[str, Any] = request.kv_transfer_params or {}
    lora = adapters.digest(request.lora_request) if request.lora_request else ""
    if lora is None:
        return None
    namespace = base.variant(
        lora=lora,
        cache_salt=request.cache_salt or "",
        tags=tuple(
            (name.removeprefix(TAG_PREFIX), _text(value))
            for name, value in params.items()
            if name.startswith(TAG_PREFIX) and value is not None
        ),
    )
    return RequestTracker(
        request, namespace.digest, may_save=not _is_true(params.get(SKIP_SAVE)), lora=lora
    )


def _is_true(value: Any) -> bool:
    """Read a flag of a request. Whatever is not clearly false counts as set: it saves less."""
    if isinstance(value, str):
        return value.strip().lower() not in _FALSE
    return bool(value)


def _text(value: Any) -> str:
    """Return a tag's value as text: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
