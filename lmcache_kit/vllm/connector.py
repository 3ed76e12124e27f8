"""The connector class that vLLM builds, in the scheduler's process and in each worker's."""

from __future__ import annotations

import logging
import sys
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
from lmcache_kit.vllm.identity import identify
from lmcache_kit.vllm.metadata import ConnectorMetadata, WorkerMetadata
from lmcache_kit.vllm.model import Model, describe
from lmcache_kit.vllm.request_tracker import SavePolicy
from lmcache_kit.vllm.scheduler import ConnectorScheduler, LookupClient, SchedulerPolicy
from lmcache_kit.vllm.verified_lookups import VerifiedLookups
from lmcache_kit.vllm.worker import ConnectorWorker

if TYPE_CHECKING:
    from types import FrameType

    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from lmcache_kit.vllm.kv_pages import KVPages

_log = logging.getLogger("vllm.lmcache_kit")

_LOOKUP_AGE = 0.5  # of the lease's time to live


class LMCacheKitConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vllm is not type-checked
    """Store vLLM's KV in the cache process and load it from there.

    Raises ConfigError or PluginError for a configuration that cannot be used, which ends vLLM's
    start. A model that cannot be cached is served without a cache, and the log says why, once.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        copy_log_handlers(logging.getLogger("vllm"), logging.getLogger("lmcache_kit"))
        self.connector_scheduler: ConnectorScheduler | None = None
        self.connector_worker: ConnectorWorker | None = None
        # With asynchronous scheduling vLLM plans the next step before it knows of a failed load. It
        # must not schedule a request before the load has ended.
        self._loads_are_asynchronous = bool(vllm_config.scheduler_config.async_scheduling)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy == "fail":
            # "fail" is vLLM's default, for connectors whose KV cannot be computed again. The
            # scheduler reads this setting after it has constructed the connector.
            transfer.kv_load_failure_policy = "recompute"
        loaded = load_config(extra=transfer.kv_connector_extra_config)
        if role == KVConnectorRole.SCHEDULER:  # workers read the same: warn once
            for warning in loaded.warnings:
                _log.warning("%s", warning)
        config = loaded.config
        try:
            model = describe(vllm_config, kv_cache_config)
        except UnsupportedModel as error:
            if role == KVConnectorRole.SCHEDULER:  # workers find the same: log once
                _log.error("this model is served without lmcache_kit: %s", error)
            return
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = _open_scheduler(config, model, vllm_config)
        else:
            self.connector_worker = _open_worker(config, model, vllm_config.parallel_config.rank)

    @property
    def requires_kv_delivery(self) -> bool:
        """Whether a save must succeed: it need not, since a failed one is a miss later."""
        return False

    # Worker role.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self.connector_worker is None:
            return
        try:
            pages = self._open_pages(kv_caches)
            self.connector_worker.register_kv_pages(pages)
            layout = pages.layout
            _log.info(
                "lmcache_kit caches the KV of this model: %d layers of %d x %d in %s",
                layout.layers, layout.kv_heads, layout.head_dim, layout.dtype,
            )  # fmt: skip
        except UnsupportedModel as error:
            self.connector_worker.disable(str(error))
            if self._vllm_config.parallel_config.rank == 0:
                _log.error("this model is served without lmcache_kit: %s", error)

    def start_load_kv(self, forward_context: ForwardContext, **_: Any) -> None:
        if self.connector_worker is not None:
            self.connector_worker.start_load_kv(self._metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: loads are complete before the model starts."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **_: Any,
    ) -> None:
        """Do nothing: layers are saved together, in :meth:`wait_for_save`."""

    def wait_for_save(self) -> None:
        if self.connector_worker is not None:
            self.connector_worker.wait_for_save(self._metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if not self.has_connector_metadata():
            return None, None
        loaded = self.connector_worker.take_finished_loads() if self.connector_worker else None
        saved = self._metadata().free_after_save
        return saved or None, (loaded or None) if self._loads_are_asynchronous else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        if self.connector_worker is None:
            return set()
        return self.connector_worker.take_block_ids_with_load_errors()

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        if self.connector_worker is None:
            return None
        return self.connector_worker.build_connector_worker_meta()

    # Scheduler role.

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self.connector_scheduler is None:
            return 0, False
        tokens = self.connector_scheduler.get_num_new_matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens) and self._loads_are_asynchronous

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if self.connector_scheduler is not None:
            (ids,) = blocks.get_block_ids()
            self.connector_scheduler.update_state_after_alloc(request, ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ConnectorMetadata:
        if self.connector_scheduler is None:
            return ConnectorMetadata()
        return self.connector_scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self.connector_scheduler is not None:
            self.connector_scheduler.update_connector_output(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.connector_scheduler is None:
            return False, None
        return self.connector_scheduler.request_finished(request, block_ids), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.connector_scheduler is None:
            return False, None
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool:
        """Let this engine use none of the KV that is cached so far; other engines still do."""
        if self.connector_scheduler is not None:
            self.connector_scheduler.reset_cache()
        return True

    # Both roles.

    def shutdown(self) -> None:
        for role in (self.connector_scheduler, self.connector_worker):
            if role is not None:
                role.close()

    def _metadata(self) -> ConnectorMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, ConnectorMetadata)
        return metadata

    def _open_pages(self, kv_caches: dict[str, torch.Tensor]) -> KVPages:
        (group,) = self._kv_cache_config.kv_cache_groups
        if set(kv_caches) != set(group.layer_names):
            raise UnsupportedModel(
                f"vLLM registers {len(kv_caches)} layers where its KV cache has "
                f"{len(group.layer_names)}; the same layers are supported"
            )
        layers = self._vllm_config.compilation_config.static_forward_context
        return open_kv_pages(kv_caches, layers, group.kv_cache_spec.block_size)


class LMCacheConnectorV1(LMCacheKitConnector):
    """The connector, under the name that LMCache's users configure."""


