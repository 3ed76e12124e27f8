from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lmcache_kit_cpu_backend import backend as backend_module
from lmcache_kit_cpu_backend import prefault
from lmcache_kit_cpu_backend.backend import LocalCPUBackend
from lmcache_kit_cpu_backend.memory_limits import Available, available_memory, probe
from lmcache_kit_cpu_backend.prefault import AHEAD_BYTES

from lmcache_kit.errors import BackendError, ConfigError
from lmcache_kit.interfaces import MemoryBackend, Region
from tests.support.processes import open_files, run_python

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[LocalCPUBackend]:
    backend = LocalCPUBackend(capacity_bytes=4 * MIB)
    yield backend
    backend.close()


def test_another_mapping_of_the_same_memory_sees_what_is_written(memory: LocalCPUBackend) -> None:
    region = memory.allocate(5)
    assert region
    memory.view(region)[:] = b"hello"
    with mmap.mmap(memory.fd, 4 * MIB) as other:
        assert other[region.offset : region.offset + 5] == b"hello"
        other[region.offset] = ord("j")
    assert bytes(memory.view(region)) == b"jello"


@pytest.mark.parametrize("nbytes", [0, 4096, 8 * MIB])
def test_nobody_can_change_the_size_of_the_memory(memory: LocalCPUBackend, nbytes: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, nbytes)


def test_programs_that_the_process_starts_do_not_inherit_the_memory(
    memory: LocalCPUBackend,
) -> None:
    assert not os.get_inheritable(memory.fd)


def test_usage_shows_what_rounding_costs(memory: LocalCPUBackend) -> None:
    memory.allocate(1)
    memory.allocate(4097)
    usage = memory.usage()
    assert (usage.requested_bytes, usage.allocated_bytes) == (4098, 3 * 4096)
    assert usage.regions == 2
    assert usage.free_bytes == 4 * MIB - 3 * 4096


def test_usage_shows_how_much_free_memory_one_request_cannot_have(
    memory: LocalCPUBackend,
) -> None:
    quarters = [memory.allocate(MIB) for _ in range(4)]
    for region in (quarters[0], quarters[2]):
        assert region
        memory.free(region)
    usage = memory.usage()
    assert usage.largest_free_bytes == MIB
    assert usage.external_fragmentation == 0.5


def test_a_capacity_is_rounded_down_to_whole_pages() -> None:
    backend = LocalCPUBackend(capacity_bytes=3 * 4096 + 4095)
    assert backend.usage().capacity_bytes == os.fstat(backend.fd).st_size == 3 * 4096
    backend.close()


def resident(backend: LocalCPUBackend) -> int:
    return os.fstat(backend.fd).st_blocks * 512


def test_memory_is_taken_from_the_system_as_it_is_used_and_a_little_ahead() -> None:
    backend = LocalCPUBackend(capacity_bytes=1 << 30)
    assert resident(backend) == 0
    assert backend.allocate(10 * MIB)
    deadline = time.monotonic() + 30
    steady, before = 0, 0
    while (steady < 10 or before < AHEAD_BYTES) and time.monotonic() < deadline:
        time.sleep(0.02)
        now = resident(backend)
        steady, before = (steady + 1 if now == before else 0), now
    assert AHEAD_BYTES <= before <= AHEAD_BYTES + 16 * MIB
    backend.close()


def test_memory_that_is_used_again_takes_no_more_from_the_system() -> None:
    backend = LocalCPUBackend(capacity_bytes=8 * MIB)
    for _ in range(100):
        region = backend.allocate(MIB)
        assert region
        backend.view(region)[:] = bytes(MIB)
        backend.free(region)
    assert resident(backend) <= 8 * MIB
    backend.close()


def test_closing_right_after_the_first_use_leaves_no_thread() -> None:
    before = threading.active_count()
    backend = LocalCPUBackend(capacity_bytes=1 << 30)
    backend.allocate(MIB)
    backend.close()
    assert threading.active_count() == before


def test_a_system_that_cannot_touch_memory_ahead_serves_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefault, "MADV_POPULATE_WRITE", 9999)
    backend = LocalCPUBackend(capacity_bytes=8 * MIB)
    region = backend.allocate(4)
    assert region
    backend.view(region)[:] = b"fine"
    assert bytes(backend.view(region)) == b"fine"
    backend.close()


