"""Routes of plugins: loaded each on its own, failures as data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.plugins import Plugins
from lmcache_kit.plugins.routes import load_routes

if TYPE_CHECKING:
    from tests.support.sites import FakeSite

ROOT = Path(__file__).parent.parent
SELECTION = ",".join(f"-{folder.name}" for folder in (ROOT / "plugins").iterdir())
GOOD = """
@hookimpl
def register_routes():
    return [RouteSpec("{name}", "acme_api:answer", "Answer", method="{method}", path="{path}",
                      request="{request}", reply="acme_api:Reply")]
"""
API = """
from pydantic import BaseModel, ConfigDict

class Asked(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    name: str

class Shapeless(Asked):
    which: type(lambda: 0)

class Reply(BaseModel):
    told: str

async def answer(controller, request):
    return Reply(told=request.name)
"""


def good(
    name: str = "answer",
    method: str = "POST",
    path: str = "/answers",
    request: str = "acme_api:Asked",
) -> str:
    return GOOD.format(name=name, method=method, path=path, request=request)


def load() -> tuple[list[str], Plugins]:
    """Names of the routes that can be served; this repository's own plugins are kept out."""
    plugins = Plugins.load(environ={"LMCACHE_KIT_PLUGINS": SELECTION})
    return [route.name for route in load_routes(plugins)], plugins


def test_a_route_is_loaded_with_its_models_and_its_owner(site: FakeSite) -> None:
    site.install("acme-answers", good(path="/answers/{name}", method="GET"))
    site.module("acme_api", API)
    (route,) = load_routes(Plugins.load(environ={"LMCACHE_KIT_PLUGINS": SELECTION}))
    assert (route.method, route.path, route.summary) == ("GET", "/answers/{name}", "Answer")
    assert (route.plugin, route.distribution) == ("acme_answers", "acme-answers")
    assert route.request is not None
    assert (route.request.__name__, route.reply.__name__) == ("Asked", "Reply")


@pytest.mark.parametrize(
    ("plugin", "api", "reason"),
    [
        (good(), "1 / 0", "ZeroDivisionError: division by zero"),
        (good(), API.replace("async def", "def"), "acme_api:answer is no 'async def'"),
        (good(), API.replace("answer(", "other("), "failed to import 'acme_api:answer'"),
        (good(request="acme_api:None_"), API, "has no attribute 'None_'"),
        (good(request="acme_api:answer"), API, "acme_api:answer is no pydantic model"),
        (good(request="acme_api:Shapeless"), API, "PydanticInvalidForJsonSchema"),
        (good(method="FETCH"), API, "method 'FETCH' is none of GET, POST, PUT, DELETE"),
        (good(path="answers"), API, "'answers' is no path"),
        (good(path="/answers/"), API, "'/answers/' is no path"),
        (good(path="/answers/{name:.*}"), API, "is no path"),
        (good(path="/answers/{id}"), API, "'id' in '/answers/{id}' is no field of the request"),
        (good(path="/{name}/{name}"), API, "'name' in '/{name}/{name}'"),
        (good(path="/{name}", request=""), API, "'name' in '/{name}' is no field"),
    ],
)
def test_a_route_that_cannot_be_served_is_a_failure_and_harms_nobody(
    site: FakeSite, plugin: str, api: str, reason: str
) -> None:
    site.install("acme-bad", plugin)
    site.module("acme_api", api)
    site.install("acme-well", good("well", path="/well").replace("acme_api", "acme_well_api"))
    site.module("acme_well_api", API)
    names, plugins = load()
    assert names == ["well"]
    (failure,) = plugins.failures
    assert (failure.plugin, failure.distribution) == ("acme_bad", "acme-bad")
    assert failure.stage == "register_routes"
    assert failure.error.startswith("route 'answer': ")
    assert reason in failure.error


def test_a_declaration_with_no_target_for_its_reply_is_a_failure(site: FakeSite) -> None:
    site.install("acme-bad", good().replace("acme_api:Reply", "Reply"))
    names, plugins = load()
    assert names == []
    assert plugins.failures[0].error == "'answer': 'Reply' is no 'module:attribute'"


def test_a_probe_that_gives_a_reason_keeps_its_route_out(site: FakeSite) -> None:
    site.install("acme-bad", good().replace("method=", "probe='acme_api:why', method="))
    site.module("acme_api", API + "\ndef why(): return 'no tenants here'\n")
    names, plugins = load()
    assert names == []
    assert "no tenants here" in plugins.failures[0].error


def test_of_two_routes_of_one_name_none_is_served(site: FakeSite) -> None:
    site.install("acme-one", good(path="/one"))
    site.install("acme-two", good(path="/two"))
    site.module("acme_api", API)
    names, plugins = load()
    assert names == []
    assert [failure.stage for failure in plugins.failures] == ["name", "name"]
