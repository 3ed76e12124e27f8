"""What pytest loads wherever the kit is installed: so little that nobody notices.

It stands outside :mod:`lmcache_kit.testing`, because assertions are rewritten only in modules that
are imported after this has said so.
"""

from __future__ import annotations

import sys

import pytest

pytest.register_assert_rewrite("lmcache_kit.testing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a suite that was thinned out without a word, if there is one at all."""
    suite = sys.modules.get("lmcache_kit.testing.suite")
    if suite is not None:
        suite.check_items(items)
