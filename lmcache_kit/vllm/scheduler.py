"""Scheduler role of the connector: decides which tokens to load and which chunks to save.

Life of a request::

    get_num_new_matched_tokens   one lookup; None while its answer is under way; then a lease
    update_state_after_alloc     vLLM has blocks: the lease becomes a load, or is released
    build_connector_meta         the load and the saves of this step go to the workers
    request_finished             what is left is released; a last chunk may still be saved

The lease of a load that reached the workers is theirs to release, one release per rank. All other
leases are released here, for all ranks.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from lmcache_kit.errors import KitError
from lmcache_kit.vllm.adapters import Adapters
from lmcache_kit.vllm.metadata import ConnectorMetadata, LoadSpec, SaveSpec, WorkerMetadata
from lmcache_kit.vllm.request_tracker import (
    LookupResult,
    PendingSave,
    RequestTracker,
    RunningLookup,
    SavePolicy,
    fully_matched_tokens,
    track_request,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from lmcache_kit.keys import Namespace

_log = logging.getLogger("vllm.lmcache_kit")

_GENERATION_BYTES = 8


class LookupClient(Protocol):
    """The part of :class:`~lmcache_kit.process.client.CacheClient` that the scheduler uses."""

    def begin_lookup(self, namespace: bytes, tokens: bytes, chunk_size: int) -> RunningLookup: ...

    def release(self, lease: int, *, everyone: bool = False) -> None: ...

    def use_namespace(self, namespace: Namespace) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SchedulerPolicy:
    """Settings of the scheduler role.

    ``load`` and ``save`` follow vLLM's ``kv_role``. ``lookup_age_s`` is the time for which an
    answer is kept for a waiting request; it must stay well under the lease's time to live.
    ``lookup_wait_s`` is the time for which the scheduler blocks on a new lookup; an answer from
    memory takes a part of it.
    """

    saving: SavePolicy
    load: bool = True
    save: bool = True
    min_load_tokens: int = 0
    lookup_age_s: float = 60.0
    lookup_wait_s: float = 0.005


class ConnectorScheduler:
    """Plan loads and saves for one engine core. Called from its scheduler's thread only."""

    def __init__(
        self,
        client: LookupClient,
        namespace: Namespace,
        policy: SchedulerPolicy,
        *,
        block_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._block_tokens = block_tokens
        self._adapters = Adapters()
        self.policy = policy
        self._clock = clock
        self._trackers: dict[str, RequestTracker | None] = {}
        self._loads: dict[str, LoadSpec] = {}
        self._final_saves: list[SaveSpec] = []
        self._failures_seen = 0
        self._disabled_reason = ""
        self.counts: Counter[str] = Counter()

    @property
    def num_tracked_requests(self) -> int:
        """Return the number of requests that the connector keeps state for."""
        return len(self._trackers)

    def get_num_new_matched_tokens(self, request: Request, computed: int) -> int | None:
        """Return how many tokens can be loaded beyond the ``computed`` ones that vLLM holds.

        None means that the lookup is still under way: vLLM goes on with other requests and asks
        again. vLLM also asks again in each step in which it finds no blocks for the request; the
        cache process is asked once. The last token is never loaded, since vLLM must compute one.
        """
        tracker = self._track(request)
        may_load = self.policy.load and not self._disabled_reason
        if tracker is None:
            return 0
        lora = request.lora_request
        if computed and lora is not None and self._adapters.has_changed(lora):
            tracker.may_save = False  # vLLM's own prefix cache may hold KV of the former content
        if not may_load or tracker.load_failed or request.skip_reading_prefix_cache:
            return 0
        result = tracker.result
        if result is None or self._clock() - result.received_at > self.policy.lookup_age_s:
            self._release(result)
            tracker.result = result = self._look_up(tracker, computed)
            if result is None:
                return None
        tracker.result = result._replace(computed=computed)
        if result.found is None:
            return 0
        more = min(result.found.tokens, request.num_tokens - 1) - computed
        return more if more >= max(1, self.policy.min_load_tokens) else 0

    def update_state_after_alloc(
        self, request: Request, blocks: Sequence[int], external: int
    ) -> None:
        """Note that vLLM has allocated blocks, with ``external`` tokens to be loaded into them."""
        tracker = self._track(request)
        if tracker is None or tracker.result is None:
            return
        result, tracker.result = tracker.result, None
        if result.found is None:
            return
        tracker.num_saved_tokens = max(tracker.num_saved_tokens, fully_matched_tokens(result.found))
        if external:
            found, end = result.found, result.computed + external
            self._loads[request.request_id] = LoadSpec(
                request.request_id, found.lease, found.incarnation, found.chunks,
                result.computed, end, self._first_blocks(blocks, end),
            )  # fmt: skip
        else:
            self._release(result)

    def build_connector_meta(self, output: SchedulerOutput) -> ConnectorMetadata:
        """Return the loads and saves of the step that was just scheduled."""
        metadata = ConnectorMetadata(
            loads=list(self._loads.values()), failures_seen=self._failures_seen
        )
        self._loads.clear()
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracker = self._trackers.get(request_id)
            if tracker is None:
                continue
            request = tracker.request
            # Placeholders of tokens still being sampled (async scheduling) and rejected drafts do
            # not count.
            valid = min(request.num_computed_tokens + scheduled, request.num_tokens)
            pending = self._pending_saves(tracker, valid)
            if pending:
                self._check_adapter(tracker)
                pending = pending if tracker.may_save else []
            if not pending:
                continue
            (blocks,) = output.kv_connector_block_state.get_block_ids(request_id)
            metadata.saves += [self._save_spec(tracker, save, blocks) for save in pending]
        metadata.saves += self._final_saves
        metadata.free_after_save = {save.request_id for save in self._final_saves}
        self._final_saves = []
        return metadata

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """Act on the workers' reports: failed loads, and workers that cannot cache."""
        report = output.kv_connector_worker_meta
        if not isinstance(report, WorkerMetadata):
            return
        if report.disabled_reason and not self._disabled_reason:
            _log.info(
                "lookups and saves are off, since a worker cannot cache this model's KV: %s",
                report.disabled_reason,
            )
            self._disabled_reason = report.disabled_reason
        if report.failures > self._failures_seen:
            self._failures_seen = report.failures
            self.counts["failed_load_steps"] += 1
            # Workers skip the saves of such a step and of the steps already under way. Plan all
            # chunks again: one that the cache holds after all costs one question.
            for request_id, tracker in self._trackers.items():
                if tracker is not None:
                    tracker.num_saved_tokens = 0
                    tracker.load_failed |= request_id in report.failed_requests

    def request_finished(self, request: Request, blocks: list[int]) -> bool:
        """Release the request; return True when vLLM must keep its blocks until a last save."""
        tracker = self._trackers.pop(request.request_id, None)
        load = self._loads.pop(request.request_id, None)
        if load is not None:
            self._client.release(load.lease, everyone=True)
        if tracker is None:
            return False
        self._release(tracker.result)
        if tracker.pending_lookup is not None:
            tracker.pending_lookup.abandon()
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        valid = min(computed, request.num_tokens - 1)
        policy = self.policy.saving
        if not (policy.decode and self._saves(tracker)) or valid <= request.num_prompt_tokens:
            return False
        self._check_adapter(tracker)
        if not tracker.may_save:
            return False
        final = [
            self._save_spec(tracker, save, blocks)
            for save in tracker.pending_saves(valid, policy, finished=True)
        ]
        self._final_saves += final
        return bool(final)

    def reset_cache(self) -> None:
        """Use another generation of the namespace, since the engine's KV has become invalid.

        Requests that have begun go on without the cache: their KV is of both generations.
        """
        self._namespace = msgspec.structs.replace(
            self._namespace, generation=secrets.token_hex(_GENERATION_BYTES)
        )
        self._client.use_namespace(self._namespace)
        for load in self._loads.values():
            self._client.release(load.lease, everyone=True)
        self._loads.clear()
        for request_id, tracker in list(self._trackers.items()):
            if tracker is None:
                continue
            self._release(tracker.result)
            if tracker.pending_lookup is not None:
                tracker.pending_lookup.abandon()
            if tracker.request.num_computed_tokens:
                self._trackers[request_id] = None
            else:
                del self._trackers[request_id]
        _log.info(
            "vLLM has dropped its cache: this engine uses no KV of before (generation %s)",
            self._namespace.generation,
        )

    def close(self) -> None:
        """Close the client."""
        self._client.close()

    def stats(self) -> dict[str, Any]:
        """Return the counters, for logs and tests."""
        return dict(self.counts)

    def _track(self, request: Request) -> RequestTracker | None:
        known = self._trackers.get(request.request_id)
        if known is None and request.request_id not in self._trackers:
            known = track_request(request, self._namespace, self._adapters)
            self._trackers[request.request_id] = known
        return known

    def _saves(self, tracker: RequestTracker) -> bool:
        return tracker.may_save and self.policy.save and not self._disabled_reason

    def _check_adapter(self, tracker: RequestTracker) -> None:
        """Save nothing more once the files of the request's adapter are not those of its digest.

        Reads the state of these files, so it is asked only where there is something to save.
        """
        lora = tracker.request.lora_request
        if lora is not None and not self._adapters.is_current(lora, tracker.lora):
            tracker.may_save = False

    def _pending_saves(self, tracker: RequestTracker, valid: int) -> list[PendingSave]:
        if not self._saves(tracker):
            return []
        return list(tracker.pending_saves(valid, self.policy.saving))

    def _save_spec(self, tracker: RequestTracker, save: PendingSave, blocks: list[int]) -> SaveSpec:
        return SaveSpec(
            tracker.request.request_id, tracker.namespace, save.parent, save.tokens,
            save.start, save.end, self._first_blocks(blocks, save.end),
        )  # fmt: skip

    def _look_up(self, tracker: RequestTracker, computed: int) -> LookupResult | None:
        """Return the answer to the request's lookup, or None while it is under way."""
        try:
            if tracker.pending_lookup is None:
                self.counts["lookups"] += 1
                tracker.pending_lookup = self._client.begin_lookup(
                    tracker.namespace, tracker.packed(), self.policy.saving.chunk_size
                )
                found = tracker.pending_lookup.poll(self.policy.lookup_wait_s)
                self.counts["lookups_waited_for"] += found is None
            else:
                found = tracker.pending_lookup.poll()
            if found is None:
                return None
        except KitError as error:
            self.counts["lookups_failed"] += 1
            _log.debug("a lookup failed and counts as a miss: %s", error)
            found = None
        tracker.pending_lookup = None
        return LookupResult(found if found and found.lease else None, self._clock(), computed)

    def _release(self, result: LookupResult | None) -> None:
        if result is not None and result.found is not None:
            self._client.release(result.found.lease, everyone=True)

    def _first_blocks(self, blocks: Sequence[int], tokens: int) -> list[int]:
        return list(blocks[: -(-tokens // self._block_tokens)])
