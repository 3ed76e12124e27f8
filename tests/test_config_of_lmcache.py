"""Configurations that LMCache's users have: every key that its example files hold."""

from __future__ import annotations

import pytest

from lmcache_kit.config import load_config
from lmcache_kit.config.lmcache import INSTEAD, UNSERVED
from lmcache_kit.config.load import nearest
from lmcache_kit.config.model import ALIASES, KEYS
from lmcache_kit.errors import ConfigError

VALUES: dict[str, object] = {
    "chunk_size": 256,
    "local_cpu": False,
    "max_local_cpu_size": 0,
    "local_disk": "file:///local/kv/",
    "max_local_disk_size": 5,
    "remote_url": "redis://localhost:6379",
    "save_decode_cache": True,
    "save_unfull_chunk": False,
    "blocking_timeout_secs": 100,
    "enable_p2p": True,
    "p2p_host": "localhost",
    "p2p_init_ports": 8200,
    "p2p_lookup_ports": 8201,
    "transfer_channel": "nixl",
    "nixl_backends": ["UCX"],
    "enable_controller": True,
    "lmcache_instance_id": "lmcache_instance_1",
    "controller_url": "localhost:9001",
    "controller_pull_url": "localhost:8300",
    "controller_reply_url": "localhost:8400",
    "lmcache_worker_port": 8001,
    "lmcache_worker_ports": 8500,
    "distributed_url": "localhost:8002",
}

_CPU = "chunk_size local_cpu max_local_cpu_size"
_CONTROLLER = "enable_controller lmcache_instance_id lmcache_worker_port"
_P2P = "enable_p2p p2p_host p2p_init_ports p2p_lookup_ports transfer_channel"
_NIXL = "local_cpu max_local_cpu_size max_local_disk_size enable_nixl nixl_role nixl_buffer_size"
_PD = "local_cpu max_local_cpu_size enable_pd transfer_channel pd_role pd_buffer_size"
_PEER = "pd_buffer_device pd_peer_host pd_peer_init_port pd_peer_alloc_port nixl_backends"

