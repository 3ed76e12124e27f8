"""A program: engines with a tiny model, one after the other, on one cache process.

Usage: ``python -m tests.vllm.right_answers FOLDER``. Prints what each request gave as lines of
JSON. Every model is float32 with random weights, so that its greedy text depends on the whole
prompt; the text that is right comes from Hugging Face's implementation.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.vllm.conftest import ModulesButLlvmlite

BLOCK, CHUNK = 32, 40
MAX_TOKENS = 8
PROMPT_TOKENS = 300
SOCKET = "cache.sock"
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
RANK = 4


def prompt(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 500) for _ in range(PROMPT_TOKENS)]


# Models and adapters.


def make_model(folder: Path, seed: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.15,
        max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def reshard(source: Path, folder: Path) -> Path:
    """Copy a model with its tensors in several files."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def adapter_tensors(seed: int) -> dict[str, torch.Tensor]:
    """A and B of one projection in each layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(3):
        for name, shape in (("lora_A", (RANK, 128)), ("lora_B", (64, RANK))):
            key = f"base_model.model.model.layers.{layer}.self_attn.v_proj.{name}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * 0.3
    return tensors


def make_adapter(folder: Path, seed: int) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(adapter_tensors(seed), str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def right_text(
    folder: Path, tokens: list[int], *, adapter: int | None = None, **overrides: Any
) -> list[int]:
    """Greedy text by Hugging Face, with an adapter merged into the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder, **overrides)
    model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    if adapter is not None:
        tensors = adapter_tensors(adapter)
        for layer in range(3):
            key = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_"
            weight = model.model.layers[layer].self_attn.v_proj.weight
            weight.data += tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
    sequence = torch.tensor([tokens])
    with torch.no_grad():
        for _ in range(MAX_TOKENS):
            logits = model(sequence).logits[0, -1]
            sequence = torch.cat([sequence, logits.argmax().view(1, 1)], dim=1)
    return sequence[0, len(tokens) :].tolist()


# Engines.


class Engine:
    """vLLM with the kit, in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core

    def ask(self, tokens: list[int], lora: Any = None) -> dict[str, Any]:
        """Generate after vLLM's own prefix cache was emptied."""
        from vllm import SamplingParams

        assert self.llm.reset_prefix_cache()
        sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        (output,) = self.llm.generate(
            [{"prompt_token_ids": tokens}], sampling, lora_request=lora, use_tqdm=False
        )
        for _ in range(3):
            self.llm.llm_engine.step()
        return {
            "cached": output.num_cached_tokens,
            "text": list(output.outputs[0].token_ids),
            "finish": output.outputs[0].finish_reason,
        }

    def client(self) -> Any:
        """The worker's client of the cache process, behind a MultiConnector or not."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        group = get_kv_transfer_group()
        connector = getattr(group, "sub_connectors", [group])[0]
        return connector.connector_worker._client

    def damage(self, tokens: list[int], *chunks: int) -> None:
        """Flip a byte in these chunks of the cached prompt."""
        from lmcache_kit.keys import pack_tokens

        client = self.client()
        (namespace,) = client.stats().namespaces
        found = client.lookup(namespace.digest, pack_tokens(tokens), CHUNK)
        memory = client.memory(found.incarnation)
        for index in chunks:
            memory[found.chunks[index].extents[0].offset + 5] ^= 0xFF
        client.release(found.lease, everyone=True)


def force_asynchronous_scheduling() -> Callable[[], None]:
    """Undo what vLLM's CPU platform turns off; returns a function that turns it off again."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def patched(cls: type, vllm_config: Any) -> None:
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(patched)
    return lambda: setattr(CpuPlatform, "check_and_update_config", original)


@contextmanager
def engine(folder: Path, model: Path, *, multi: bool = False, **more: Any) -> Iterator[Engine]:
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    extra = {
        "lmcache.chunk_size": CHUNK,
        "lmcache.max_local_cpu_size": 0.25,
        "lmcache.cache_socket": str(folder / SOCKET),
        "lmcache.cache_linger_s": 10,
    }
    ours = {
        "kv_connector": "LMCacheKitConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [ours]},
    }
    llm = LLM(
        str(model), dtype="float32", max_model_len=512, max_num_batched_tokens=128,
        num_gpu_blocks_override=40, block_size=BLOCK, enforce_eager=True, disable_log_stats=True,
        skip_tokenizer_init=True, enable_prefix_caching=True, seed=0,
        kv_transfer_config=KVTransferConfig(**(transfer if multi else ours)),
        **({"served_model_name": "tiny"} | more),
    )  # fmt: skip
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


