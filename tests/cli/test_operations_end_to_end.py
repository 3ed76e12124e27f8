"""The requests of the examples, and the commands, through a real controller to a real cache
process with the codec cachegen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest

from lmcache_kit.keys import Namespace, pack_tokens
from lmcache_kit.layout import KVLayout
from tests.cli.running import INSTANCE, Kit, running_kit, smooth
from tests.support.rest import get_text
from tests.support.stores import items_of
from tests.support.waiting import eventually

pytest.importorskip("lmcache_kit_cachegen")

TOKENS = [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]
WORDS = [str(token) for token in TOKENS]
NAMESPACE = Namespace("meta-llama/Llama-3.1-8B-Instruct", KVLayout("float16", 4, 2, 64), 256)
PLACE = {"instance_id": INSTANCE, "location": "LocalCPUBackend"}
PIN = {"tokens": TOKENS, **PLACE}
COMPRESS = {**PLACE, "method": "cachegen", "tokens": TOKENS}
RAW_BYTES = NAMESPACE.layout.payload_bytes(len(TOKENS))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    folder = tmp_path_factory.mktemp("kit")
    with running_kit(folder, TOKENS, NAMESPACE, blocking_timeout_secs=20) as kit:
        eventually(lambda: "12 of 12" in kit.run("lookup", *WORDS).output)
        yield kit


@pytest.fixture
def kit(served: Kit) -> Kit:
    """Raw, and without pins."""
    served.ask("/unpin", PIN)
    served.run("decompress", "--all", "--wait")
    return served


def read(kit: Kit) -> list[np.ndarray]:
    """What a worker reads of TOKENS, chunk by chunk."""
    with kit.worker() as client:
        found = client.lookup(NAMESPACE.digest, pack_tokens(TOKENS), NAMESPACE.chunk_size)
        assert found.tokens == len(TOKENS)
        memory = client.memory(found.incarnation)
        assert memory is not None
        pieces = []
        for chunk in found.chunks:
            [extent] = chunk.extents
            data = bytes(memory[extent.offset : extent.offset + extent.nbytes])
            pieces.append(np.frombuffer(data, np.float16))
        client.release(found.lease, everyone=True)
    return pieces


def test_the_documented_pin_has_the_documented_reply(kit: Kit) -> None:
    status, reply = kit.ask("/pin", PIN)
    assert (status, reply.keys(), reply["num_tokens"]) == (200, {"event_id", "num_tokens"}, 12)
    _, listed = kit.ask("/pins")
    (pin,) = listed["pins"]
    assert pin == {
        "pin_id": reply["event_id"],
        **PLACE,
        "num_tokens": 12,
        "chunks": 1,
        "bytes": RAW_BYTES,
        "owner": "",
        "expires_in_s": None,
    }
    assert listed["unanswered"] == []
    status, reply = kit.ask("/unpin", PIN)
    assert (status, reply["num_tokens"]) == (200, 12)
    assert kit.ask("/pins")[1]["pins"] == []


def test_what_is_pinned_stays_when_all_is_cleared(kit: Kit) -> None:
    kit.ask("/pin", {**PIN, "ttl_s": 60})
    status, reply = kit.ask("/clear", PLACE)
    assert (status, reply["num_tokens"]) == (200, 0)
    assert reply["message"] == "12 tokens stay because they are pinned"
    read(kit)


def test_the_documented_compress_and_decompress_work_and_are_followed(kit: Kit) -> None:
    status, reply = kit.ask("/compress", COMPRESS)
    assert (status, reply.keys(), reply["num_tokens"]) == (200, {"event_id", "num_tokens"}, 12)
    event = kit.ended(reply["event_id"])
    assert (event["state"], event["num_tokens"], event["message"]) == ("done", 12, "")
    (part,) = event["progress"]
    assert (part["chunks_done"], part["chunks"], part["worker_ids"]) == (1, 1, [0])
    assert part["bytes_before"] == RAW_BYTES
    assert event["ratio"] == RAW_BYTES / part["bytes_after"] > 2
    (got,) = read(kit)
    (item,) = items_of(NAMESPACE, TOKENS)
    wanted = np.frombuffer(smooth(item), np.float16)
    assert np.abs(got.astype(np.float32) - wanted.astype(np.float32)).mean() < 0.1

    status, reply = kit.ask("/compress", COMPRESS)
    again = kit.ended(reply["event_id"])
    assert status == 200
    assert again["state"] == "done"
    assert "1 of 1 chunks were encoded with cachegen already" in again["message"]

    status, reply = kit.ask("/decompress", COMPRESS)
    assert (status, reply["num_tokens"]) == (200, 12)
    event = kit.ended(reply["event_id"])
    assert (event["state"], event["progress"][0]["bytes_after"]) == ("done", RAW_BYTES)


def test_an_unknown_method_is_404_with_those_that_are_installed(kit: Kit) -> None:
    status, reply = kit.ask("/compress", {**COMPRESS, "method": "zip9"})
    assert (status, reply["error"]["code"]) == (404, "unknown_method")
    assert re.fullmatch("Known: .*cachegen.*", reply["error"]["hint"])


def test_unknown_instances_locations_and_events_are_404_with_the_known_ones(kit: Kit) -> None:
    for changed, code, known in (
        ({"instance_id": "x"}, "unknown_instance", INSTANCE),
        ({"location": "x"}, "unknown_location", "LocalCPUBackend"),
        ({"model": "x"}, "unknown_model", NAMESPACE.model),
    ):
        status, reply = kit.ask("/pin", {**PIN, **changed})
        assert (status, reply["error"]["code"]) == (404, code)
        assert reply["error"]["hint"].partition(". ")[0] == f"Known: {known}"
    status, reply = kit.ask("/check_finish", {"event_id": "x"})
    assert (status, reply["error"]["code"]) == (404, "unknown_event")


def test_what_nobody_stored_is_pinned_as_nothing_and_said(kit: Kit) -> None:
    status, reply = kit.ask("/pin", {**PIN, "tokens": [1, 2]})
    assert (status, reply["num_tokens"]) == (200, 0)
    assert reply["message"] == "nothing of this is stored"
    _, reply = kit.ask("/pin", {**PIN, "cache_salt": "tenant"})
    assert reply["num_tokens"] == 0


def test_the_same_key_is_the_same_event(kit: Kit) -> None:
    body = {**COMPRESS, "idempotency_key": "k1"}
    first, second = kit.ask("/compress", body), kit.ask("/compress", body)
    assert first == second
    status, reply = kit.ask("/decompress", body)
    assert (status, reply["error"]["code"]) == (409, "conflict")


def test_the_commands_do_the_same(kit: Kit) -> None:
    pinned = kit.run("pin", *WORDS, "99", "--ttl", "60", "--owner", "ann")
    assert re.fullmatch(r"Pinned 12 of 13 tokens \(event \w+\)\n", pinned.stdout)
    row = kit.run("pins").stdout.splitlines()[1].split()
    assert row[1:4] == [INSTANCE, "LocalCPUBackend", "12"]
    assert row[6] == "ann"

    done = kit.run("compress", *WORDS, "--wait")
    assert done.exit_code == 0
    assert re.match(r"done: 12 tokens; 1 of 1 chunk; 24\.0 KiB became .*ratio", done.stdout)
    assert "compress" in kit.run("events", "--state", "done", "--limit", "1").stdout
    ended = kit.run("decompress", "--all", "--wait", "--json")
    event = json.loads(ended.stdout)
    assert (event["state"], event["operation"]) == ("done", "decompress")
    shown = kit.run("events", event["event_id"])
    assert shown.stdout.splitlines()[1].split()[4] == "done"
    late = kit.run("events", event["event_id"], "--cancel")
    assert late.exit_code == 1
    assert "has ended: done" in late.stderr

    assert "Unpinned 12 tokens" in kit.run("unpin", "--pin", row[0]).stdout
    assert kit.run("pins").stdout == "There are no pins.\n"


def test_metrics_count_operations_by_how_they_ended(kit: Kit) -> None:
    text = get_text(f"{kit.url}/metrics")
    assert re.search(r"^lmcache_kit_controller_operations_done_total [1-9]", text, re.M)
    assert re.search(r"^lmcache_kit_controller_operations_active 0", text, re.M)


def test_clear_forgets_what_it_counts(kit: Kit) -> None:
    """The last one, as all others need what is stored."""
    cleared = kit.run("clear", *WORDS)
    assert re.fullmatch(r"Cleared 12 tokens \(event \w+\)\n", cleared.stdout)
    eventually(lambda: "No instance" in kit.run("lookup", *WORDS).output)
    assert "nothing of this is stored" in kit.run("clear", "--all").stdout
