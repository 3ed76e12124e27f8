"""The connector around its two sides."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_kit.errors import ConfigError, UnsupportedModel
from tests.vllm.fakes import new_request


def new_connector(
    extra: dict[str, Any],
    *,
    groups: int = 1,
    policy: str = "fail",
    role: str = "WORKER",
    asynchronous: bool = False,
) -> Any:
    import torch
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from lmcache_kit.vllm import LMCacheKitConnector

    transfer = KVTransferConfig(
        kv_connector="LMCacheKitConnector",
        kv_role="kv_both",
        kv_connector_extra_config=extra,
        kv_load_failure_policy=policy,
    )
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32)
    config = SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, rank=0),
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
        speculative_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(
            model="m",
            served_model_name="m",
            get_total_num_kv_heads=lambda: 1,
            hf_text_config=SimpleNamespace(to_dict=dict),
            hf_config=None,
            max_model_len=16,
        ),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["a"])
    cache = SimpleNamespace(kv_cache_groups=[group] * groups)
    return LMCacheKitConnector(config, KVConnectorRole[role], cache)


def attached(folder: Path) -> dict[str, Any]:
    """Nobody listens there."""
    return {
        "lmcache.cache_process": "attach",
        "lmcache.cache_socket": str(folder / "nobody.sock"),
        "lmcache.cache_start_timeout_s": 0.05,
    }


def test_failed_loads_are_computed_again_instead_of_failing_requests(tmp_path: Path) -> None:
    connector = new_connector(attached(tmp_path))
    assert connector._kv_transfer_config.kv_load_failure_policy == "recompute"
    connector.shutdown()


def test_what_happens_to_the_cache_process_is_logged_as_vllm_logs() -> None:
    from lmcache_kit.vllm.connector import copy_log_handlers

    theirs, ours = logging.Logger("theirs", logging.INFO), logging.Logger("ours")
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(logging.Formatter("%(levelname)s of %(name)s: %(message)s"))
    theirs.addHandler(handler)
    for _ in range(2):  # both roles may live in one process
        copy_log_handlers(theirs, ours)
    ours.info("connected")
    ours.debug("more")
    assert lines.getvalue() == "INFO of ours: connected\n"


def test_a_logger_that_the_user_configured_stays_so() -> None:
    from lmcache_kit.vllm.connector import copy_log_handlers

    theirs, ours = logging.Logger("theirs", logging.INFO), logging.Logger("ours", logging.ERROR)
    ours.addHandler(logging.NullHandler())
    theirs.addHandler(logging.StreamHandler())
    copy_log_handlers(theirs, ours)
    assert [type(handler) for handler in ours.handlers] == [logging.NullHandler]
    assert ours.level == logging.ERROR


def test_a_lost_save_never_holds_up_a_request(tmp_path: Path) -> None:
    connector = new_connector(attached(tmp_path))
    assert connector.requires_kv_delivery is False
    connector.shutdown()


def test_keys_of_other_connectors_are_left_alone(tmp_path: Path) -> None:
    connector = new_connector(attached(tmp_path) | {"shared_storage_path": "/x"})
    connector.shutdown()


def test_a_key_that_nobody_knows_ends_the_start() -> None:
    with pytest.raises(ConfigError, match="chunk_sise"):
        new_connector({"lmcache.chunk_sise": 16})


def test_a_cache_process_that_cannot_start_costs_the_cache_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    extra = {
        "lmcache.cache_socket": str(tmp_path / "open" / "c.sock"),
        "lmcache.weights_id": "w",
    }
    worker, scheduler = (new_connector(extra, role=role) for role in ("WORKER", "SCHEDULER"))
    assert scheduler.get_num_new_matched_tokens(new_request(range(40)), 0) == (0, False)
    [error] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert "mode 0755" in error.getMessage()
    for connector in (worker, scheduler):
        connector.shutdown()


def test_the_scheduler_says_why_a_model_is_served_without_the_cache(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for role in ("WORKER", "SCHEDULER"):
        new_connector({}, groups=2, role=role)
    assert caplog.text.count("served without lmcache_kit: it has 2 KV cache groups") == 1


def test_a_key_that_is_not_served_is_warned_about_once_for_all_of_vllm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = attached(tmp_path) | {"lmcache.use_layerwise": "/disk"}
    for role in ("WORKER", "WORKER", "SCHEDULER"):
        new_connector(extra, groups=2, role=role)
    assert caplog.text.count("use_layerwise (kv_connector_extra_config)") == 1


@pytest.mark.parametrize("role", ["WORKER", "SCHEDULER"])
def test_an_unsupported_model_is_served_without_the_cache(role: str) -> None:
    from lmcache_kit.vllm.metadata import ConnectorMetadata

    connector = new_connector({}, groups=2, role=role)
    assert connector.get_num_new_matched_tokens(SimpleNamespace(), 0) == (0, False)
    assert connector.build_connector_meta(SimpleNamespace()) == ConnectorMetadata()
    assert connector.request_finished_all_groups(SimpleNamespace(), ([], [])) == (False, None)
    connector.register_kv_caches({})
    connector.bind_connector_metadata(ConnectorMetadata())
    connector.start_load_kv(SimpleNamespace())
    connector.wait_for_save()
    assert connector.get_finished(set()) == (None, None)
    assert connector.get_block_ids_with_load_errors() == set()
    assert connector.build_connector_worker_meta() is None
    connector.shutdown()


def test_layers_that_vllm_does_not_register_turn_the_worker_passive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    connector = new_connector(attached(tmp_path))
    connector.register_kv_caches({"a": None, "b": None})
    assert "registers 2 layers where its KV cache has 1" in caplog.text
    assert "registers 2 layers" in connector.build_connector_worker_meta().disabled_reason
    connector.shutdown()


def test_requests_whose_tail_was_asked_for_are_always_reported(tmp_path: Path) -> None:
    """Also when nothing could be saved: vLLM keeps their blocks until then."""
    from lmcache_kit.vllm.metadata import ConnectorMetadata

    connector = new_connector(attached(tmp_path))
    connector.bind_connector_metadata(ConnectorMetadata(free_after_save={"done"}))
    connector.wait_for_save()
    assert connector.get_finished({"done"}) == ({"done"}, None)
    connector.shutdown()


def test_loads_are_reported_to_a_scheduler_that_runs_ahead(tmp_path: Path) -> None:
    from lmcache_kit.vllm.metadata import ConnectorMetadata, LoadSpec

    load = LoadSpec("r", 0, "gone", (), 0, 16, [1])
    for asynchronous, finished in ((True, {"r"}), (False, None)):
        connector = new_connector(attached(tmp_path), asynchronous=asynchronous)
        connector.bind_connector_metadata(ConnectorMetadata(loads=[load]))
        connector.start_load_kv(SimpleNamespace())
        assert connector.get_finished(set()) == (None, finished)
        assert connector.get_block_ids_with_load_errors() == {1}
        connector.shutdown()


def test_an_unsupported_model_and_a_worker_have_nothing_to_reset(tmp_path: Path) -> None:
    connector = new_connector(attached(tmp_path))
    assert connector.reset_cache() is True
    connector.shutdown()


class MultiConnector:
    """Constructs its child as vLLM's does: with a copy of the configuration."""

    def __init__(self, vllm_config: Any, extra: dict[str, Any]) -> None:
        self.child = new_connector(extra | {"lmcache.weights_id": "w"}, role="SCHEDULER")