# What is tried.


def tell(name: str, *replies: dict[str, Any], right: list[int] | None = None, **more: Any) -> None:
    line = {"name": name, "replies": replies, "right": right, **more}
    print(json.dumps(line), flush=True)


def adapters(folder: Path, model: Path, running: Engine) -> None:
    from vllm.lora.request import LoRARequest

    tokens = prompt(1)
    one, two = make_adapter(folder / "one", 1), make_adapter(folder / "two", 2)
    lora = LoRARequest("red", 1, str(one))
    tell(
        "an adapter",
        running.ask(tokens, lora), running.ask(tokens, lora),
        right=right_text(model, tokens, adapter=1),
    )  # fmt: skip
    running.llm.llm_engine.remove_lora(1)
    tell(
        "another adapter under the same name",
        running.ask(tokens, LoRARequest("red", 2, str(two))),
        right=right_text(model, tokens, adapter=2),
    )
    make_adapter(two, 3)
    again = LoRARequest("red", 2, str(two), load_inplace=True)
    tell(
        "an adapter whose files were replaced, loaded in place",
        running.ask(tokens, again), running.ask(tokens, again),
        right=right_text(model, tokens, adapter=3),
    )  # fmt: skip
    tell("no adapter", running.ask(tokens), right=right_text(model, tokens))


def resets(model: Path, running: Engine) -> None:
    tokens = prompt(2)
    right = right_text(model, tokens)
    tell("before a reset", running.ask(tokens), running.ask(tokens), right=right)
    done = running.llm.reset_prefix_cache(reset_connector=True)
    tell(
        "after a reset",
        running.ask(tokens),
        running.ask(tokens),
        right=right,
        done=bool(done),
        generations=[each.generation for each in running.client().stats().namespaces],
    )
    for mode in ("abort", "keep"):
        running.core.pause_scheduler(mode=mode, clear_cache=True)
        running.core.resume_scheduler()
        tell(f"after a pause ({mode})", running.ask(tokens), running.ask(tokens), right=right)


def damaged(name: str, model: Path, running: Engine) -> None:
    tokens = prompt(3)
    right = right_text(model, tokens)
    running.ask(tokens)
    before = running.client().stats().values["corrupt_total"]
    running.damage(tokens, 2, 4)
    replies = [running.ask(tokens), running.ask(tokens), running.ask(tokens)]
    corrupt = running.client().stats().values["corrupt_total"] - before
    tell(name, *replies, right=right, corrupt=corrupt)


def main(folder: Path) -> None:
    from vllm.triton_utils import dispatcher

    dispatcher.sys = ModulesButLlvmlite()  # the first engine has imported numba
    tokens = prompt(0)
    model, other = make_model(folder / "model", 0), make_model(folder / "other", 1)
    with engine(folder, model, enable_lora=True, max_lora_rank=8) as running:
        right = right_text(model, tokens)
        tell("cold and warm", running.ask(tokens), running.ask(tokens), right=right)
        adapters(folder, model, running)
        damaged("damaged chunks", model, running)
    with engine(folder, model, hf_overrides=THETA) as running:
        right = right_text(model, tokens, **THETA)
        tell("another rope_theta", running.ask(tokens), right=right)
    with engine(folder, other) as running:
        tell("other weights", running.ask(tokens), right=right_text(other, tokens))
    copied = reshard(model, folder / "copied")
    shutil.rmtree(model)
    with engine(folder, copied, served_model_name="alias") as running:
        right = right_text(copied, tokens)
        tell("a copy in other files under another name", running.ask(tokens), right=right)
        resets(copied, running)
    undo = force_asynchronous_scheduling()
    with engine(folder, copied) as running:
        assert running.core.batch_queue_size > 1
        right = right_text(copied, tokens)
        tell("scheduled ahead", running.ask(tokens), right=right)
        damaged("damaged chunks, scheduled ahead", copied, running)
    undo()
    with engine(folder, copied, multi=True) as running:
        damaged("damaged chunks inside MultiConnector", copied, running)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
