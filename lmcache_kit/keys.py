"""Namespaces and chunk keys.

``namespace = BLAKE3(canonical encoding of the descriptor)``, 32 bytes.
``key_i = BLAKE3(namespace || key_{i-1} || tokens_i as little-endian u32)``, the first 16 bytes.
The parent of a first chunk is ``namespace[:16]``, its *root*.

Keys depend on nothing else: not on PYTHONHASHSEED, the Python version, the machine or the installed
packages. Golden vectors in the tests pin them.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import msgspec
from blake3 import blake3

from lmcache_kit.layout import KVLayout

ChunkKey: TypeAlias = bytes
"""Key of a chunk: 16 bytes."""

KEY_BYTES = 16
TOKEN_BYTES = 4
_DOMAIN = b"lmcache-kit/namespace/2"


class Namespace(msgspec.Struct, frozen=True):
    """All that KV depends on; caches with equal digests may exchange chunks.

    ``model`` is the name that users type. ``weights`` and ``config`` identify what computes KV: the
    model's weights, and its configuration. They replace the name, which names nothing then, in the
    digest; a namespace without weights is identified by its name. ``generation`` is set once the
    engine has dropped its cache.

    ``layout`` is that of the whole model, over all ranks. ``lora`` (a digest of the adapter),
    ``cache_salt`` and ``tags`` are empty in the *base* namespace that an instance registers.
    :meth:`variant` sets them for requests that carry them.
    """

    model: str
    layout: KVLayout
    chunk_size: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    weights: str = ""
    config: str = ""
    generation: str = ""
    lora: str = ""
    cache_salt: str = ""
    tags: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> bytes:
        """Name of this namespace in every protocol: 32 bytes."""
        return _digest(self)

    @property
    def root(self) -> ChunkKey:
        """Parent key of every first chunk."""
        return _digest(self)[:KEY_BYTES]

    def differences(self, other: Namespace) -> Iterator[tuple[str, object, object]]:
        """Yield name, own and other value of each field that tells the digests apart."""
        names = [name for name in self.__struct_fields__ if name not in ("model", "layout")]
        if not self.weights or not other.weights:
            names.insert(0, "model")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        pairs += [
            (name, getattr(self.layout, name), getattr(other.layout, name))
            for name in self.layout.__struct_fields__
        ]
        return (each for each in pairs if each[1] != each[2])

    def variant(
        self, *, lora: str = "", cache_salt: str = "", tags: tuple[tuple[str, str], ...] = ()
    ) -> Namespace:
        """Return the namespace of requests with this LoRA, salt and tags; self if all are empty."""
        if not (lora or cache_salt or tags):
            return self
        return msgspec.structs.replace(
            self, lora=lora, cache_salt=cache_salt, tags=tuple(sorted(tags))
        )


class Chunk(NamedTuple):
    """Tokens ``[start, end)`` of a sequence, with their key and the key of their parent."""

    start: int
    end: int
    key: ChunkKey
    parent: ChunkKey


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Pack tokens as little-endian u32, 4 bytes each.

    Raises OverflowError for a token outside ``[0, 2**32)`` and TypeError for one that is no int.
    """
    packed = array("I", tokens)
    if packed.itemsize != TOKEN_BYTES or sys.byteorder != "little":
        return struct.pack(f"<{len(tokens)}I", *tokens)
    return packed.tobytes()


def chunk_key(namespace: bytes, parent: ChunkKey, tokens: bytes) -> ChunkKey:
    """Return the key of one chunk; ``namespace`` is a digest, ``tokens`` are packed."""
    return blake3(namespace + parent + tokens).digest(KEY_BYTES)


def chain(
    namespace: bytes, tokens: bytes, chunk_size: int, *, start: int = 0, parent: ChunkKey = b""
) -> Iterator[Chunk]:
    """Yield the chunks of packed ``tokens`` in order; the last one may be partial.

    ``start`` (a multiple of ``chunk_size``) and ``parent`` continue an existing chain.
    """
    parent = parent or namespace[:KEY_BYTES]
    total = len(tokens) // TOKEN_BYTES
    for begin in range(start, total, chunk_size):
        end = min(begin + chunk_size, total)
        key = chunk_key(namespace, parent, tokens[begin * TOKEN_BYTES : end * TOKEN_BYTES])
        yield Chunk(begin, end, key, parent)
        parent = key


@lru_cache(maxsize=4096)
def _digest(namespace: Namespace) -> bytes:
    layout = namespace.layout
    fields: list[str | int] = [
        "" if namespace.weights else namespace.model,
        namespace.weights,
        namespace.config,
        namespace.generation,
        layout.dtype,
        layout.kind,
        layout.layers,
        layout.kv_heads,
        layout.head_dim,
        namespace.tensor_parallel,
        namespace.pipeline_parallel,
        namespace.chunk_size,
        namespace.lora,
        namespace.cache_salt,
    ]
    for name, value in namespace.tags:
        fields += [name, value]
    encoded = [_DOMAIN]
    for field in fields:
        raw = field.encode() if isinstance(field, str) else struct.pack("<Q", field)
        encoded += [struct.pack("<I", len(raw)), raw]
    return blake3(b"".join(encoded)).digest()