@pytest.mark.parametrize(("policy", "verifies"), [("fail", True), ("recompute", False)])
def test_inside_of_a_connector_that_fails_requests_lookups_are_verified(
    tmp_path: Path, policy: str, verifies: bool, caplog: pytest.LogCaptureFixture
) -> None:
    from lmcache_kit.vllm.verified_lookups import VerifiedLookups

    outer = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy))
    child = MultiConnector(outer, attached(tmp_path)).child
    assert isinstance(child.connector_scheduler._client, VerifiedLookups) is verifies
    assert ("kv_load_failure_policy of MultiConnector is 'fail'" in caplog.text) is verifies
    child.shutdown()


def test_a_kv_cache_of_another_shape_is_refused() -> None:
    import torch

    from lmcache_kit.vllm.connector import open_kv_pages

    with pytest.raises(UnsupportedModel, match=r"shape \(2, 3, 4\)"):
        open_kv_pages({"a": torch.zeros(2, 3, 4)}, {}, 16)


def test_an_attention_kernel_without_a_writer_is_refused() -> None:
    import torch

    from lmcache_kit.vllm.connector import open_kv_pages

    layers = {"a": SimpleNamespace(impl=SimpleNamespace())}
    with pytest.raises(UnsupportedModel, match="SimpleNamespace has no KV cache writer"):
        open_kv_pages({"a": torch.zeros(2, 1, 16, 8)}, layers, 16)
