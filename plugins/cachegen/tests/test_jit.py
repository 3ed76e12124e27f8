"""What the compiler does without a cache on disk."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.processes import run

FULL = """
import logging, resource, signal, sys
from lmcache_kit_cachegen.jit import jit

def twice(n):
    return 2 * n

def four_times(n):
    return 2 * doubled(n)

logging.basicConfig(format="%(message)s", stream=sys.stdout)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
doubled, redoubled = jit(twice), jit(four_times)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # each write to a file fails, as on a full disk
print(redoubled(3), doubled(5))
"""


def test_a_full_cache_folder_costs_a_warning_and_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FULL)
    environ = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = run(sys.executable, str(script), environ=environ)
    assert done.stdout.endswith("12 10\n"), done.stderr
    assert done.stdout.count("cannot be written (File too large)") == 1
