"""KV is used only for what it was computed with, and never damaged: seen in real engines.

A process of its own runs them, see :mod:`tests.vllm.right_answers`; the text that is right comes
from Hugging Face's implementation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

import pytest

from tests.support.processes import short_folder

ALL = 299  # of 300 tokens: vLLM computes the last one
TIMEOUT_S = 900

Answers: TypeAlias = dict[str, Any]


@pytest.fixture(scope="module")
def answers() -> Iterator[Answers]:
    with short_folder() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.vllm.right_answers", str(folder)],
            env={
                **os.environ,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        yield {line["name"]: line for line in lines}


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("cold and warm", [0, ALL]),
        ("an adapter", [0, ALL]),
        ("another adapter under the same name", [0]),
        ("an adapter whose files were replaced, loaded in place", [0, ALL]),
        ("no adapter", [0]),
        ("another rope_theta", [0]),
        ("other weights", [0]),
        ("a copy in other files under another name", [ALL]),
        ("before a reset", [0, ALL]),
        ("after a reset", [0, ALL]),
        ("after a pause (abort)", [0, ALL]),
        ("after a pause (keep)", [0, ALL]),
        ("scheduled ahead", [ALL]),
    ],
)
def test_kv_is_used_only_for_what_it_was_computed_with(
    answers: Answers, name: str, cached: list[int]
) -> None:
    answer = answers[name]
    assert [reply["cached"] for reply in answer["replies"]] == cached
    assert all(reply["text"] == answer["right"] for reply in answer["replies"])


@pytest.mark.parametrize(
    "name",
    [
        "damaged chunks",
        "damaged chunks, scheduled ahead",
        "damaged chunks inside MultiConnector",
    ],
)
def test_damage_costs_one_recompute_and_nothing_else(answers: Answers, name: str) -> None:
    answer = answers[name]
    assert [reply["finish"] for reply in answer["replies"]] == ["length"] * 3
    assert all(reply["text"] == answer["right"] for reply in answer["replies"])
    assert answer["corrupt"] == 2  # both chunks, at the first request
    assert [reply["cached"] for reply in answer["replies"][1:]] == [ALL, ALL]


def test_vllm_can_drop_its_cache(answers: Answers) -> None:
    answer = answers["after a reset"]
    assert answer["done"] is True
    (generation,) = answer["generations"]
    assert generation