def copy_log_handlers(source: logging.Logger, target: logging.Logger) -> None:
    """Let ``target`` log as ``source`` does, unless ``target`` is configured already.

    vLLM configures its own logger only; without handlers the kit's lines about the cache process
    would come without a format, or not at all.
    """
    if not target.hasHandlers():
        target.handlers = list(source.handlers)
        target.setLevel(source.level)


def open_kv_pages(
    kv_caches: dict[str, torch.Tensor], layers: dict[str, Any], block_tokens: int
) -> KVPages:
    """Return the pages of these layers. Raises UnsupportedModel for an unknown shape or kernel."""
    first, cache = next(iter(kv_caches.items()))
    if cache.dim() != 4:
        raise UnsupportedModel(
            f"its KV cache has shape {tuple(cache.shape)}; 4 dimensions are supported"
        )
    caches = list(kv_caches.values())
    if cache.device.type == "cpu":
        from lmcache_kit.vllm.cpu_pages import CPUPages

        layer = layers[first]
        update = getattr(layer.impl, "do_kv_cache_update", None)
        if update is None:
            raise UnsupportedModel(
                f"{type(layer.impl).__name__} has no KV cache writer (do_kv_cache_update)"
            )
        return CPUPages(
            caches, lambda k, v, pages, slots: update(layer, k, v, pages, slots), block_tokens
        )
    from lmcache_kit.vllm.cuda_pages import CUDAPages

    return CUDAPages(caches, block_tokens)


def _open_scheduler(config: KitConfig, model: Model, vllm_config: VllmConfig) -> ConnectorScheduler:
    from lmcache_kit.service.launch import open_client

    transfer = vllm_config.kv_transfer_config
    identity = identify(vllm_config, mode=config.weights, weights_id=config.weights_id or "")
    namespace = model.namespace(identity, config.chunk_size)
    _log.info(
        "KV of model %r is identified by weights %s and configuration %s (namespace %s)",
        model.name, identity.weights, identity.config, namespace.digest.hex()[:16],
    )  # fmt: skip
    client = open_client(
        config,
        role="scheduler",
        world_size=model.world_size,
        namespace=namespace,
        wait_ready=config.cache_process != "attach",
    )
    policy = SchedulerPolicy(
        saving=SavePolicy(config.chunk_size, config.save_decode_cache, config.save_unfull_chunk),
        load=transfer.is_kv_consumer,
        save=transfer.is_kv_producer,
        min_load_tokens=config.min_retrieve_tokens,
        lookup_age_s=config.lease_ttl_s * _LOOKUP_AGE,
    )
    lookups: LookupClient = client
    if _load_failures_are_errors():
        _log.warning(
            "kv_load_failure_policy of MultiConnector is 'fail': KV is read twice, to promise vLLM "
            "only what is whole. Set it to 'recompute' beside 'kv_connector' to spare that"
        )
        lookups = VerifiedLookups(client)
    return ConnectorScheduler(lookups, namespace, policy, block_tokens=model.block_tokens)


def _load_failures_are_errors() -> bool:
    """Whether this connector is a child of a MultiConnector whose requests fail with their loads.

    vLLM gives children a copy of its configuration and no way to the original, which lies in the
    frames that construct them.
    """
    frame: FrameType | None = sys._getframe(1)
    while (frame := frame.f_back if frame else None) is not None:
        if type(frame.f_locals.get("self")).__name__ == "MultiConnector":
            outer = frame.f_locals.get("vllm_config")
            policy = getattr(
                getattr(outer, "kv_transfer_config", None), "kv_load_failure_policy", None
            )
            return policy != "recompute"
    return False


def _open_worker(config: KitConfig, model: Model, rank: int) -> ConnectorWorker:
    from lmcache_kit.cache.index.entries import RankLayout
    from lmcache_kit.service.launch import open_client
    from lmcache_kit.vllm.rope import loaded_rope

    # With more ranks than KV heads, vLLM replicates heads over ranks.
    first_head = rank * model.whole.kv_heads // model.world_size
    client = open_client(
        config,
        role="worker",
        rank=rank,
        world_size=model.world_size,
        form=RankLayout(model.layout, loaded_rope(), first_head),
        wait_ready=config.cache_process != "attach",
    )
    return ConnectorWorker(
        client,
        rank=rank,
        chunk_size=config.chunk_size,
        block_tokens=model.block_tokens,
        min_over_ranks=_all_reduce_min if model.world_size > 1 else (lambda failed: failed),
    )


def _all_reduce_min(reached: list[int]) -> list[int]:
    """Reduce each load's end to the lowest over all tensor-parallel ranks.

    A rank that loaded all of its KV still computes garbage when another rank did not, and must
    know that before it saves anything.
    """
    from vllm.distributed.parallel_state import get_tp_group

    tensor = torch.tensor(reached, dtype=torch.int64)
    torch.distributed.all_reduce(
        tensor, op=torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group
    )
    lowest: list[int] = tensor.tolist()
    return lowest
