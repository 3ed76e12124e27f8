"""Names of LMCache that a configuration may hold and the kit does not serve, as data.

From LMCache's declarations, from 0.1 to 0.5.7, and from its example files, of which some have keys
that no version ever read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

UNSERVED = frozenset(
    {
        # Memory, disks and other stores
        "async_loading",
        "audit_actual_remote_url",
        "backend_config",
        "cache_config",
        "cufile_buffer_size",
        "disk_path",
        "disk_url",
        "enable_async_loading",
        "enable_lazy_memory_allocator",
        "external_backends",
        "gds_backend",
        "gds_buffer_size",
        "gds_path",
        "gds_path_sharding",
        "lazy_memory_expand_trigger_ratio",
        "lazy_memory_initial_ratio",
        "lazy_memory_safe_size",
        "lazy_memory_step_ratio",
        "local_cpu_use_hugepages",
        "local_device",
        "local_disk_path_sharding",
        "maru_path",
        "maru_pool_size",
        "max_local_cache_size",
        "nixl_buffer_device",
        "nixl_buffer_size",
        "numa_mode",
        "pin_check_interval_sec",
        "pipelined_backend",
        "priority_limit",
        "remote_serde",
        "remote_storage_plugins",
        "reserve_local_cpu_size",
        "retrieve_locations",
        "storage_plugins",
        "store_location",
        "use_gds",
        "weka_path",
        # Lookups and loads
        "enable_scheduler_bypass_lookup",
        "error_handling",
        "external_lookup_client",
        "hit_miss_ratio",
        "lookup_server_worker_ids",
        "lookup_timeout_ms",
        "lookup_url",
        "pre_caching_hash_algorithm",
        "use_gpu_connector_v3",
        "use_layerwise",
        # Blending and hidden states
        "blend_add_special_in_precomp",
        "blend_check_layers",
        "blend_min_tokens",
        "blend_recompute_ratio",
        "blend_recompute_ratios",
        "blend_separator",
        "blend_special_str",
        "blend_thresholds",
        "enable_blending",
        "enable_hidden_state_cache",
        "hidden_state_layers",
        "hidden_states_retrieve_mode",
        "max_hidden_state_cpu_size",
        # Other processes: prefill and decode, the multi-process server, the controller
        "enable_disagg_prefill",
        "enable_nixl",
        "enable_pd",
        "enable_xpyd",
        "lmcache_worker_heartbeat_delay_time",
        "mp_host",
        "mp_port",
        "nixl_enable_gc",
        "nixl_peer_alloc_port",
        "nixl_peer_host",
        "nixl_peer_init_port",
        "nixl_peer_port",
        "nixl_proxy_host",
        "nixl_proxy_port",
        "nixl_receiver_host",
        "nixl_receiver_port",
        "nixl_role",
        "pd_allocation_timeout_sec",
        "pd_backend_mode",
        "pd_backends",
        "pd_bidirectional",
        "pd_buffer_device",
        "pd_buffer_size",
        "pd_condition_poll_interval_sec",
        "pd_max_prefill_len",
        "pd_peer_alloc_port",
        "pd_peer_host",
        "pd_peer_init_port",
        "pd_peer_query_port",
        "pd_proxy_host",
        "pd_proxy_port",
        "pd_retrieve_locations",
        "pd_role",
        "pd_shutdown_timeout_sec",
        "pd_skip_proxy_notification",
        "pd_store_location",
        "peer_init_ports",
        "peer_lookup_ports",
        # All else
        "app_id",
        "chunk_statistics_auto_exit_target_unique_chunks",
        "chunk_statistics_auto_exit_timeout_hours",
        "chunk_statistics_auto_start_statistics",
        "chunk_statistics_strategy",
        "ec",
        "enable_chunk_statistics",
        "enable_kv_events",
        "extra_config",
        "internal_api_server_enabled",
        "internal_api_server_host",
        "internal_api_server_include_index_list",
        "internal_api_server_port_start",
        "internal_api_server_socket_path_prefix",
        "logging",
        "plugin_locations",
        "py_enable_gc",
        "remote_config_url",
        "run_script_api_enabled",
        "runtime_plugin_locations",
        "script_allowed_imports",
        "use_experimental",
        # Of a request, and misplaced in a configuration
        "max_offload_tokens",
        "max_tokens_per_load",
        "skip_save",
    }
)

OPEN_FAMILIES = ("ec_", "mp.", "tag.")
"""Prefixes that LMCache puts before names of any kind: ``ec_chunk_size``, ``lmcache.mp.port``."""

FAMILIES = (
    "blend_",
    "chunk_statistics_",
    "gds_",
    "hidden_state_",
    "internal_api_server_",
    "lazy_memory_",
    "lmcache_worker_heartbeat_",
    "local_disk_",
    "maru_",
    "nixl_",
    "p2p_",
    "pd_",
    "pin_",
    "remote_",
)
"""Prefixes of LMCache's keys. What begins so is a key of another version of it, unless it is spelt
nearly like a served key."""

INSTEAD: Mapping[str, str] = {
    "external_backends": "tiers",
    "local_device": "local_disk for a folder",
    "lookup_url": "controller_url",
    "max_local_cache_size": "max_local_cpu_size",
    "peer_init_ports": "p2p_init_ports",
    "remote_serde": "store_codec",
    "remote_storage_plugins": "tiers",
    "storage_plugins": "tiers",
}
"""What does here what a key does there."""

_NOT_CONFIGURATION = frozenset(
    {
        "config_file",
        "config_path",
        "controller_config_file",
        "device_backend",
        "disable_banner",
        "force_skip_save",
        "gpu_staging_buffer_bytes",
        "kv_transfer_abi_version",
        "log_format",
        "log_level",
        "logging_level",
        "mp_transfer_mode",
        "mq_timeout",
        "offload_rpc_port",
        "rocm_enable_batch_memcpy",
        "runtime_plugin_config",
        "runtime_plugin_extra_config",
        "runtime_plugin_role",
        "runtime_plugin_worker_count",
        "runtime_plugin_worker_id",
        "server_url",
        "track_usage",
        "use_experimental",
        "use_upstream_mp",
    }
)
_NOT_CONFIGURATION_PREFIXES = (
    "aerospike_",
    "coordinator_",
    "kit_",
    "musa_",
    "plugin_worker_",
    "request_telemetry_",
    "resp_",
    "usage_track_",
)
"""Lower-case tails of ``LMCACHE_*`` variables that are read elsewhere, here or in LMCache."""

_SERVICE_LINK = re.compile(r"(^|_)(service_(host|port\w*)|port_\d+_(tcp|udp)\w*)$")


def is_unserved(key: str) -> bool:
    """Return whether LMCache has this key. Ask only for keys that nothing serves."""
    return key in UNSERVED or key.startswith(OPEN_FAMILIES)


def may_be_unserved(key: str) -> bool:
    """Return whether the key is named like those of LMCache."""
    return key.startswith(FAMILIES)


def is_configuration(tail: str, value: str) -> bool:
    """Return whether the variable ``LMCACHE_<tail>`` can be meant as a configuration key.

    Kubernetes puts variables such as ``LMCACHE_CONTROLLER_PORT=tcp://10.0.0.1:9001`` into every
    container beside a service named lmcache-controller.
    """
    key = tail.lower()
    if key in _NOT_CONFIGURATION or key.startswith(_NOT_CONFIGURATION_PREFIXES):
        return False
    if _SERVICE_LINK.search(key):
        return False
    return not (key.endswith("port") and value.startswith(("tcp://", "udp://")))
