"""The connector that vLLM talks to: one class for both roles, each with a side of its own."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.errors import UnsupportedModel
from lmcache_kit.vllm.model import Model, describe
from lmcache_kit.vllm.scheduler import Policy, SchedulerSide
from lmcache_kit.vllm.step import Report, Step
from lmcache_kit.vllm.tracker import SavePolicy
from lmcache_kit.vllm.worker import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from lmcache_kit.vllm.pages import Pages

_log = logging.getLogger("vllm.lmcache_kit")

_LOOKUP_AGE = 0.5  # of the lease's time to live


class LMCacheKitConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vllm is not type-checked
    """Stores vLLM's KV in the cache process and loads it from there.

    A configuration that cannot be used raises ConfigError or PluginError and so ends vLLM's start.
    A model that cannot be cached is served without: one error in the log says why.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_like(logging.getLogger("vllm"), logging.getLogger("lmcache_kit"))
        self.scheduler_side: SchedulerSide | None = None
        self.worker_side: WorkerSide | None = None
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy == "fail":
            # vLLM's default, for connectors whose KV cannot be computed again. Its scheduler reads
            # this after it has constructed the connector.
            transfer.kv_load_failure_policy = "recompute"
        loaded = load_config(extra=transfer.kv_connector_extra_config)
        if role == KVConnectorRole.SCHEDULER:  # each worker reads the same; once will do
            for warning in loaded.warnings:
                _log.warning("%s", warning)
        config = loaded.config
        try:
            model = describe(vllm_config, kv_cache_config, config.chunk_size)
        except UnsupportedModel as error:
            if role == KVConnectorRole.SCHEDULER:  # workers come to the same end
                _log.error("this model is served without lmcache_kit: %s", error)
            return
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler_side = _scheduler_side(config, model, transfer)
        else:
            self.worker_side = _worker_side(config, model, vllm_config.parallel_config.rank)

    @property
    def requires_kv_delivery(self) -> bool:
        """Whether a save must succeed. No: it would only be a miss later."""
        return False

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self.worker_side is None:
            return
        try:
            pages = self._open_pages(kv_caches)
            self.worker_side.serve(pages)
            layout = pages.layout
            _log.info(
                "lmcache_kit caches the KV of this model: %d layers of %d x %d in %s",
                layout.layers, layout.kv_heads, layout.head_dim, layout.dtype,
            )  # fmt: skip
        except UnsupportedModel as error:
            self.worker_side.refuse(str(error))
            if self._vllm_config.parallel_config.rank == 0:
                _log.error("this model is served without lmcache_kit: %s", error)

    def start_load_kv(self, forward_context: ForwardContext, **_: Any) -> None:
        if self.worker_side is not None:
            self.worker_side.load(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete before the model starts."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **_: Any,
    ) -> None:
        """Layers are saved together, in :meth:`wait_for_save`."""

    def wait_for_save(self) -> None:
        if self.worker_side is not None:
            self.worker_side.save(self._step())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if not self.has_connector_metadata():
            return None, None
        return self._step().tails or None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker_side.take_bad_blocks() if self.worker_side is not None else set()

    def build_connector_worker_meta(self) -> Report | None:
        return self.worker_side.report() if self.worker_side is not None else None

    # Scheduler side.

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self.scheduler_side is None:
            return 0, False
        return self.scheduler_side.matched_tokens(request, num_computed_tokens), False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if self.scheduler_side is not None:
            self.scheduler_side.placed(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Step:
        if self.scheduler_side is None:
            return Step()
        return self.scheduler_side.build_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self.scheduler_side is not None:
            self.scheduler_side.heard(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.scheduler_side is None:
            return False, None
        return self.scheduler_side.finished(request, block_ids), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.scheduler_side is None:
            return False, None
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool:
        """Not served: says so, so that nobody relies on it."""
        _log.error("lmcache_kit cannot drop its KV from here; stop the cache process instead")
        return False

    # Both.

    def shutdown(self) -> None:
        for side in (self.scheduler_side, self.worker_side):
            if side is not None:
                side.close()

    def _step(self) -> Step:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        return step

    def _open_pages(self, kv_caches: dict[str, torch.Tensor]) -> Pages:
        (group,) = self._kv_cache_config.kv_cache_groups
        if set(kv_caches) != set(group.layer_names):
            raise UnsupportedModel(
                f"vLLM registers {len(kv_caches)} layers where its KV cache has "
                f"{len(group.layer_names)}"
            )
        layers = self._vllm_config.compilation_config.static_forward_context
        return open_pages(kv_caches, layers, group.kv_cache_spec.block_size)


class LMCacheConnectorV1(LMCacheKitConnector):
    """The connector, under the name that LMCache's users configure."""


def log_like(theirs: logging.Logger, ours: logging.Logger) -> None:
    """Let our logger write as vLLM's does, unless somebody has configured it: vLLM configures its
    own only, and what happens to the cache process would be told in bare lines, or not at all."""
    if not ours.hasHandlers():
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)


def open_pages(
    kv_caches: dict[str, torch.Tensor], layers: dict[str, Any], block_tokens: int
) -> Pages:
    """The pages of these layers. Raises UnsupportedModel for those that cannot be read."""
    first, cache = next(iter(kv_caches.items()))
    if cache.dim() != 4:
        raise UnsupportedModel(f"its KV cache has shape {tuple(cache.shape)}; 4 dimensions served")
    caches = list(kv_caches.values())
    if cache.device.type == "cpu":
        from lmcache_kit.vllm.cpu_pages import CPUPages

        layer = layers[first]
        update = getattr(layer.impl, "do_kv_cache_update", None)
        if update is None:
            raise UnsupportedModel(f"{type(layer.impl).__name__} has no KV cache writer")
        return CPUPages(
            caches, lambda k, v, pages, slots: update(layer, k, v, pages, slots), block_tokens
        )
    from lmcache_kit.vllm.cuda_pages import TokenPages

    return TokenPages(caches, block_tokens)


def _scheduler_side(config: KitConfig, model: Model, transfer: Any) -> SchedulerSide:
    from lmcache_kit.service.launch import open_client

    client = open_client(
        config,
        role="scheduler",
        world_size=model.world_size,
        wait_ready=config.cache_process != "attach",
    )
    policy = Policy(
        saving=SavePolicy(config.chunk_size, config.save_decode_cache, config.save_unfull_chunk),
        load=transfer.is_kv_consumer,
        save=transfer.is_kv_producer,
        min_load_tokens=config.min_retrieve_tokens,
        lookup_age_s=config.lease_ttl_s * _LOOKUP_AGE,
    )
    return SchedulerSide(client, model, policy)


def _worker_side(config: KitConfig, model: Model, rank: int) -> WorkerSide:
    from lmcache_kit.cache.index.entries import RankLayout
    from lmcache_kit.service.launch import open_client
    from lmcache_kit.vllm.rope import loaded_rotation

    # Ranks beyond the number of heads repeat them.
    first_head = rank * model.namespace.layout.kv_heads // model.world_size
    client = open_client(
        config,
        role="worker",
        rank=rank,
        world_size=model.world_size,
        namespace=model.namespace,
        form=RankLayout(model.layout, loaded_rotation(), first_head),
        wait_ready=config.cache_process != "attach",
    )
    return WorkerSide(
        client,
        rank=rank,
        chunk_size=config.chunk_size,
        block_tokens=model.block_tokens,
        agree=_lowest_over_ranks if model.world_size > 1 else (lambda failed: failed),
    )


def _lowest_over_ranks(reached: list[int]) -> list[int]:
    """Ranks load together: a rank that has its KV still computes garbage when another has not, and
    must know that before it stores any of it."""
    from vllm.distributed.parallel_state import get_tp_group

    tensor = torch.tensor(reached, dtype=torch.int64)
    torch.distributed.all_reduce(
        tensor, op=torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group
    )
    lowest: list[int] = tensor.tolist()
    return lowest
