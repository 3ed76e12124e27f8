"""Encoded chunks in real cache processes, with a codec of a third-party distribution."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.errors import CacheTimeout, ConfigError, PluginNotFound
from lmcache_kit.keys import chain, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.service import background_encoder

if TYPE_CHECKING:
    from lmcache_kit.process.client import CacheClient
    from lmcache_kit.protocol.local import Found
    from tests.process.conftest import Connect, Eventually
    from tests.support.sites import FakeSite

SPACE = bytes(range(32))
CHUNK = 16
FORM = RankLayout(KVLayout("float32", 2, 1, 16))
TOKENS = pack_tokens(range(40))
PLUGIN = """
    @hookimpl
    def register_codecs():
        return [CodecSpec("acme", "acme_zip:Zip", "zlib", config="acme_zip:Options")]
"""
CODEC = '''
import os, time, zlib
from pathlib import Path
from pydantic import BaseModel
from lmcache_kit.interfaces import BlobInfo, Codec

class Options(BaseModel):
    encode_s: float = 0
    decode_s: float = 0
    fail: str = ""

class Zip(Codec):
    """zlib; each encoding leaves a mark in ACME_MARKS."""
    format_version = 1
    def __init__(self, options=Options()):
        self.options = options
        if options.fail == "make":
            raise RuntimeError("boom")
    def warm_up(self):
        if self.options.fail == "warm up":
            raise RuntimeError("boom")
    def encode(self, payload, chunk):
        if marks := os.environ.get("ACME_MARKS"):
            Path(marks).touch()
        time.sleep(self.options.encode_s)
        if self.options.fail == "encode":
            raise ValueError("over the bound")
        return zlib.compress(payload, 1)
    def decode(self, blob, chunk, out):
        time.sleep(self.options.decode_s)
        out[:] = zlib.decompress(blob)
    def describe(self, blob):
        return BlobInfo(1, 0, 1, 1)
    def max_blob_bytes(self, chunk):
        return chunk.payload_bytes + 64
'''


@pytest.fixture(autouse=True)
def _codec(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme-codec", PLUGIN)
    site.module("acme_zip", CODEC)
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(site.folder), *([inherited] if inherited else [])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def payload(item: StoreItem) -> bytes:
    return bytes([item.start + 1]) * item.nbytes


def items(space: bytes = SPACE) -> list[StoreItem]:
    return [
        StoreItem(
            link.parent,
            TOKENS[link.start * 4 : link.end * 4],
            FORM.layout.payload_bytes(link.end - link.start),
            link.start,
        )
        for link in chain(space, TOKENS, CHUNK)
    ]


def store(client: CacheClient, space: bytes = SPACE) -> None:
    grants = client.allocate(space, CHUNK, items(space))
    memory = client.memory(grants.incarnation)
    assert memory is not None
    written = []
    for item, grant in zip(items(), grants, strict=True):
        memory[grant.offset : grant.offset + item.nbytes] = payload(item)
        written.append((grant.ticket, xxh3_64_intdigest(payload(item))))
    assert client.commit(written) == 3


def check(client: CacheClient, found: Found) -> None:
    """What was found reads as it was stored."""
    memory = client.memory(found.incarnation)
    assert memory is not None
    for chunk, item in zip(found.chunks, items(), strict=False):
        [extent] = chunk.extents
        data = bytes(memory[extent.offset : extent.offset + extent.nbytes])
        assert data == payload(item)
        assert xxh3_64_intdigest(data) == extent.checksum


def stat(client: CacheClient, name: str) -> float:
    return client.stats().values[name]


def encoded(client: CacheClient) -> bool:
    return stat(client, "encoded_chunks_total") == 3


@pytest.mark.parametrize("how", ["spawn", "embedded"])
def test_with_store_codec_all_that_is_stored_is_encoded_and_served(
    connect: Connect, eventually: Eventually, how: str
) -> None:
    client = connect(form=FORM, cache_process=how, store_codec="acme", blocking_timeout_secs=20)
    store(client)
    eventually(lambda: encoded(client))
    assert stat(client, "requested_bytes") < 1000
    found = client.lookup(SPACE, TOKENS, CHUNK)
    assert found.tokens == 40
    check(client, found)
    assert stat(client, "requested_bytes") > 40 * 128
    client.release(found.lease)
    eventually(lambda: stat(client, "requested_bytes") < 1000)


def test_what_is_not_decoded_in_time_is_a_miss_and_no_timeout(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect(
        form=FORM,
        store_codec="acme",
        codec_options={"acme": {"decode_s": 1.0}},
        blocking_timeout_secs=0.5,
    )
    store(client)
    eventually(lambda: encoded(client))
    assert client.lookup(SPACE, TOKENS, CHUNK).tokens == 0
    assert stat(client, "decode_late_total") > 0
    assert client.connected


def test_a_lookup_that_waits_holds_up_nobody_else(connect: Connect, eventually: Eventually) -> None:
    options = {"acme": {"decode_s": 0.2}}
    client = connect(form=FORM, store_codec="acme", codec_options=options, blocking_timeout_secs=20)
    store(client)
    eventually(lambda: encoded(client))
    lengths: list[int] = []
    waiting = threading.Thread(
        target=lambda: lengths.append(client.lookup(SPACE, TOKENS, CHUNK).tokens)
    )
    before = stat(client, "lookups_total")
    waiting.start()
    eventually(lambda: stat(client, "lookups_total") > before)
    assert lengths == []
    waiting.join()
    assert lengths == [40]


def test_a_client_that_goes_while_it_waits_leaves_nothing_behind(
    connect: Connect, eventually: Eventually
) -> None:
    options = {"acme": {"decode_s": 0.3}}
    client = connect(
        form=FORM, store_codec="acme", codec_options=options,
        blocking_timeout_secs=20, cache_linger_s=20,
    )  # fmt: skip
    store(client)
    eventually(lambda: encoded(client))
    held = stat(client, "requested_bytes")
    hasty = connect(
        "scheduler", store_codec="acme", codec_options=options,
        blocking_timeout_secs=20, cache_linger_s=20,
    )  # fmt: skip
    waiting = threading.Thread(target=lambda: suppressed(hasty))
    waiting.start()
    eventually(lambda: stat(client, "requested_bytes") > held)
    hasty.close()
    waiting.join()
    eventually(lambda: stat(client, "requested_bytes") == held)
    assert stat(client, "leases") == 0


def suppressed(client: CacheClient) -> None:
    with pytest.raises((ConnectionError, CacheTimeout)):
        client.lookup(SPACE, TOKENS, CHUNK)


def test_a_process_killed_while_it_encodes_is_replaced_by_a_clean_one(
    connect: Connect, eventually: Eventually, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = tmp_path / "marks"
    monkeypatch.setenv("ACME_MARKS", str(marks))
    client = connect(
        form=FORM,
        store_codec="acme",
        codec_options={"acme": {"encode_s": 60.0}},
        blocking_timeout_secs=20,
    )
    store(client)
    eventually(marks.exists)
    lost = client.incarnation
    os.kill(client.stats().pid, signal.SIGKILL)
    eventually(lambda: client.connected and client.incarnation != lost)
    assert client.lookup(SPACE, TOKENS, CHUNK).tokens == 0
    assert stat(client, "requested_bytes") == 0
    store(client)
    found = client.lookup(SPACE, TOKENS, CHUNK)
    assert found.tokens == 40
    check(client, found)
    os.kill(client.stats().pid, signal.SIGKILL)


def test_a_codec_that_keeps_missing_its_bound_leaves_all_raw(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect(form=FORM, store_codec="acme", codec_options={"acme": {"fail": "encode"}})
    store(client)
    eventually(lambda: stat(client, "encode_failed_total") == 3)
    check(client, client.lookup(SPACE, TOKENS, CHUNK))
    assert stat(client, "encode_waiting") == 0


def test_a_codec_that_does_not_warm_up_leaves_all_raw(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect(form=FORM, store_codec="acme", codec_options={"acme": {"fail": "warm up"}})
    store(client)
    eventually(lambda: stat(client, "encode_waiting") == 0)
    assert client.lookup(SPACE, TOKENS, CHUNK).tokens == 40


def test_more_than_may_wait_stays_raw(
    connect: Connect, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_encoder, "MAX_WAITING", 1)
    client = connect(
        form=FORM,
        cache_process="embedded",
        store_codec="acme",
        codec_options={"acme": {"encode_s": 0.2}},
    )
    store(client)
    eventually(lambda: stat(client, "encode_waiting") == 0)
    passed_over = stat(client, "encode_passed_over_total")
    assert 1 <= passed_over <= 2
    eventually(lambda: stat(client, "encoded_chunks_total") == 3 - passed_over)


# What cannot be started says why.


def test_a_codec_that_is_not_installed_is_named_with_its_remedy(connect: Connect) -> None:
    with pytest.raises(PluginNotFound, match=r"no codec 'nope' is installed\. Installed: .*acme"):
        connect(store_codec="nope")


def test_a_codec_that_cannot_be_made_is_named_and_chunks_stay_raw(
    connect: Connect, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(form=FORM, store_codec="acme", codec_options={"acme": {"fail": "make"}})
    store(client)
    eventually(lambda: stat(client, "encode_waiting") == 0)
    assert client.lookup(SPACE, TOKENS, CHUNK).tokens == 40
    said = (
        "cache process: chunks stay raw, since codec 'acme' does not work: codec 'acme' cannot be "
        "made: RuntimeError: boom"
    )
    eventually(lambda: said in caplog.messages)


def test_an_option_that_is_wrong_is_named(connect: Connect) -> None:
    with pytest.raises(ConfigError, match=r"codec_options: acme\.encode_s: .*valid number"):
        connect(store_codec="acme", codec_options={"acme": {"encode_s": "x"}})


def test_the_process_ends_at_once_although_much_waits_to_be_encoded(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect(
        form=FORM,
        store_codec="acme",
        codec_options={"acme": {"encode_s": 1.0}},
        cache_linger_s=0,
    )
    for number in range(15):
        store(client, bytes([number]) * 32)
    pid = client.stats().pid
    client.close()
    eventually(lambda: not Path(f"/proc/{pid}").exists())
