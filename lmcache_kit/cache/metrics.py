"""The metrics of the cache engine."""

from __future__ import annotations

from functools import partial

from lmcache_kit import metrics
from lmcache_kit.metrics import MetricSet

counter = partial(metrics.counter, labels=("location",))
gauge = partial(metrics.gauge, labels=("location",))

_SHARED = (
    gauge("chunks", "chunks", "Chunks stored."),
    counter("cleared_chunks_total", "chunks", "Chunks deleted by clear."),
    counter("corrupt_total", "chunks", "Chunks dropped because a checksum did not match."),
    counter("evicted_bytes_total", "bytes", "Bytes evicted."),
    counter("evicted_chunks_total", "chunks", "Chunks evicted."),
    counter("expired_pins_total", "", "Pins that ended because their time was over."),
    counter("moved_out_bytes_total", "bytes", "Bytes deleted after a move."),
    counter("moved_out_chunks_total", "chunks", "Chunks deleted after a move."),
    gauge("pinned_bytes", "bytes", "Bytes of pinned chunks."),
    gauge("pins", "", "Pins."),
)

MEMORY = MetricSet(
    "memory tier",
    "",
    (
        *_SHARED,
        counter("abandoned_total", "chunks", "Stores that a worker abandoned."),
        gauge("allocated_bytes", "bytes", "Memory in use, with the allocator's rounding."),
        gauge("capacity_bytes", "bytes", "Memory in all."),
        counter(
            "decode_late_total",
            "chunks",
            "Chunks that were not decoded before a lookup's deadline.",
        ),
        counter(
            "decode_no_room_total", "chunks", "Chunks that were not decoded for want of memory."
        ),
        counter("decoded_chunks_total", "chunks", "Chunks decoded for readers."),
        counter(
            "encode_failed_total",
            "chunks",
            "Chunks that a codec could not encode well; they stay raw.",
        ),
        gauge("encoded_chunks", "chunks", "Chunks that are encoded now."),
        counter("encoded_chunks_total", "chunks", "Chunks encoded."),
        counter(
            "evicted_for_space_total",
            "chunks",
            "Chunks evicted out of order, so that a hole became large enough.",
        ),
        counter(
            "expired_leases_total", "", "Leases that ended after lease_ttl_s without a release."
        ),
        counter("expired_pending_total", "chunks", "Stores that were not completed in time."),
        gauge(
            "external_fragmentation",
            "ratio",
            "Share of the free memory that the largest request could not use, 0 to 1.",
        ),
        counter("hit_tokens_total", "tokens", "Tokens that lookups found."),
        gauge("largest_free_bytes", "bytes", "The largest allocation that would succeed."),
        gauge("leases", "", "Leases that readers hold."),
        counter("lookup_tokens_total", "tokens", "Tokens that lookups asked for."),
        counter("lookups_total", "requests", "Lookups answered."),
        counter("moved_in_bytes_total", "bytes", "Bytes that arrived by moves."),
        counter("moved_in_chunks_total", "chunks", "Chunks that arrived by moves."),
        gauge("namespaces", "", "Namespaces that have chunks."),
        gauge("pending", "chunks", "Chunks that are being stored."),
        counter("promoted_bytes_total", "bytes", "Bytes promoted from lower tiers."),
        counter("promoted_chunks_total", "chunks", "Chunks promoted from lower tiers."),
        counter(
            "promotions_late_total",
            "requests",
            "Lookups whose deadline passed before a lower tier had delivered everything.",
        ),
        counter("promotions_total", "requests", "Lookups that asked lower tiers."),
        counter(
            "refused_full_total",
            "chunks",
            "Stores refused because all memory was leased or pinned.",
        ),
        counter(
            "refused_too_large_total",
            "chunks",
            "Stores refused because a chunk was larger than all memory.",
        ),
        gauge("requested_bytes", "bytes", "Memory in use, as it was asked for."),
        counter("stored_bytes_total", "bytes", "Bytes stored."),
        counter("stored_chunks_total", "chunks", "Chunks stored."),
        gauge("writers", "", "Stores under way, one per rank and chunk."),
    ),
)

LOWER_TIER = MetricSet(
    "lower tier",
    "",
    (
        *_SHARED,
        gauge("down", "", "1 from a failure of the backend until its next success."),
        counter("failures_total", "", "Failures of the backend, timeouts included."),
        counter(
            "passed_over_total",
            "chunks",
            "Chunks that were not written because too many writes were waiting.",
        ),
        counter("read_bytes_total", "bytes", "Bytes read."),
        counter("read_chunks_total", "chunks", "Chunks read."),
        counter("refused_total", "chunks", "Chunks refused for want of room."),
        gauge("resting", "", "1 while the circuit breaker is open."),
        gauge("stored_bytes", "bytes", "Bytes stored."),
        gauge("waiting", "", "Changes that wait for the tier's thread."),
        counter("written_bytes_total", "bytes", "Bytes written."),
        counter("written_chunks_total", "chunks", "Chunks written."),
    ),
)