EXAMPLES = {
    # 0.5
    "blend_kv_v1": f"{_CPU} enable_blending use_layerwise blend_special_str",
    "cache_by_tags": f"{_CPU} local_device extra_config",
    "cache_controller/lookup": f"{_CPU} {_CONTROLLER} controller_url distributed_url",
    "cache_controller/move": f"{_CPU} {_P2P} {_CONTROLLER} controller_pull_url "
    "controller_reply_url",
    "caching_switch": f"{_CPU} local_device",
    "disagg_prefill/1p1d decoder": f"{_PD} {_PEER} remote_url remote_serde pd_retrieve_locations "
    "pd_store_location save_decode_cache save_unfull_chunk",
    "disagg_prefill/hetero_tp decoder": f"{_PD} {_PEER} save_unfull_chunk",
    "disagg_prefill/xpyd prefiller": f"{_PD} pd_buffer_device pd_proxy_host pd_proxy_port "
    "remote_url nixl_backends max_local_disk_size",
    "kv_cache_reuse/p2p_sharing": f"{_CPU} {_P2P} enable_async_loading enable_controller "
    "lmcache_instance_id controller_pull_url controller_reply_url lmcache_worker_ports "
    "extra_config",
    "remote_backends/external": f"{_CPU} local_device remote_url remote_serde pipelined_backend "
    "extra_config",
    "remote_backends/resp": f"{_CPU} remote_url async_loading remote_serde blocking_timeout_secs "
    "extra_config",
    "remote_backends/s3": f"{_CPU} save_unfull_chunk remote_url remote_serde blocking_timeout_secs "
    "extra_config",
    "sgl_integration": f"{_CPU} use_layerwise save_unfull_chunk",
    "lmcache_config_azure": "cache_config backend_config logging",
    # 0.3
    "disagg_prefill/1p1d_experimental": f"{_NIXL} enable_xpyd nixl_proxy_host nixl_proxy_port "
    "nixl_buffer_device nixl_backends nixl_peer_host nixl_peer_init_port nixl_peer_alloc_port",
    "disagg_prefill/k8s": f"{_NIXL} remote_serde nixl_receiver_host nixl_receiver_port "
    "nixl_buffer_device nixl_enable_gc nixl_peer_port",
    "disagg_prefill/xpyd prefiller, at first": f"{_NIXL} enable_disagg_prefill pd_backends",
    "docker": f"{_CPU} remote_url remote_serde pipelined_backend",
    "p2p": f"{_CPU} enable_p2p lookup_url distributed_url",
    "rag": f"{_CPU} enable_blending blend_recompute_ratio blend_min_tokens blend_special_str",
    "sglang_interface": "chunk_size local_disk max_local_disk_size use_experimental",
    # 0.1
    "centralized_sharing": "chunk_size local_device remote_url remote_serde pipelined_backend",
    "disk_offline_inference": "chunk_size local_device disk_path pipelined_backend",
    "save_decode_cache": "chunk_size local_device save_decode_cache",
}
"""The keys of LMCache's example files, by the folder of each."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_file_is_read_and_its_keys_without_effect_are_named_in_one_line(
    name: str,
) -> None:
    keys = EXAMPLES[name].split()
    given = {f"lmcache.{key}": VALUES.get(key, "something") for key in keys}
    loaded = load_config(environ={}, extra=given)
    idle = [key for key in keys if key in UNSERVED]
    told = [each for each in loaded.warnings if each.startswith("keys of LMCache without effect")]
    assert len(told) == bool(idle)
    assert all(f"{key} (kv_connector_extra_config" in told[0] for key in idle)
    assert set(keys) - {*KEYS, *ALIASES, *UNSERVED} <= {*loaded.plugin_values}


def test_the_keys_of_the_multi_process_connector_are_lmcaches_whatever_they_are() -> None:
    given = {
        "lmcache.mp.host": "tcp://localhost",
        "lmcache.mp.port": 6555,
        "lmcache.mp.not_yet_there": 1,
    }
    (warning,) = load_config(environ={}, extra=given).warnings
    assert all(key.removeprefix("lmcache.") in warning for key in given)


def test_a_key_of_a_version_that_is_not_out_yet_is_only_warned_about() -> None:
    (warning,) = load_config(environ={"LMCACHE_REMOTE_SHARDS": "4"}).warnings
    assert "remote_shards (LMCACHE_REMOTE_SHARDS)" in warning


def test_a_key_that_is_spelt_nearly_like_a_served_one_is_none_of_another_version() -> None:
    with pytest.raises(ConfigError, match=r"'nixl_backend'.* Did you mean 'LMCACHE_NIXL_BACKENDS'"):
        load_config(environ={"LMCACHE_NIXL_BACKEND": "UCX"})


def test_a_warning_says_what_does_the_same_here() -> None:
    (warning,) = load_config(environ={"LMCACHE_REMOTE_SERDE": "cachegen"}).warnings
    assert "remote_serde (LMCACHE_REMOTE_SERDE; here it is store_codec)" in warning
    assert INSTEAD.keys() <= UNSERVED


def test_memory_is_used_even_where_lmcache_would_use_none() -> None:
    loaded = load_config(environ={"LMCACHE_LOCAL_CPU": "False", "LMCACHE_MAX_LOCAL_CPU_SIZE": "0"})
    assert loaded.config.max_local_cpu_size == 5.0
    (warning,) = loaded.warnings
    assert warning.startswith("local_cpu: false (LMCACHE_LOCAL_CPU) has no effect")
    assert "max_local_cpu_size lets it have 5 GiB" in warning


@pytest.mark.parametrize(
    ("variable", "wanted"),
    [
        ("LMCACHE_INSTANCE_ID", "LMCACHE_LMCACHE_INSTANCE_ID"),
        ("LMCACHE_WORKER_PORTS", "LMCACHE_LMCACHE_WORKER_PORTS"),
        ("LMCACHE_LMCACHE_CHUNK_SIZE", "LMCACHE_CHUNK_SIZE"),
        ("LMCACHE_CHUNKSIZE", "LMCACHE_CHUNK_SIZE"),
    ],
)
def test_a_variable_that_is_nearly_a_key_is_told_the_variable_to_set(
    variable: str, wanted: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(environ={variable: "8"})
    assert refused.value.hint == f"Did you mean {wanted!r}?"


def test_a_suggestion_is_never_a_key_without_effect() -> None:
    idle = {key for key, each in KEYS.items() if each.scope == "accepted"}
    for key in (*UNSERVED, *idle):
        assert nearest(f"{key}s") not in {*UNSERVED, *idle}


@pytest.mark.parametrize(
    "variable",
    ["COORDINATOR_URL", "RESP_PASSWORD", "MQ_TIMEOUT", "CONTROLLER_CONFIG_FILE", "USAGE_TRACK_URL"],
)
def test_variables_that_lmcache_reads_for_itself_are_passed_over(variable: str) -> None:
    assert load_config(environ={f"LMCACHE_{variable}": "http://x:1"}).warnings == []


def test_keys_that_lack_the_prefix_are_told_it() -> None:
    (warning,) = load_config(environ={}, extra={"chunk_size": 64, "cpu_bytes_to_use": 1}).warnings
    assert warning.endswith("write lmcache.chunk_size")
