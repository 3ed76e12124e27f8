"""A real engine with the kit, another without it to compare with, and stand-ins for both."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmcache_kit.process.client import CacheClient
from lmcache_kit.service import launch
from tests.support.processes import short_folder
from tools import stack

CHUNK = 40
BLOCK = 32
MAX_TOKENS = 8
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_batched_tokens": 128,
    "num_gpu_blocks_override": 20,
    "block_size": BLOCK,
    "enforce_eager": True,
    "disable_log_stats": True,
    "seed": 0,
}
"""Chunks and blocks share few boundaries, prompts are prefilled in pieces, and two long requests do
not fit together for long."""


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens that no other seed shares."""
    generator = random.Random(seed)
    return [generator.randrange(100, 40_000) for _ in range(length)]


class ModulesButLlvmlite:
    """Stands for ``sys`` in vLLM's kernel registry, which looks through the attributes of every
    module as an engine starts, and trips over llvmlite's where numba was imported before. Engines
    have processes of their own and import numba later; the tests of pages come first in this one.
    """

    @property
    def modules(self) -> dict[str, Any]:
        return {name: module for name, module in sys.modules.items() if "llvmlite" not in name}


@contextmanager
def recorded_clients() -> Iterator[dict[str, list[CacheClient]]]:
    """Record the clients that are opened meanwhile, by role."""
    clients: dict[str, list[CacheClient]] = defaultdict(list)
    open_client = launch.open_client

    def recording(*args: Any, role: str, **more: Any) -> CacheClient:
        client = open_client(*args, role=role, **more)  # type: ignore[arg-type]
        clients[role].append(client)
        return client

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "open_client", recording)
        yield clients


class Reply:
    def __init__(self, output: Any) -> None:
        self.tokens = list(output.outputs[0].token_ids)
        self.cached = output.num_cached_tokens


class Engine:
    """vLLM in this process, with the kit."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        transfer = KVTransferConfig(
            kv_connector="LMCacheKitConnector",
            kv_role="kv_both",
            kv_connector_extra_config={
                "lmcache.chunk_size": CHUNK,
                "lmcache.max_local_cpu_size": 0.25,
                "lmcache.cache_socket": str(folder / "cache.sock"),
                "lmcache.cache_linger_s": 1,
            },
        )
        with recorded_clients() as clients:
            self.llm = LLM(
                str(stack.MODEL), **ENGINE, enable_prefix_caching=True, kv_transfer_config=transfer
            )
        [self.scheduler_client], [self.worker_client] = clients["scheduler"], clients["worker"]
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler.connector.connector_scheduler
        self.worker = get_kv_transfer_group().connector_worker

    def generate(self, *prompts: Any, forget: bool = True, **sampling: Any) -> list[Reply]:
        """Greedy. Unless told otherwise, vLLM's own prefix cache is emptied before."""
        from vllm import SamplingParams

        if forget:
            assert self.llm.reset_prefix_cache()
        parameters = SamplingParams(
            **{"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True} | sampling
        )
        asked = [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts]
        outputs = self.llm.generate(asked, parameters, use_tqdm=False)
        self.settle()
        return [Reply(output) for output in outputs]

    def settle(self) -> None:
        """The empty steps with which an engine process tells its workers of finished requests."""
        for _ in range(3):
            self.llm.llm_engine.step()
        assert not self.core.scheduler.has_requests()

    def one(self, tokens: Any, **more: Any) -> Reply:
        (reply,) = self.generate(tokens, **more)
        return reply

    def stats(self) -> dict[str, float]:
        return self.worker_client.stats().values


_REFERENCE = """
import json, sys
from vllm import LLM, SamplingParams
settings, model, answers = json.loads(sys.argv[1]), sys.argv[2], open(int(sys.argv[3]), "w")
llm = LLM(model, enable_prefix_caching=False, **settings)
for line in sys.stdin:
    tokens, count = json.loads(line)
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    print(json.dumps(list(output.outputs[0].token_ids)), file=answers, flush=True)
"""


class Reference:
    """vLLM without the kit, in a process of its own; what it said once it remembers."""

    def __init__(self, log: Path) -> None:
        ours, theirs = os.pipe()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _REFERENCE,
                    json.dumps(ENGINE),
                    str(stack.MODEL),
                    str(theirs),
                ],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(theirs,),
                text=True,
            )
        os.close(theirs)
        self.answers = os.fdopen(ours)
        self.log = log
        self.known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, tokens: Sequence[int], count: int = MAX_TOKENS) -> list[int]:
        key = (count, *tokens)
        if key not in self.known:
            assert self.process.stdin is not None
            print(json.dumps([list(tokens), count]), file=self.process.stdin, flush=True)
            line = self.answers.readline()
            assert line, (
                f"the reference engine ended; see {self.log}: {self.log.read_text()[-2000:]}"
            )
            self.known[key] = json.loads(line)
        return self.known[key]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.answers.close()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test in this folder: each imports vLLM or torch, even where none starts."""
    item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session", autouse=True)
def vllm_imported() -> None:
    """Importing vLLM warns about much that is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm._custom_ops
        import vllm.v1.request  # noqa: F401

        import lmcache_kit.vllm.connector  # noqa: F401


@pytest.fixture(scope="session")
def vllm_site() -> Iterator[Path]:
    """What both engines need; a short path, since Unix sockets allow no long ones."""
    assert (stack.MODEL / "config.json").is_file(), f"{stack.MODEL} is missing: run `make model`"
    before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with short_folder() as folder:
        yield folder
    if before is None:
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before


@pytest.fixture(scope="session")
def reference(vllm_site: Path) -> Iterator[Reference]:
    reference = Reference(vllm_site / "reference.log")
    yield reference
    reference.close()


@pytest.fixture(scope="session")
def session_engine(vllm_site: Path, reference: Reference) -> Iterator[Engine]:
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.triton_utils import dispatcher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "sys", ModulesButLlvmlite())
        engine = Engine(vllm_site)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()
    ensure_kv_transfer_shutdown()


@pytest.fixture
def engine(session_engine: Engine) -> Iterator[Engine]:
    """The session's engine; whatever a test does to it, it ends with no request and no lease."""
    yield session_engine
    assert not session_engine.llm.llm_engine.has_unfinished_requests()
    assert not session_engine.scheduler.num_tracked_requests
    if session_engine.worker_client.connected:
        stats = session_engine.stats()
        assert (stats["leases"], stats["pending"]) == (0, 0)
