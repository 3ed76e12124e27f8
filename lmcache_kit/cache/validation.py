"""Validation of requests to the engine. Every function raises ValueError."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.keys import KEY_BYTES, TOKEN_BYTES

NAMESPACE_BYTES = 32
MAX_CHUNK_TOKENS = 1 << 16
MAX_WORLD_SIZE = 1 << 12
MAX_ITEMS = 1 << 16
MAX_LOOKUP_TOKENS = 1 << 23


def check_shape(namespace: bytes, chunk_size: int, world_size: int) -> None:
    if len(namespace) != NAMESPACE_BYTES:
        raise ValueError(
            f"a namespace digest has {NAMESPACE_BYTES} bytes, this one has {len(namespace)}"
        )
    _within("chunk_size", chunk_size, 1, MAX_CHUNK_TOKENS)
    _within("world_size", world_size, 1, MAX_WORLD_SIZE)


def check_lookup(tokens: bytes) -> None:
    _check_packed("tokens", tokens)
    _within("number of tokens", len(tokens) // TOKEN_BYTES, 0, MAX_LOOKUP_TOKENS)


def check_store(items: Sequence[StoreItem], rank: int, world_size: int, chunk_size: int) -> None:
    _within("rank", rank, 0, world_size - 1)
    _within("number of items", len(items), 0, MAX_ITEMS)
    for at, item in enumerate(items):
        if len(item.parent) != KEY_BYTES:
            raise ValueError(
                f"item {at}: a parent key has {KEY_BYTES} bytes, this one has {len(item.parent)}"
            )
        _check_packed(f"item {at}: tokens", item.tokens)
        _within(f"item {at}: number of tokens", len(item.tokens) // TOKEN_BYTES, 1, chunk_size)
        if item.nbytes < 1:
            raise ValueError(f"item {at}: nbytes is {item.nbytes}; it must be at least 1")


def check_written(written: Sequence[tuple[int, int]]) -> None:
    for ticket, checksum in written:
        if not 0 <= checksum < 1 << 64:
            raise ValueError(f"ticket {ticket}: checksum {checksum} is no unsigned 64-bit number")


def _check_packed(what: str, tokens: bytes) -> None:
    if len(tokens) % TOKEN_BYTES:
        raise ValueError(
            f"{what}: {len(tokens)} bytes; packed tokens have {TOKEN_BYTES} bytes each"
        )


def _within(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{what} is {value}; it must be {low} to {high}")
