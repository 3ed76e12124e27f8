"""The frontend and its plugin keep the kit's contracts."""

from __future__ import annotations

import aiohttp
import pytest
from lmcache_kit_http_api.frontend import HttpFrontend
from lmcache_kit_http_api.options import HttpOptions

from lmcache_kit.testing import FrontendSuite, PluginSuite, Refused


class TestHttpFrontend(FrontendSuite):
    @pytest.fixture
    def make_frontend(self):
        def make(controller, endpoint):
            port = int(endpoint.rpartition(":")[2]) if endpoint else 0
            return HttpFrontend(controller, HttpOptions(host="127.0.0.1", port=port))

        return make

    async def ask(self, endpoint):
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{endpoint}/health", json={"instance_id": "here"}) as response,
        ):
            if response.status != 200:
                raise Refused(await response.text())
            return await response.json()


class TestPlugin(PluginSuite):
    distribution = "lmcache-kit-http-api"
