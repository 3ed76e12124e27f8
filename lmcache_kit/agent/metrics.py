"""The metrics of the agent."""

from __future__ import annotations

from lmcache_kit.metrics import MetricSet, counter, gauge

AGENT = MetricSet(
    "agent",
    "agent_",
    (
        counter(
            "dropped_changes_total",
            "",
            "Changes that were not logged one by one; a snapshot makes up for them.",
        ),
        counter(
            "failures_total", "", "Restarts of the agent after an error: a defect; see the log."
        ),
        counter("messages_malformed_total", "messages", "Messages that could not be read."),
        counter("messages_sent_total", "messages", "Messages sent to the controller."),
        gauge("operations", "operations", "Operations that are remembered."),
        gauge("operations_running", "operations", "Operations that are running."),
        gauge("registered", "", "1 while the controller has accepted the registration."),
        counter("registrations_total", "messages", "Registrations that were accepted."),
        gauge("rejected", "", "1 while another incarnation has the instance."),
        counter("rejected_total", "messages", "Refusals by the controller."),
        counter("resyncs_total", "messages", "Requests of the controller for missing changes."),
        gauge("seq", "", "Sequence number of the latest change, summed over locations."),
        counter("snapshots_total", "", "Snapshots sent."),
    ),
)
