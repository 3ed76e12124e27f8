"""The plugin in README.md is one: installed as it stands there, it works."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lmcache_kit.plugins import Plugins
from tests.conftest import FakeSite

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_plugin_in_the_readme_adds_its_eviction_policy(site: FakeSite) -> None:
    [(module, code)] = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", README, flags=re.DOTALL)
    assert f'{module} = "{module}"' in README
    site.install(module.replace("_", "-"), code)
    policy = Plugins.load(environ={}).eviction_policy(module)
    del sys.modules[module]
    for key in (b"1", b"2", b"3"):
        policy.added(key)
    policy.touched(b"1")
    policy.removed(b"2")
    assert list(policy.victims()) == [b"3", b"1"]
