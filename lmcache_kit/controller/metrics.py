"""The metrics of the controller."""

from __future__ import annotations

from lmcache_kit.metrics import MetricSet, counter, gauge

CONTROLLER = MetricSet(
    "controller",
    "controller_",
    (
        counter("batches_repeated_total", "messages", "Batches of changes that had come before."),
        counter("batches_total", "messages", "Batches of changes from cache processes."),
        counter(
            "commands_late_total",
            "requests",
            "Questions to cache processes that were not answered by their deadline.",
        ),
        gauge("commands_waiting", "requests", "Questions to cache processes under way."),
        counter(
            "confirmations_total",
            "messages",
            "Barriers that were told that the index has everything.",
        ),
        counter(
            "connections_refused_total",
            "",
            "Connections to the monitor port without a known key.",
        ),
        counter(
            "digest_mismatches_total",
            "",
            "Heartbeats whose digest differed from the index; a snapshot was requested.",
        ),
        counter("fenced_total", "", "Cache processes whose instance a later incarnation has."),
        counter("gaps_total", "", "Gaps in the sequence numbers of a location."),
        counter("goodbyes_total", "messages", "Cache processes that ended on purpose."),
        gauge("index_holders", "", "Locations in the index, of each incarnation by itself."),
        gauge("index_holders_unswept", "", "Closed locations whose keys are not swept yet."),
        gauge("index_keys", "keys", "Keys in the index."),
        gauge("instances", "", "Instances with a cache process, alive or not."),
        gauge("instances_alive", "", "Instances heard of within three heartbeats."),
        counter("keys_added_total", "keys", "Keys added to locations."),
        counter("keys_removed_total", "keys", "Keys removed from locations."),
        counter(
            "lookup_hit_tokens_total",
            "tokens",
            "Tokens that lookups found, at the best instance of each.",
        ),
        counter("lookup_hits_total", "requests", "Lookups that found an instance."),
        counter("lookup_tokens_total", "tokens", "Tokens that lookups asked for."),
        counter("lookups_total", "requests", "Lookups answered."),
        counter(
            "messages_failed_total",
            "messages",
            "Messages that raised an error in the controller: a defect; see its log.",
        ),
        counter("messages_malformed_total", "messages", "Messages that could not be read."),
        counter("messages_total", "messages", "Messages read."),
        counter(
            "messages_unregistered_total",
            "messages",
            "Messages of unregistered cache processes; they were asked to register.",
        ),
        gauge("namespaces", "", "Namespaces that cache processes registered."),
        gauge("operations_active", "operations", "Operations that have not ended."),
        counter("operations_cancelled_total", "operations", "Operations that were cancelled."),
        counter("operations_done_total", "operations", "Operations that did everything."),
        counter("operations_expired_total", "operations", "Operations ended by their deadline."),
        counter("operations_failed_total", "operations", "Operations that did nothing."),
        counter("operations_partial_total", "operations", "Operations that did a part."),
        counter("operations_total", "operations", "Operations begun."),
        counter("processes_dropped_total", "", "Incarnations dropped after a long silence."),
        counter("processes_lost_total", "", "Incarnations that missed three heartbeats."),
        counter(
            "reconnections_total",
            "messages",
            "Registrations of a known incarnation on a new connection.",
        ),
        counter("registrations_refused_total", "messages", "Registrations refused."),
        counter("registrations_total", "messages", "Registrations accepted."),
        counter(
            "operation_messages_resent_total",
            "messages",
            "Messages of operations sent again because no answer had come.",
        ),
        counter(
            "operation_ends_late_total",
            "messages",
            "Ends that came after the operation had ended.",
        ),
        counter("results_unasked_total", "messages", "Answers to questions that were not asked."),
        counter("resyncs_total", "messages", "Requests for missing changes or a snapshot."),
        counter(
            "snapshot_parts_late_total",
            "messages",
            "Parts of snapshots that are not waited for any more.",
        ),
        counter(
            "snapshots_broken_total",
            "",
            "Snapshots given up because a part was missing or did not fit.",
        ),
        counter("snapshots_total", "", "Snapshots swapped in."),
        gauge("workers", "", "Registered ranks."),
    ),
)
