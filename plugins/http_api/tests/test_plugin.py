"""The entry point: found by the kit, and light."""

from __future__ import annotations

import subprocess
import sys

from lmcache_kit_http_api.frontend import HttpFrontend
from lmcache_kit_http_api.options import HttpOptions

from lmcache_kit.interfaces.frontend import Frontend
from lmcache_kit.plugins import Plugins


def test_the_kit_finds_the_frontend_by_name():
    plugins = Plugins.load(environ={"LMCACHE_KIT_PLUGINS": "http_api"})
    assert plugins.resolve("frontend", "http") is HttpFrontend
    assert issubclass(HttpFrontend, Frontend)
    assert plugins.spec("frontend", "http").config == "lmcache_kit_http_api.options:HttpOptions"


def test_the_options_have_defaults_that_protect():
    options = HttpOptions()
    assert (options.host, options.port, options.insecure) == ("localhost", 9000, False)


def test_the_declaration_imports_nothing_heavy():
    script = (
        "import sys, lmcache_kit_http_api.plugin as p; p.register_frontends();"
        "print(*{'aiohttp', 'pydantic', 'prometheus_client', 'torch'} & set(sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.strip() == ""
