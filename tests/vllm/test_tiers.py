"""vLLM over tiers below memory: a third-party backend, and a disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools import stack

if TYPE_CHECKING:
    from tests.vllm.conftest import Reference

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "third_party_backend"

# As anybody runs vLLM: prompts in, tokens and vLLM's own count of cached ones out.
_ENGINE = """
import json, os, sys
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
settings, extra, answers = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
llm = LLM(
    sys.argv[4],
    enable_prefix_caching=True,
    kv_transfer_config=KVTransferConfig(
        kv_connector="LMCacheKitConnector", kv_role="kv_both", kv_connector_extra_config=extra
    ),
    **settings,
)
with open(answers, "w") as out:
    for line in sys.stdin:
        llm.reset_prefix_cache()
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        (done,) = llm.generate([{"prompt_token_ids": json.loads(line)}], sampling, use_tqdm=False)
        for _ in range(3):
            llm.llm_engine.step()
        answer = {"tokens": list(done.outputs[0].token_ids), "cached": done.num_cached_tokens}
        print(json.dumps(answer), file=out, flush=True)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built and installed as pip does it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("third-party")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--target", str(folder), str(EXAMPLE)],
        check=True,
    )  # fmt: skip
    return folder


class Served:
    """vLLM in a process of its own, and a client of its cache process."""

    def __init__(self, site: Path, plugins: Path, engine: dict[str, Any]) -> None:
        from lmcache_kit.config import load_config
        from lmcache_kit.service.launch import open_client

        extra = {
            "lmcache.chunk_size": 40,
            "lmcache.max_local_cpu_size": 0.25,
            "lmcache.cache_socket": str(site / "tiers.sock"),
            "lmcache.cache_linger_s": 1,
            "lmcache.tiers": ["SQLiteBackend"],
            "lmcache.backend_options": {"SQLiteBackend": {"path": str(site / "kv.sqlite")}},
            "lmcache.local_disk": str(site / "kv"),
            "lmcache.max_local_disk_size": 1,
        }
        ours, theirs = os.pipe()
        self.log = site / "tiers.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _ENGINE, json.dumps(engine), json.dumps(extra), str(theirs),
                 str(stack.MODEL)],
                stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=(theirs,), text=True,
                env={**os.environ, "PYTHONPATH": str(plugins)},
            )  # fmt: skip
        os.close(theirs)
        self.answers = os.fdopen(ours)
        config = load_config(extra={**extra, "lmcache.cache_process": "attach"}, environ={}).config
        self.client = open_client(config, role="scheduler")

    def __call__(self, tokens: list[int]) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(tokens), file=self.process.stdin, flush=True)
        line = self.answers.readline()
        assert line, f"vLLM ended: {self.log.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stat(self, name: str, location: str) -> float:
        return self.client.stats().lower_tiers[location][name]

    def close(self) -> None:
        self.client.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.answers.close()


@pytest.fixture(scope="module")
def served(vllm_site: Path, installed: Path) -> Iterator[Served]:
    from tests.vllm.conftest import ENGINE

    served = Served(vllm_site, installed, ENGINE)
    yield served
    served.close()


@pytest.mark.vllm
def test_a_third_partys_backend_serves_vllm_after_the_cache_process_was_killed(
    served: Served, reference: Reference
) -> None:
    from tests.support.waiting import eventually
    from tests.vllm.conftest import prompt

    tokens = prompt(200, seed=501)
    assert served(tokens) == {"tokens": reference(tokens), "cached": 0}
    eventually(lambda: served.client.connected)
    eventually(lambda: served.stat("written_chunks_total", "SQLiteBackend") == 5)
    eventually(lambda: served.stat("written_chunks_total", "LocalDiskBackend") == 5)
    before = served.client.incarnation
    os.kill(served.client.stats().pid, signal.SIGKILL)
    eventually(lambda: served.client.connected and served.client.incarnation != before)
    eventually(lambda: served.stat("chunks", "SQLiteBackend") == 5)
    assert served(tokens) == {"tokens": reference(tokens), "cached": 199}
    assert served.stat("read_chunks_total", "SQLiteBackend") == 5
    assert served.stat("read_chunks_total", "LocalDiskBackend") == 0
