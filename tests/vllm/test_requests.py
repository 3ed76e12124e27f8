"""What a request says for the cache: its adapter, its salt, its tags, and whether it is saved."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lmcache_kit.keys import Namespace
from tests.vllm.fakes import BLOCK, CHUNK, NAMESPACE, FakeClient, new_request, scheduled


def tracked(**more: Any) -> Any:
    from lmcache_kit.vllm.adapters import Adapters
    from lmcache_kit.vllm.request_tracker import track_request

    return track_request(new_request([1, 2, 3], **more), NAMESPACE, Adapters())


@pytest.mark.parametrize("value", [False, 0, "", "false", "False", " no ", "0", "off", None])
def test_a_request_that_does_not_ask_to_skip_its_save_is_saved(value: Any) -> None:
    assert tracked(kv_transfer_params={"lmcache.skip_save": value}).may_save


@pytest.mark.parametrize("value", [True, 1, "true", "yes", "1", "whatever"])
def test_a_request_that_asks_to_skip_its_save_is_not_saved(value: Any) -> None:
    assert not tracked(kv_transfer_params={"lmcache.skip_save": value}).may_save


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("None", "None"),
        (True, "true"),
        (7, "7"),
        ("7", "7"),
        ({"b": 1, "a": []}, '{"a": [], "b": 1}'),
    ],
)
def test_a_tag_is_its_text_or_its_json(value: Any, text: str) -> None:
    tagged = tracked(kv_transfer_params={"lmcache.tag.user": value})
    assert tagged.namespace == NAMESPACE.variant(tags=(("user", text),)).digest


def test_a_tag_that_is_null_is_no_tag() -> None:
    tagged = tracked(kv_transfer_params={"lmcache.tag.user": None})
    assert tagged.namespace == NAMESPACE.digest


# Adapters.


def write_adapter(folder: Path, value: float = 1.0, **config: Any) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({"a": torch.full((4, 4), value)}, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8} | config))
    return folder


def request_of(folder: Path | str, number: int = 1, name: str = "red", **more: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folder), **more)


@pytest.fixture
def adapters() -> Any:
    from lmcache_kit.vllm.adapters import Adapters

    return Adapters()


def test_an_adapter_is_its_content_whatever_it_is_called_and_wherever_it_lies(
    adapters: Any, tmp_path: Path
) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two")
    first = adapters.digest(request_of(one, 1, "red"))
    assert first
    assert adapters.digest(request_of(two, 2, "blue")) == first


@pytest.mark.parametrize("change", [{"value": 2.0}, {"lora_alpha": 16}], ids=["weights", "scale"])
def test_adapters_of_other_weights_or_scale_differ(
    adapters: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", **change)
    assert adapters.digest(request_of(one, 1)) != adapters.digest(request_of(two, 2))


def test_another_adapter_under_the_same_name_is_another_one(adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "one")
    first = adapters.digest(request_of(folder, 1))
    write_adapter(folder, 2.0)  # unloaded, replaced, and loaded again: vLLM counts on
    second = adapters.digest(request_of(folder, 2))
    assert second not in (first, None)
    assert adapters.has_changed(request_of(folder, 2))


def test_files_replaced_behind_a_loaded_adapter_make_it_bypass_the_cache(
    adapters: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = request_of(write_adapter(tmp_path / "one"))
    digest = adapters.digest(lora)
    assert adapters.is_current(lora, digest)
    write_adapter(tmp_path / "one", 2.0)
    assert not adapters.is_current(lora, digest)
    assert [adapters.digest(lora) for _ in range(3)] == [None] * 3
    assert caplog.text.count("its files have changed since vLLM has read them") == 1


def test_an_adapter_that_is_loaded_in_place_is_read_again(adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "one")
    first = adapters.digest(request_of(folder))
    write_adapter(folder, 2.0)
    second = adapters.digest(request_of(folder, load_inplace=True))
    assert second not in (first, None)


def test_one_number_for_two_paths_is_not_trusted(adapters: Any, tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", 2.0)
    assert adapters.digest(request_of(one, 1))
    assert adapters.digest(request_of(two, 1)) is None


@pytest.mark.parametrize("kind", ["missing", "empty", "damaged"])
def test_an_adapter_that_cannot_be_read_bypasses_the_cache(
    adapters: Any, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "one"
    if kind != "missing":
        folder.mkdir()
    if kind == "damaged":
        (folder / "adapter_model.safetensors").write_bytes(os.urandom(100))
    assert adapters.digest(request_of(folder)) is None


def test_a_request_of_an_adapter_has_a_namespace_of_its_own(tmp_path: Path, adapters: Any) -> None:
    from lmcache_kit.vllm.request_tracker import track_request

    lora = request_of(write_adapter(tmp_path / "one"))
    tracker = track_request(new_request([1], lora_request=lora), NAMESPACE, adapters)
    assert tracker is not None
    wanted: Namespace = NAMESPACE.variant(lora=adapters.digest(lora))
    assert tracker.namespace == wanted.digest
    gone = request_of(tmp_path / "gone", 2)
    assert track_request(new_request([1], lora_request=gone), NAMESPACE, adapters) is None


def new_scheduler(client: FakeClient) -> Any:
    from lmcache_kit.vllm.request_tracker import SavePolicy
    from lmcache_kit.vllm.scheduler import ConnectorScheduler, SchedulerPolicy

    policy = SchedulerPolicy(SavePolicy(CHUNK, decode=True, unfull=True))
    return ConnectorScheduler(client, NAMESPACE, policy, block_tokens=BLOCK)


def saves_of(scheduler: Any, request: Any, computed: int = 0) -> list[Any]:
    """Plan all of the request, after ``computed`` tokens from vLLM's own prefix cache."""
    scheduler.get_num_new_matched_tokens(request, computed)
    scheduler.update_state_after_alloc(request, [], 0)
    step = scheduler.build_connector_meta(scheduled(**{request.request_id: request.num_tokens}))
    return list(step.saves)


def test_kv_of_an_adapter_that_is_replaced_meanwhile_is_not_saved(tmp_path: Path) -> None:
    lora, scheduler = request_of(write_adapter(tmp_path / "one")), new_scheduler(FakeClient())
    tokens = list(range(CHUNK))
    assert saves_of(scheduler, new_request(tokens, "before", lora_request=lora))
    request = new_request([*tokens, 1], "meanwhile", lora_request=lora)
    scheduler.get_num_new_matched_tokens(request, 0)
    write_adapter(tmp_path / "one", 2.0)
    assert saves_of(scheduler, request) == []


def test_after_a_reload_from_the_same_path_vllm_s_own_prefix_cache_is_not_trusted(
    tmp_path: Path,
) -> None:
    scheduler, tokens = new_scheduler(FakeClient()), list(range(CHUNK))
    folder = write_adapter(tmp_path / "one")
    assert saves_of(scheduler, new_request(tokens, "a", lora_request=request_of(folder)))
    write_adapter(folder, 2.0)
    again = request_of(folder, load_inplace=True)
    assert saves_of(scheduler, new_request(tokens, "b", lora_request=again), BLOCK) == []
    assert saves_of(scheduler, new_request(tokens, "c", lora_request=again))
