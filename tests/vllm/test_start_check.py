"""Mistakes in the configuration, found where vLLM's front process builds its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcache_kit.vllm import plugin


@pytest.fixture(autouse=True, scope="module")
def _installed() -> None:
    """As vLLM loads the plugin; twice, as it does in some processes."""
    plugin.register()
    plugin.register()


def build(name: str = plugin.NAME, *, module: str | None = None, **extra: object) -> Any:
    """Build vLLM's configuration with a connector's."""
    from vllm.config import KVTransferConfig, VllmConfig

    return VllmConfig(
        kv_transfer_config=KVTransferConfig(
            kv_connector=name,
            kv_role="kv_both",
            kv_connector_module_path=module,
            kv_connector_extra_config=extra,
        )
    )


def test_a_configuration_without_mistakes_is_built() -> None:
    built = build(**{"lmcache.chunk_size": 64, "lmcache.lmcache_instance_id": "fine"})
    assert built.kv_transfer_config.kv_connector == plugin.NAME


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lmcache.chunk_sise": 3}, r"'chunk_sise' \(kv_connector_extra_config\)"),
        ({"lmcache.chunk_size": "x"}, r"chunk_size: .*x"),
        ({"lmcache.memory_backend": "Box"}, r"memory_backend .*: no backend 'Box' is installed"),
        ({"lmcache.tiers": ["Box"]}, r"tiers \(kv_connector_extra_config\): no backend 'Box'"),
        ({"lmcache.cache_policy": "BEST"}, r"unknown cache_policy 'BEST'. Known: FIFO, LFU, LRU"),
        ({"lmcache.store_codec": "zip"}, r"store_codec .*: no codec 'zip' is installed"),
        ({"lmcache.cache_socket": f"/{'x' * 120}"}, r"longer than the 107 bytes"),
        (
            {
                "lmcache.tiers": ["LocalDiskBackend"],
                "lmcache.backend_options": {"LocalDiskBackend": {"max_size_gb": 3}},
            },
            r"backend_options \(.*\): LocalDiskBackend\.max_size_gb: Extra inputs",
        ),
        (
            {
                "lmcache.enable_controller": True,
                "lmcache.controller_url": "localhost:9001",
                "lmcache.controller_key": "/no/c.key",
                "lmcache.worker_key": "/no/w.key_secret",
            },
            r"controller_key .*: /no/c\.key cannot be read",
        ),
        (
            {"lmcache.enable_p2p": True, "lmcache.transfer_channel": "pigeon"},
            r"transfer_channel .*: no transport 'pigeon' is installed",
        ),
        (
            {
                "lmcache.enable_p2p": True,
                "lmcache.p2p_tls_cert": "/no/cert.pem",
                "lmcache.p2p_tls_key": "/no/key.pem",
                "lmcache.p2p_tls_ca": "/no/ca.pem",
            },
            r"p2p_tls_cert .*: .*'/no/cert\.pem'.* cannot be used",
        ),
    ],
)
def test_a_mistake_ends_the_start_with_its_key(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(**extra)
    assert "lmcache_kit's configuration cannot be used" in str(caught.value)


def test_all_mistakes_are_named_at_once_with_their_origins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LMCACHE_CACHE_POLICY", "BEST")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        build(**{"lmcache.tiers": ["Box", "Cupboard"]})
    said = str(caught.value)
    for part in ("'Box'", "'Cupboard'", "cache_policy (LMCACHE_CACHE_POLICY)"):
        assert part in said


@pytest.mark.parametrize("name", [plugin.NAME, plugin.LMCACHE_NAME])
def test_each_of_our_names_is_checked(name: str) -> None:
    with pytest.raises(ValueError, match="chunk_sise"):
        build(name, **{"lmcache.chunk_sise": 3})


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (plugin.NAME, "lmcache_kit.vllm"),
        (plugin.LMCACHE_NAME, "lmcache.integration.vllm.lmcache_connector_v1"),
    ],
)
def test_the_module_path_is_checked_too(name: str, module: str) -> None:
    with pytest.raises(ValueError, match="chunk_sise"):
        build(name, module=module, **{"lmcache.chunk_sise": 3})


def test_a_child_of_multi_connector_is_checked() -> None:
    child = {
        "kv_connector": plugin.NAME,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.chunk_sise": 3},
    }
    with pytest.raises(ValueError, match="chunk_sise"):
        build("MultiConnector", connectors=[child])


def test_other_connectors_are_left_alone() -> None:
    from vllm.config import VllmConfig

    assert build("ExampleConnector", **{"lmcache.chunk_sise": 3})
    assert VllmConfig().kv_transfer_config is None


def test_what_only_the_process_needs_is_its_own_matter_where_we_attach() -> None:
    assert build(**{"lmcache.cache_process": "attach", "lmcache.tiers": ["Box"]})
    with pytest.raises(ValueError, match="chunk_sise"):
        build(**{"lmcache.cache_process": "attach", "lmcache.chunk_sise": 3})


def test_trouble_of_this_machine_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "kv").write_text("a file")
    assert build(
        **{
            "lmcache.cache_socket": str(tmp_path / "open" / "c.sock"),
            "lmcache.local_disk": str(tmp_path / "kv"),
            "lmcache.max_local_disk_size": 1,
            "lmcache.max_local_cpu_size": 1e6,
        }
    )


def test_a_mistake_is_found_before_there_are_weights(tmp_path: Path) -> None:
    """As a server begins, which then starts its other processes."""
    from transformers import LlamaConfig
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=128,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    arguments = EngineArgs(
        model=str(tmp_path),
        skip_tokenizer_init=True,
        # With it vLLM asks nothing of a connector's class until workers make one.
        disable_hybrid_kv_cache_manager=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector=plugin.NAME,
            kv_role="kv_both",
            kv_connector_extra_config={"lmcache.chunk_sise": 3},
        ),
    )
    with pytest.raises(ValueError, match=r"'chunk_sise' \(kv_connector_extra_config\)"):
        arguments.create_engine_config()
