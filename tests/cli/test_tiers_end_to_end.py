"""Requests and commands that name a tier below memory, through a real controller to a real cache
process with a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_kit.keys import Namespace, pack_tokens
from lmcache_kit.layout import KVLayout
from tests.cli.running import INSTANCE, Kit, running_kit
from tests.support.waiting import eventually

TOKENS = [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]
WORDS = [str(token) for token in TOKENS]
NAMESPACE = Namespace("meta-llama/Llama-3.1-8B-Instruct", KVLayout("float16", 4, 2, 64), 256)
MEMORY, DISK = "LocalCPUBackend", "LocalDiskBackend"
NBYTES = NAMESPACE.layout.payload_bytes(len(TOKENS))


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    """12 tokens in memory and on disk."""
    disk = {"local_disk": str(tmp_path / "kv"), "max_local_disk_size": 0.5, "enable_p2p": False}
    with running_kit(tmp_path, TOKENS, NAMESPACE, blocking_timeout_secs=20, **disk) as kit:
        eventually(lambda: held(kit) == {MEMORY: 12, DISK: 12})
        yield kit


def held(kit: Kit) -> dict[str, int]:
    """Location to the tokens that a lookup says are there."""
    _, reply = kit.ask("/lookup", {"tokens": TOKENS, "detail": True})
    found = reply["detail"].get(INSTANCE, []) if "detail" in reply else []
    return {each["location"]: each["tokens"] for each in found}


def at(location: str, **more: object) -> dict[str, object]:
    return {"instance_id": INSTANCE, "location": location, "tokens": TOKENS, **more}


def test_a_lookup_names_the_highest_tier_and_all_of_them_in_detail(kit: Kit) -> None:
    _, reply = kit.ask("/lookup", {"tokens": TOKENS})
    assert reply[INSTANCE] == [MEMORY, 12]
    assert held(kit) == {MEMORY: 12, DISK: 12}
    kit.ask("/clear", at(MEMORY))
    eventually(lambda: held(kit) == {DISK: 12})
    _, reply = kit.ask("/lookup", {"tokens": TOKENS})
    assert reply[INSTANCE] == [DISK, 12]


def test_what_is_only_on_disk_is_read_by_a_worker_and_is_in_memory_then(kit: Kit) -> None:
    kit.ask("/clear", at(MEMORY))
    with kit.worker() as client:
        found = client.lookup(NAMESPACE.digest, pack_tokens(TOKENS), NAMESPACE.chunk_size)
        assert found.tokens == 12
        client.release(found.lease, everyone=True)
    eventually(lambda: held(kit) == {MEMORY: 12, DISK: 12})


def test_each_location_is_pinned_and_cleared_by_itself(kit: Kit) -> None:
    assert kit.ask("/pin", at(DISK))[1]["num_tokens"] == 12
    status, reply = kit.ask("/clear", at(DISK))
    assert (status, reply["num_tokens"]) == (200, 0)
    assert reply["message"] == "12 tokens stay because they are pinned"
    assert kit.ask("/clear", at(MEMORY))[1]["num_tokens"] == 12
    listed = kit.run("pins").output
    assert DISK in listed
    assert kit.ask("/unpin", at(DISK))[1]["num_tokens"] == 12
    assert kit.ask("/clear", at(DISK))[1]["num_tokens"] == 12
    eventually(lambda: held(kit) == {})


def test_what_is_on_disk_is_compressed_there_and_decompressed(kit: Kit, tmp_path: Path) -> None:
    def on_disk() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "kv").rglob("*") if path.is_file())

    raw = on_disk()
    _, reply = kit.ask("/compress", at(DISK, method="cachegen"))
    assert kit.ended(reply["event_id"])["state"] == "done"
    assert on_disk() < raw - NBYTES / 2
    kit.ask("/clear", at(MEMORY))
    test_what_is_only_on_disk_is_read_by_a_worker_and_is_in_memory_then(kit)
    _, reply = kit.ask("/decompress", at(DISK, method="cachegen"))
    assert kit.ended(reply["event_id"])["state"] == "done"
    assert on_disk() == raw


def test_a_move_goes_from_one_location_to_another(kit: Kit) -> None:
    kit.ask("/clear", at(MEMORY))
    position = {"old_position": [INSTANCE, DISK], "new_position": [INSTANCE, MEMORY]}
    _, reply = kit.ask("/move", {**position, "tokens": TOKENS})
    assert kit.ended(reply["event_id"])["state"] == "done"
    eventually(lambda: held(kit) == {MEMORY: 12})
    here = ("--from", INSTANCE, "--to", INSTANCE, "--to-location", DISK)
    done = kit.run("move", *WORDS, *here, "--wait")
    assert done.exit_code == 0, done.output
    eventually(lambda: held(kit) == {DISK: 12})


def test_a_location_that_is_not_there_is_named_with_those_that_are(kit: Kit) -> None:
    status, reply = kit.ask("/clear", at("ValkeyBackend"))
    assert status == 404
    assert f"Known: {MEMORY}, {DISK}" in reply["error"]["hint"]
