"""The connector's scheduler side: what to load, what to save."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_kit.errors import KitError
from lmcache_kit.vllm.step import Load, Report, Save, Step
from lmcache_kit.vllm.tracker import Hit, SavePolicy, Tracked, track, whole_tokens

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from lmcache_kit.process.client import PendingLookup
    from lmcache_kit.protocol.local import Found
    from lmcache_kit.vllm.model import Model

_log = logging.getLogger("vllm.lmcache_kit")


class LookupClient(Protocol):
    """What the scheduler's side needs of a :class:`~lmcache_kit.process.client.CacheClient`."""

    def begin_lookup(self, namespace: bytes, tokens: bytes, chunk_size: int) -> PendingLookup: ...

    def release(self, lease: int, *, everyone: bool = False) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """``load`` and ``save``: what vLLM's ``kv_role`` allows. ``lookup_age_s``: how long an answer
    holds for a request that waits; well under the lease's time to live. ``patience_s``: how long
    all others wait for the answer to one; what is in memory comes within a part of it."""

    saving: SavePolicy
    load: bool = True
    save: bool = True
    min_load_tokens: int = 0
    lookup_age_s: float = 60.0
    patience_s: float = 0.005


class SchedulerSide:
    """One per engine core. Called from its one thread."""

    def __init__(
        self,
        client: LookupClient,
        model: Model,
        policy: Policy,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._model = model
        self.policy = policy
        self._clock = clock
        self._tracked: dict[str, Tracked | None] = {}
        self._loads: dict[str, tuple[Found, int, int]] = {}
        self._tails: list[Save] = []
        self._failures_seen = 0
        self._passive = ""
        self.counts: Counter[str] = Counter()

    @property
    def followed(self) -> int:
        """Number of requests that the connector keeps state for."""
        return len(self._tracked)

    def matched_tokens(self, request: Request, computed: int) -> int | None:
        """Tokens that can be loaded beyond the ``computed`` ones that vLLM holds itself; None while
        that is not known, so that other requests go on and this one is asked for again.

        vLLM asks again in each step in which the request cannot be placed: the cache process is
        asked once. The last token is never loaded, since vLLM must compute something.
        """
        tracked = self._track(request)
        may_load = self.policy.load and not self._passive
        if tracked is None or not may_load or request.skip_reading_prefix_cache:
            return 0
        hit = tracked.hit
        if hit is None or self._clock() - hit.at > self.policy.lookup_age_s:
            self._give_back(hit)
            tracked.hit = hit = self._look_up(tracked, computed)
            if hit is None:
                return None
        tracked.hit = hit._replace(computed=computed)
        if hit.found is None:
            return 0
        more = min(hit.found.tokens, request.num_tokens - 1) - computed
        return more if more >= max(1, self.policy.min_load_tokens) else 0

    def placed(self, request: Request, external: int) -> None:
        """vLLM has blocks for the request, and wants ``external`` tokens loaded into them."""
        tracked = self._track(request)
        if tracked is None or tracked.hit is None:
            return
        hit, tracked.hit = tracked.hit, None
        if hit.found is None:
            return
        tracked.saved = max(tracked.saved, whole_tokens(hit.found))
        if external:
            self._loads[request.request_id] = hit.found, hit.computed, hit.computed + external
        else:
            self._give_back(hit)

    def build_step(self, output: SchedulerOutput) -> Step:
        """The work of the step that was just scheduled."""
        step = Step(failures_seen=self._failures_seen)
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            load = self._loads.pop(request_id, None)
            request = tracked.request
            # Tokens sampled but not known yet (async scheduling) and rejected drafts do not count.
            valid = min(request.num_computed_tokens + scheduled, request.num_tokens)
            dues = list(tracked.due(valid, self.policy.saving)) if self._saves(tracked) else []
            if load is None and not dues:
                continue
            (blocks,) = output.kv_connector_block_state.get_block_ids(request_id)
            if load is not None:
                found, start, end = load
                step.loads.append(
                    Load(request_id, found.lease, found.incarnation, found.chunks, start, end,
                         self._first(blocks, end))
                )  # fmt: skip
            step.saves += [
                Save(request_id, tracked.namespace, due.parent, due.tokens, due.start, due.end,
                     self._first(blocks, due.end))
                for due in dues
            ]  # fmt: skip
        step.saves += self._tails
        step.tails = {save.request_id for save in self._tails}
        self._tails = []
        for found, _, _ in self._loads.values():
            self._client.release(found.lease, everyone=True)
        self._loads.clear()
        return step

    def heard(self, output: KVConnectorOutput) -> None:
        """Take note of what the workers report."""
        report = output.kv_connector_worker_meta
        if not isinstance(report, Report):
            return
        if report.passive and not self._passive:
            _log.info("no more lookups, since workers cannot cache: %s", report.passive)
            self._passive = report.passive
        if report.failures > self._failures_seen:
            self._failures_seen = report.failures
            self.counts["failed_load_steps"] += 1
            # Workers skip the saves of such a step and of those already under way: all of it is
            # offered again, and what the cache has after all costs one question.
            for tracked in self._tracked.values():
                if tracked is not None:
                    tracked.saved = 0

    def finished(self, request: Request, blocks: list[int]) -> bool:
        """The request is over. True when vLLM must keep its blocks until its tail is saved."""
        tracked = self._tracked.pop(request.request_id, None)
        load = self._loads.pop(request.request_id, None)
        if load is not None:
            self._client.release(load[0].lease, everyone=True)
        if tracked is None:
            return False
        self._give_back(tracked.hit)
        if tracked.asked is not None:
            tracked.asked.abandon()
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        valid = min(computed, request.num_tokens - 1)
        policy = self.policy.saving
        if not (policy.decode and self._saves(tracked)) or valid <= request.num_prompt_tokens:
            return False
        tails = [
            Save(request.request_id, tracked.namespace, due.parent, due.tokens, due.start, due.end,
                 self._first(blocks, due.end))
            for due in tracked.due(valid, policy, finished=True)
        ]  # fmt: skip
        self._tails += tails
        return bool(tails)

    def close(self) -> None:
        """Give everything back."""
        self._client.close()

    def stats(self) -> dict[str, Any]:
        """Counters, for logs and tests."""
        return dict(self.counts)

    def _track(self, request: Request) -> Tracked | None:
        known = self._tracked.get(request.request_id)
        if known is None and request.request_id not in self._tracked:
            known = track(request, self._model.namespace)
            self._tracked[request.request_id] = known
        return known

    def _saves(self, tracked: Tracked) -> bool:
        return tracked.saves and self.policy.save and not self._passive

    def _look_up(self, tracked: Tracked, computed: int) -> Hit | None:
        """The answer, None while it has not come."""
        try:
            if tracked.asked is None:
                self.counts["lookups"] += 1
                tracked.asked = self._client.begin_lookup(
                    tracked.namespace, tracked.packed(), self.policy.saving.chunk_size
                )
                found = tracked.asked.poll(self.policy.patience_s)
                self.counts["lookups_waited_for"] += found is None
            else:
                found = tracked.asked.poll()
            if found is None:
                return None
        except KitError as error:
            self.counts["lookups_failed"] += 1
            _log.debug("a lookup failed, which counts as a miss: %s", error)
            found = None
        tracked.asked = None
        return Hit(found if found and found.lease else None, self._clock(), computed)

    def _give_back(self, hit: Hit | None) -> None:
        if hit is not None and hit.found is not None:
            self._client.release(hit.found.lease, everyone=True)

    def _first(self, blocks: list[int], tokens: int) -> list[int]:
        return list(blocks[: -(-tokens // self._model.block_tokens)])
