"""``lmcache-kit lookup`` through a real controller, of what a real cache process holds."""

from __future__ import annotations

import json
from pathlib import Path

from lmcache_kit.keys import Namespace
from lmcache_kit.layout import KVLayout
from tests.cli.running import running_kit
from tests.support.waiting import eventually

TOKENS = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
NAMESPACE = Namespace("model", KVLayout("float16", 1, 1, 8), 4)


def test_what_is_stored_is_found_and_counted_in_tokens(tmp_path: Path) -> None:
    with running_kit(tmp_path, TOKENS, NAMESPACE, lmcache_instance_id="one") as kit:
        words = [str(token) for token in TOKENS]
        eventually(lambda: "10 of 10" in kit.run("lookup", *words).output)
        row = kit.run("lookup", *words, "99").output.splitlines()[1].split()
        assert row == ["one", "LocalCPUBackend", "10", "of", "11", "missing"]
        answer = json.loads(kit.run("lookup", "--json", *words).output)
        assert answer["one"] == ["LocalCPUBackend", 10]
        assert answer["layout_info"] == {"one": ["LocalCPUBackend", 10]}
        assert kit.run("lookup", "99").output == "No instance holds KV of these tokens.\n"
