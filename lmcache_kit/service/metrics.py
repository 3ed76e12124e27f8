"""The metrics of a cache process, beside those of its tiers and its agent."""

from __future__ import annotations

from lmcache_kit.metrics import MetricSet, counter, gauge

CACHE_PROCESS = MetricSet(
    "cache process",
    "",
    (
        gauge("clients", "", "Clients: processes of vLLM, and commands."),
        counter("connections_total", "", "Connections accepted."),
        counter(
            "encode_passed_over_total",
            "chunks",
            "With store_codec: chunks that stay raw because too many waited.",
        ),
        gauge("encode_waiting", "chunks", "With store_codec: chunks that wait to be encoded."),
        counter(
            "internal_errors_total",
            "requests",
            "Requests of clients that raised an error: a defect; see the log.",
        ),
        counter("protocol_errors_total", "", "Connections closed because of what came on them."),
        gauge(
            "quarantined_bytes",
            "bytes",
            "With enable_p2p: memory that a timed-out transfer may still write to.",
        ),
    ),
)
