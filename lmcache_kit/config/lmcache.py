"""Names of LMCache that a configuration may hold and the kit does not serve, as data."""

from __future__ import annotations

import re

UNSERVED_PREFIXES = (
    "blend_",
    "cost_aware_",
    "ec_",
    "gds_",
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

UNSERVED = frozenset(
    {
        "audit_actual_remote_url",
        "cufile_buffer_size",
        "enable_async_loading",
        "enable_blending",
        "enable_kv_events",
        "enable_lazy_memory_allocator",
        "enable_nixl",
        "enable_pd",
        "enable_scheduler_bypass_lookup",
        "enable_xpyd",
        "error_handling",
        "external_backends",
        "external_lookup_client",
        "extra_config",
        "gds_path",
        "hidden_states_retrieve_mode",
        "hit_miss_ratio",
        "local_cpu_use_hugepages",
        "lookup_server_worker_ids",
        "lookup_timeout_ms",
        "lookup_url",
        "mp_host",
        "mp_port",
        "numa_mode",
        "plugin_locations",
        "pre_caching_hash_algorithm",
        "priority_limit",
        "py_enable_gc",
        "reserve_local_cpu_size",
        "retrieve_locations",
        "runtime_plugin_locations",
        "script_allowed_imports",
        "storage_plugins",
        "store_location",
        "use_gds",
        "use_gpu_connector_v3",
        "use_layerwise",
        "weka_path",
    }
)

_NOT_CONFIGURATION = frozenset(
    {
        "config_file",
        "config_path",
        "disable_banner",
        "force_skip_save",
        "log_format",
        "log_level",
        "logging_level",
        "track_usage",
        "use_experimental",
    }
)
"""Lower-case tails of ``LMCACHE_*`` variables that are read elsewhere, here or in LMCache."""

_SERVICE_LINK = re.compile(r"(^|_)(service_(host|port\w*)|port_\d+_(tcp|udp)\w*)$")


def is_unserved(key: str) -> bool:
    """Return whether LMCache has a key of this name. Ask only for keys that nothing serves."""
    return key in UNSERVED or key.startswith(UNSERVED_PREFIXES)


def is_configuration(tail: str, value: str) -> bool:
    """Return whether the variable ``LMCACHE_<tail>`` can be meant as a configuration key.

    Kubernetes puts variables such as ``LMCACHE_CONTROLLER_PORT=tcp://10.0.0.1:9001`` into every
    container beside a service named lmcache-controller.
    """
    key = tail.lower()
    if key.startswith("kit_") or key in _NOT_CONFIGURATION or _SERVICE_LINK.search(key):
        return False
    return not (key.endswith("port") and value.startswith(("tcp://", "udp://")))