def test_a_region_that_was_freed_cannot_be_seen(memory: LocalCPUBackend) -> None:
    region = memory.allocate(10)
    assert region
    memory.free(region)
    with pytest.raises(ValueError, match="is not allocated"):
        memory.view(region)


def test_a_closed_backend_hands_nothing_out(memory: LocalCPUBackend) -> None:
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        memory.allocate(1)


def test_closing_leaves_views_that_are_still_held_readable() -> None:
    backend = LocalCPUBackend(capacity_bytes=MIB)
    region = backend.allocate(4)
    assert region
    view = backend.view(region)
    view[:] = b"kept"
    backend.close()
    assert bytes(view) == b"kept"


def test_closing_gives_the_descriptor_back() -> None:
    before = open_files()
    backend = LocalCPUBackend(capacity_bytes=MIB)
    backend.close()
    assert open_files() == before


@pytest.mark.parametrize("capacity_bytes", [-1, 0, 4095])
def test_a_capacity_below_a_page_is_refused(capacity_bytes: int) -> None:
    with pytest.raises(ConfigError, match=r"max_local_cpu_size .* smallest is 4096"):
        LocalCPUBackend(capacity_bytes=capacity_bytes)


def test_a_capacity_that_the_machine_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        backend_module, "available_memory", lambda: Available(2 << 30, "a limit of the test")
    )
    with pytest.raises(BackendError, match=r"max_local_cpu_size is 3\.00 GiB") as refusal:
        LocalCPUBackend(capacity_bytes=3 << 30)
    assert "2.00 GiB available (a limit of the test)" in str(refusal.value)
    assert "Set max_local_cpu_size to 1.6 or less" in refusal.value.hint


def test_the_real_machine_refuses_a_petabyte() -> None:
    with pytest.raises(BackendError, match="max_local_cpu_size"):
        LocalCPUBackend(capacity_bytes=1 << 50)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:  2000 kB\nMemAvailable:  1000 kB\n"


def test_without_limits_the_machine_has_what_its_kernel_says(tmp_path: Path) -> None:
    available = available_memory(machine(tmp_path, {"proc/meminfo": MEMINFO}))
    assert available == Available(1_024_000, "MemAvailable of /proc/meminfo")


def test_nobody_says_what_a_machine_without_proc_has(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_a_limit_of_an_enclosing_cgroup_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": "100\n",
            "sys/fs/cgroup/outer/memory.max": "5000\n",
            "sys/fs/cgroup/outer/memory.current": "4000\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 1000\ninactive_file 300\n",
        },
    )
    available = available_memory(root)
    assert available
    assert available.nbytes == 5000 - 4000 + 300
    assert available.source.endswith("sys/fs/cgroup/outer/memory.max")


def test_a_limit_of_the_older_cgroups_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/box\n0::/\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "6000\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 500\n",
        },
    )
    available = available_memory(root)
    assert available
    assert available.nbytes == 4500


def test_a_limit_of_an_older_cgroup_that_a_container_cannot_see_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/memory.stat": "hierarchical_memory_limit 7000\n",
        },
    )
    available = available_memory(root)
    assert available
    assert available.nbytes == 5000
    assert available.source.startswith("hierarchical_memory_limit in")


def test_a_limit_holds_where_the_usage_cannot_be_read(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "10\n"})
    available = available_memory(root)
    assert available
    assert available.nbytes == 10


def test_a_cgroup_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "10\n",
            "sys/fs/cgroup/memory.current": "20\n",
        },
    )
    available = available_memory(root)
    assert available
    assert available.nbytes == 0


def test_it_is_a_memory_backend(memory: LocalCPUBackend) -> None:
    assert isinstance(memory, MemoryBackend)
    assert memory.allocate(4 * MIB) == Region(0, 4 * MIB)


def test_it_works_on_this_machine() -> None:
    assert probe() == ""


def test_the_plugin_imports_nothing_heavy() -> None:
    program = (
        "import sys, lmcache_kit_cpu_backend.plugin as p;"
        "[spec] = p.register_backends(); assert spec.name == 'LocalCPUBackend';"
        "heavy = {'torch', 'pydantic', 'aiohttp', 'lmcache_kit_cpu_backend.backend'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    run_python(program)
