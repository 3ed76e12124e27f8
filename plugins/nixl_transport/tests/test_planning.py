"""How regions become transfers, and which RDMA devices count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmcache_kit_nixl_transport import rdma
from lmcache_kit_nixl_transport.batches import BATCH_BYTES, PART_BYTES, part_count, plan_batches

from lmcache_kit.interfaces import Region

from .conftest import regions

sizes = st.lists(st.one_of(st.integers(0, 1 << 20), st.integers(0, 3 * PART_BYTES)), max_size=30)


@given(sizes)
def test_every_byte_is_in_one_transfer(sizes):
    into, offered = regions(sizes), [Region(o + 7, n) for o, n in regions(sizes, gap=3)]
    pieces = [
        piece
        for batch in plan_batches(into, 1000, offered, 5000)
        for piece in zip(batch.numbers, batch.copies, strict=True)
    ]
    for number, region in enumerate(into):
        own = [copy for of, copy in pieces if of == number]
        assert len(own) == part_count(region)
        assert sum(copy.nbytes for copy in own) == region.nbytes
        at = 0
        for copy in own:
            assert copy.local == 1000 + region.offset + at
            assert copy.remote == 5000 + offered[number].offset + at
            at += copy.nbytes


@given(sizes)
def test_transfers_are_neither_too_large_nor_empty(sizes):
    for batch in plan_batches(regions(sizes), 0, regions(sizes), 0):
        total = sum(copy.nbytes for copy in batch.copies)
        assert 0 < total <= (BATCH_BYTES if len(batch.copies) > 1 else PART_BYTES)


def test_small_regions_go_together():
    small = regions([270_000] * 64)
    assert len(list(plan_batches(small, 0, small, 0))) == 3


@pytest.fixture
def sysfs(tmp_path):
    for device, port, state in [
        ("mlx5_0", "1", "4: ACTIVE"), ("mlx5_0", "2", "1: DOWN"),
        ("mlx5_1", "1", "1: DOWN"), ("mlx5_2", "1", "4: ACTIVE"),
    ]:  # fmt: skip
        folder = tmp_path / device / "ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        ({}, ("mlx5_0", "mlx5_2")),
        ({"UCX_NET_DEVICES": "mlx5_2:1"}, ("mlx5_2",)),
        ({"UCX_NET_DEVICES": "mlx5_0, eth0"}, ("mlx5_0",)),
        ({"UCX_NET_DEVICES": "lo"}, ()),
        ({"UCX_TLS": "tcp,cma"}, ()),
        ({"UCX_TLS": "rc_x,tcp"}, ("mlx5_0", "mlx5_2")),
        ({"UCX_TLS": "^tcp"}, ("mlx5_0", "mlx5_2")),
        ({"UCX_TLS": "^ib"}, ()),
    ],
)
def test_rdma_devices_count_if_active_and_not_left_out(sysfs, environ, devices):
    assert rdma.active_devices(sysfs, environ) == devices


def test_a_host_without_rdma_has_no_devices(tmp_path):
    assert rdma.active_devices(tmp_path / "nothing", {}) == ()
