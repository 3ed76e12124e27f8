"""Behaviour of the connector's worker role when things go wrong, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from xxhash import xxh3_64

from lmcache_kit.cache.records import Extent
from lmcache_kit.keys import pack_tokens
from lmcache_kit.vllm.kv_pages import KVPages, TransferSpec
from tests.vllm.fakes import BLOCK, CHUNK, LAYOUT, NAMESPACE, FakeClient

PROMPT = list(range(100, 124))  # three chunks
BLOCKS = [4, 5, 6, 7, 8, 9]


class FakePages(KVPages):
    layout = LAYOUT
    block_tokens = BLOCK

    def __init__(self) -> None:
        self.written: list[tuple[int, int]] = []
        self.breaks = False
        self.memory_of: list[str] = []

    def register_memory(self, incarnation: str, memory: memoryview) -> None:
        self.memory_of.append(incarnation)

    def close(self) -> None:
        self.memory_of.clear()

    def gather(self, transfers: Sequence[TransferSpec]) -> list[int]:
        if self.breaks:
            raise RuntimeError("the pages are on fire")
        for transfer in transfers:
            transfer.payload[:] = bytes([transfer.start % 251 + 1]) * len(transfer.payload)
        return [xxh3_64(transfer.payload).intdigest() for transfer in transfers]

    def scatter(self, transfer: TransferSpec) -> int:
        if self.breaks:
            raise RuntimeError("the pages are on fire")
        self.written.append((transfer.start, transfer.end))
        return xxh3_64(transfer.payload).intdigest()


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def pages() -> FakePages:
    return FakePages()


@pytest.fixture
def side(client: FakeClient, pages: FakePages) -> Any:
    from lmcache_kit.vllm.worker import ConnectorWorker

    side = ConnectorWorker(client, rank=0, chunk_size=CHUNK, block_tokens=BLOCK)
    side.register_kv_pages(pages)
    return side


def new_metadata(**more: Any) -> Any:
    from lmcache_kit.vllm.metadata import ConnectorMetadata

    return ConnectorMetadata(**more)


def load_of(client: FakeClient, start: int = 0, end: int = 23) -> Any:
    from lmcache_kit.vllm.metadata import LoadSpec

    found = client.lookup(NAMESPACE.digest, pack_tokens(PROMPT), CHUNK)
    client.calls.clear()
    return LoadSpec("r", found.lease, found.incarnation, found.chunks, start, end, BLOCKS)


def save_of(start: int = 0, end: int = CHUNK, namespace: bytes = NAMESPACE.digest) -> Any:
    from lmcache_kit.vllm.metadata import SaveSpec

    parent = namespace[:16] if not start else b"p" * 16
    return SaveSpec("r", namespace, parent, pack_tokens(PROMPT[start:end]), start, end, BLOCKS)


def damage(client: FakeClient, index: int) -> Extent:
    extent = list(client.chunks.values())[index][1]
    client.bytes[extent.offset] ^= 0xFF
    return extent


def test_a_load_writes_just_its_tokens_and_releases_its_lease(
    side: Any, client: FakeClient, pages: FakePages
) -> None:
    client.store(PROMPT)
    side.start_load_kv(new_metadata(loads=[load_of(client, 4, 23)]))
    assert pages.written == [(4, 8), (8, 16), (16, 23)]
    assert side.take_block_ids_with_load_errors() == set()
    assert set(client.leases.values()) == {"rank"}


def test_a_damaged_chunk_is_reported_and_its_blocks_are_bad_from_there_on(
    side: Any, client: FakeClient
) -> None:
    client.store(PROMPT)
    damage(client, 1)
    key = list(client.chunks)[1]
    side.start_load_kv(new_metadata(loads=[load_of(client)]))
    assert side.take_block_ids_with_load_errors() == {6, 7, 8, 9}
    assert side.take_block_ids_with_load_errors() == set()
    assert client.corrupt == [key]
    assert client.held() == 0


def test_all_damaged_chunks_of_a_load_are_reported_at_once(side: Any, client: FakeClient) -> None:
    client.store(PROMPT)
    keys = list(client.chunks)
    for index in (0, 2):
        damage(client, index)
    side.start_load_kv(new_metadata(loads=[load_of(client)]))
    assert client.corrupt == [keys[0], keys[2]]
    assert side.counts["corrupt_chunks"] == 2


def test_a_load_is_reported_as_finished_once_and_a_failed_one_by_its_request(
    side: Any, client: FakeClient
) -> None:
    client.store(PROMPT)
    side.start_load_kv(new_metadata(loads=[load_of(client)]))
    assert side.take_finished_loads() == {"r"}
    assert side.take_finished_loads() == set()
    damage(client, 0)
    side.start_load_kv(new_metadata(loads=[load_of(client)]))
    assert side.take_finished_loads() == {"r"}
    assert side.build_connector_worker_meta().failed_requests == {"r"}
    side.wait_for_save(new_metadata(failures_seen=1))
    assert side.build_connector_worker_meta() is None


@pytest.mark.parametrize(
    "change",
    [
        {"incarnation": "life-0"},
        {"chunks_at": Extent(1 << 20, LAYOUT.payload_bytes(CHUNK), 0)},
        {"chunks_at": Extent(-8, LAYOUT.payload_bytes(CHUNK), 0)},
        {"chunks_at": Extent(0, 3, 0)},
    ],
    ids=["another life", "past the end", "before the start", "another size"],
)
def test_a_chunk_that_cannot_be_where_it_is_said_to_be_fails_the_load(
    side: Any, client: FakeClient, pages: FakePages, change: dict[str, Any]
) -> None:
    client.store(PROMPT)
    load = load_of(client)
    if extent := change.pop("chunks_at", None):
        change["chunks"] = tuple(chunk._replace(extents=(extent,)) for chunk in load.chunks)
    side.start_load_kv(new_metadata(loads=[load._replace(**change)]))
    assert pages.written == []
    assert side.take_block_ids_with_load_errors() == set(BLOCKS)
    assert client.held() == 0
    assert client.corrupt == []


def test_chunks_with_a_gap_fail_the_load_at_the_gap(side: Any, client: FakeClient) -> None:
    client.store(PROMPT)
    load = load_of(client)
    side.start_load_kv(new_metadata(loads=[load._replace(chunks=(load.chunks[0], load.chunks[2]))]))
    assert side.take_block_ids_with_load_errors() == {6, 7, 8, 9}


def test_whatever_breaks_in_a_load_is_a_failed_load(
    side: Any, client: FakeClient, pages: FakePages, caplog: pytest.LogCaptureFixture
) -> None:
    client.store(PROMPT)
    pages.breaks = True
    for _ in range(3):
        side.start_load_kv(new_metadata(loads=[load_of(client)]))
        assert side.take_block_ids_with_load_errors() == set(BLOCKS)
    assert client.held() == 0
    assert side.counts["load_errors"] == 3
    assert caplog.text.count("could not load KV") == 1


def test_nothing_is_saved_until_the_scheduler_knows_of_a_failed_load(
    side: Any, client: FakeClient
) -> None:
    client.store(PROMPT)
    damage(client, 0)
    saves = [save_of(8, 16)]
    failed = new_metadata(loads=[load_of(client)], saves=saves)
    side.start_load_kv(failed)
    side.wait_for_save(failed)
    assert side.build_connector_worker_meta().failures == 1
    side.wait_for_save(new_metadata(saves=saves))  # was scheduled before the failure was known
    assert "allocate" not in client.calls
    assert side.counts["skipped_saves"] == 2
    side.wait_for_save(new_metadata(saves=saves, failures_seen=1))
    assert "commit" in client.calls
    assert side.build_connector_worker_meta() is None


def test_ranks_agree_on_the_first_token_that_any_of_them_lacks(client: FakeClient) -> None:
    from lmcache_kit.vllm.worker import ConnectorWorker

    asked = []

    def another_rank_reached_12(reached: list[int]) -> list[int]:
        asked.append(reached)
        return [min(end, 12) for end in reached]

    side = ConnectorWorker(
        client, rank=0, chunk_size=CHUNK, block_tokens=BLOCK, min_over_ranks=another_rank_reached_12
    )
    side.register_kv_pages(FakePages())
    client.store(PROMPT)
    side.start_load_kv(new_metadata(loads=[load_of(client)]))
    assert asked == [[23]]
    assert side.take_block_ids_with_load_errors() == {7, 8, 9}
    side.start_load_kv(new_metadata())
    assert len(asked) == 1  # ranks only meet when there is something to load


def test_chunks_are_saved_with_their_checksum(side: Any, client: FakeClient) -> None:
    side.wait_for_save(new_metadata(saves=[save_of(0, 8), save_of(8, 16)]))
    assert client.calls == ["allocate", "commit"]
    for _, extent in client.chunks.values():
        stored = client.bytes[extent.offset : extent.offset + extent.nbytes]
        assert xxh3_64(stored).intdigest() == extent.checksum
    assert side.counts["stored_tokens"] == 16


def test_what_is_saved_says_where_in_the_sequence_it_is(side: Any, client: FakeClient) -> None:
    side.wait_for_save(new_metadata(saves=[save_of(0, 8), save_of(8, 16)]))
    assert client.starts == [0, 8]


def test_each_namespace_of_a_step_is_asked_for_on_its_own(side: Any, client: FakeClient) -> None:
    other = NAMESPACE.variant(cache_salt="pepper").digest
    side.wait_for_save(new_metadata(saves=[save_of(), save_of(namespace=other)]))
    assert client.calls == ["allocate", "commit"] * 2


def test_what_is_there_or_refused_is_not_gathered(side: Any, client: FakeClient) -> None:
    client.store(PROMPT[:CHUNK])
    client.refuses = True
    side.wait_for_save(new_metadata(saves=[save_of(), save_of(8, 16)]))
    assert client.calls == ["allocate"]
    assert side.counts["refused_chunks"] == 1


@pytest.mark.parametrize("call", ["allocate", "commit"])
def test_a_save_that_fails_is_only_counted(
    side: Any, client: FakeClient, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    client.fails = {call}
    for start in (0, 8):
        side.wait_for_save(new_metadata(saves=[save_of(start, start + 8)]))
    assert side.counts["save_errors"] == 2
    assert caplog.text.count("could not save KV") == 1


def test_pages_that_break_give_their_grants_back(
    side: Any, client: FakeClient, pages: FakePages
) -> None:
    pages.breaks = True
    side.wait_for_save(new_metadata(saves=[save_of(), save_of(8, 16)]))
    assert len(client.abandoned) == 2
    assert client.chunks == {}


def test_a_cache_process_that_was_replaced_meanwhile_is_not_told_of_old_tickets(
    side: Any, client: FakeClient, pages: FakePages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather_while_it_is_replaced(transfers: Sequence[TransferSpec]) -> list[int]:
        client.incarnation = "life-2"
        return [0] * len(transfers)

    monkeypatch.setattr(pages, "gather", gather_while_it_is_replaced)
    side.wait_for_save(new_metadata(saves=[save_of()]))
    assert client.calls == ["allocate"]


def test_pages_that_cannot_be_served_fail_loads_and_tell_the_scheduler(client: FakeClient) -> None:
    from lmcache_kit.vllm.worker import ConnectorWorker

    side = ConnectorWorker(client, rank=0, chunk_size=CHUNK, block_tokens=BLOCK)
    side.disable("its pages are odd")
    client.store(PROMPT)
    step = new_metadata(loads=[load_of(client)], saves=[save_of()])
    side.start_load_kv(step)
    side.wait_for_save(step)
    assert side.take_block_ids_with_load_errors() == set(BLOCKS)
    assert side.build_connector_worker_meta().disabled_reason == "its pages are odd"
    assert "allocate" not in client.calls


def test_reports_of_several_ranks_add_up_to_the_worst() -> None:
    from lmcache_kit.vllm.metadata import WorkerMetadata

    assert WorkerMetadata(1).aggregate(WorkerMetadata(3, "odd")) == WorkerMetadata(3, "odd")
    assert WorkerMetadata(3, "odd").aggregate(WorkerMetadata(1)) == WorkerMetadata(3, "odd")


def test_memory_is_prepared_before_the_first_request(side: Any, pages: FakePages) -> None:
    assert pages.memory_of == ["life-1"]


def test_the_memory_of_a_dead_cache_process_is_let_go_with_the_next_step(
    side: Any, client: FakeClient, pages: FakePages
) -> None:
    client.connected = False
    side.wait_for_save(new_metadata())
    assert pages.memory_of == []


def test_a_load_from_a_dead_cache_process_does_not_take_up_its_memory_again(
    side: Any, client: FakeClient, pages: FakePages
) -> None:
    client.store(PROMPT)
    client.connected = False
    side.wait_for_save(new_metadata())
    side.start_load_kv(new_metadata(loads=[load_of(client)]))
    assert pages.written
    assert pages.memory_of == []


def test_the_memory_of_an_earlier_cache_process_is_let_go_when_there_is_another(
    side: Any, client: FakeClient, pages: FakePages
) -> None:
    client.incarnation = "life-2"
    side.wait_for_save(new_metadata())
    assert pages.memory_of == []
