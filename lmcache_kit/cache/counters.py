"""What is counted."""

from __future__ import annotations

COUNTERS = (
    "abandoned_total",
    "cleared_chunks_total",
    "corrupt_total",
    "decode_late_total",
    "decode_no_room_total",
    "decoded_chunks_total",
    "encode_failed_total",
    "encoded_chunks_total",
    "evicted_bytes_total",
    "evicted_chunks_total",
    "evicted_for_space_total",
    "expired_leases_total",
    "expired_pending_total",
    "expired_pins_total",
    "hit_tokens_total",
    "lookup_tokens_total",
    "lookups_total",
    "moved_in_bytes_total",
    "moved_in_chunks_total",
    "moved_out_bytes_total",
    "moved_out_chunks_total",
    "promoted_bytes_total",
    "promoted_chunks_total",
    "promotions_late_total",
    "promotions_total",
    "refused_full_total",
    "refused_too_large_total",
    "stored_bytes_total",
    "stored_chunks_total",
)
"""By the engine, of what is in memory."""

TIER_COUNTERS = (
    "cleared_chunks_total",
    "corrupt_total",
    "evicted_bytes_total",
    "evicted_chunks_total",
    "expired_pins_total",
    "failures_total",
    "moved_out_bytes_total",
    "moved_out_chunks_total",
    "read_bytes_total",
    "read_chunks_total",
    "refused_total",
    "written_bytes_total",
    "written_chunks_total",
)
"""By each tier below memory."""
