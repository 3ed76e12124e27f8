"""Routes of plugins: served, described and refused as the built-in ones are."""

from __future__ import annotations

import logging
import sys

import pytest
from lmcache_kit_http_api.frontend import HttpFrontend
from lmcache_kit_http_api.options import HttpOptions
from openapi_spec_validator import validate

from lmcache_kit.errors import DuplicateName
from lmcache_kit.interfaces import ServesRoutes
from lmcache_kit.plugins import Plugins
from lmcache_kit.plugins.routes import load_routes
from tests.support.sites import FakeSite

TENANTS = """
@hookimpl
def register_routes():
    return [
        RouteSpec("who", "acme_tenants_api:who", "Name the instance at an address", method="POST",
                  path="/tenants", request="acme_tenants_api:Who", reply="acme_tenants_api:Reply"),
        RouteSpec("list", "acme_tenants_api:everyone", "List tenants", method="GET",
                  path="/tenants", reply="acme_tenants_api:Reply"),
        RouteSpec("drop", "acme_tenants_api:drop", "Drop a tenant", method="DELETE",
                  path="/tenants/{name}", request="acme_tenants_api:Drop",
                  reply="acme_tenants_api:Reply"),
    ]
"""
API = """
from pydantic import BaseModel, ConfigDict
from lmcache_kit.errors import UnknownName

class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

class Who(Asked):
    ip: str

class Drop(Asked):
    name: str
    force: bool = False

class Anything(Asked):
    anything: str

class Reply(BaseModel):
    told: str

async def who(controller, request):
    return Reply(told=", ".join(await controller.instances.at_address(request.ip)))

async def everyone(controller, request):
    return Reply(told=repr(request))

async def drop(controller, request):
    if request.name == "nobody":
        raise UnknownName("tenant", request.name, ["a", "b"])
    if request.name == "bad":
        raise ZeroDivisionError("the secret is 42")
    if request.name == "exit":
        raise SystemExit(3)
    if request.name == "odd":
        return {"told": "a dict"}
    return Reply(told=f"{request.name} {request.force}")
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield FakeSite(tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("acme"):
            del sys.modules[name]


def routes():
    """All routes that are installed; none may be broken."""
    plugins = Plugins.load(environ={})
    loaded = load_routes(plugins)
    assert plugins.failures == []
    return loaded


@pytest.fixture
async def tenants(site, serve):
    """A client of a frontend with the routes of the plugin ``acme_tenants``."""
    site.install("acme-tenants", TENANTS)
    site.module("acme_tenants_api", API)

    async def start(**options):
        return await serve(routes(), **options)

    return start


def test_the_frontend_serves_routes(controller):
    assert isinstance(HttpFrontend(controller, HttpOptions()), ServesRoutes)


async def test_a_route_of_a_plugin_is_served_with_the_controller(tenants):
    client = await tenants()
    assert await client.post("/tenants", {"ip": "10.0.0.7"}) == (200, {"told": "here"})
    assert client.last.headers["Server"] == "lmcache-kit"


async def test_one_path_of_a_plugin_may_have_several_methods(tenants):
    client = await tenants()
    assert await client.send("GET", "/tenants") == (200, {"told": "None"})
    status, reply = await client.send("PUT", "/tenants")
    assert (status, reply["error"]["code"]) == (405, "method_not_allowed")
    assert client.last.headers["Allow"] == "GET, HEAD, POST"


async def test_fields_come_from_path_and_query_where_there_is_no_body(tenants):
    client = await tenants()
    assert await client.send("DELETE", "/tenants/a?force=true") == (200, {"told": "a True"})
    status, reply = await client.send("DELETE", "/tenants/a?fast=1")
    assert (status, reply["error"]["message"]) == (422, "fast: unknown field")


async def test_a_request_is_parsed_as_strictly_as_any(tenants):
    client = await tenants()
    assert (await client.error("/tenants", {}))[2] == "ip: required, and missing"
    assert (await client.error("/tenants", {"ip": 7}))[0] == 422
    assert (await client.error("/tenants", b"{"))[:2] == (400, "invalid_json")
    assert (await client.error("/tenants", b""))[:2] == (400, "missing_body")


async def test_an_error_of_the_kit_has_its_status(tenants):
    client = await tenants()
    status, reply = await client.send("DELETE", "/tenants/nobody")
    assert (status, reply["error"]["code"]) == (404, "unknown_tenant")
    assert reply["error"]["hint"] == "Known: a, b"


@pytest.mark.parametrize("name", ["bad", "exit", "odd"])
async def test_a_defect_of_a_plugin_is_logged_with_its_name_and_harms_nobody(tenants, name, caplog):
    client = await tenants()
    with caplog.at_level(logging.ERROR):
        status, reply = await client.send("DELETE", f"/tenants/{name}")
    assert (status, reply["error"]["code"]) == (500, "internal_error")
    assert "'drop' of plugin 'acme_tenants' of acme-tenants" in reply["error"]["message"]
    assert "secret" not in str(reply)
    assert "plugin 'acme_tenants' of acme-tenants failed" in caplog.text
    assert (await client.post("/lookup", {"tokens": [1]}))[0] == 200


async def test_a_route_of_a_plugin_asks_for_the_token(tenants):
    client = await tenants(token="s3cret")
    assert (await client.send("GET", "/tenants"))[0] == 401


async def test_without_a_token_web_pages_are_refused(tenants):
    client = await tenants()
    headers = {"Origin": "http://example.com"}
    assert (await client.send("GET", "/tenants", headers=headers))[0] == 403


async def test_limits_on_bodies_hold(tenants):
    client = await tenants(max_body_bytes=10)
    assert (await client.error("/tenants", {"ip": "10.0.0.7"}))[:2] == (413, "body_too_large")


async def test_the_document_has_the_routes_of_plugins(tenants):
    client = await tenants()
    _, document = await client.send("GET", "/openapi.json")
    validate(document)
    asked = document["paths"]["/tenants"]["post"]
    assert asked["operationId"] == "acme_tenants.who"
    schema = asked["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/Who"}
    parameters = document["paths"]["/tenants/{name}"]["delete"]["parameters"]
    assert [(each["name"], each["in"]) for each in parameters] == [
        ("name", "path"),
        ("force", "query"),
    ]
    assert "/lookup" in document["paths"]


async def test_the_document_tells_models_of_one_name_apart(site, serve):
    site.install(
        "acme-twin",
        """
        @hookimpl
        def register_routes():
            return [RouteSpec("twin", "acme_twin_api:twin", "Twin", method="POST", path="/twin",
                              request="acme_twin_api:LookupRequest", reply="acme_twin_api:Reply")]
        """,
    )
    site.module("acme_twin_api", API.replace("Who", "LookupRequest").replace("who", "twin"))
    client = await serve(routes())
    _, document = await client.send("GET", "/openapi.json")
    validate(document)

    def fields(path):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        return set(document["components"]["schemas"][name]["properties"])

    assert fields("/twin") == {"ip"}
    assert "tokens" in fields("/lookup")


async def test_requests_are_counted_by_the_path_of_the_plugin(tenants):
    client = await tenants()
    await client.send("DELETE", "/tenants/a")
    async with client.session.get(client.base + "/metrics") as response:
        text = await response.text()
    line = 'lmcache_kit_http_requests_total{method="DELETE",route="/tenants/{name}",status="200"} 1'
    assert line in text


@pytest.mark.parametrize(
    ("method", "path", "taken"),
    [
        ("POST", "/lookup", "POST /lookup"),
        ("GET", "/lookup", "POST /lookup"),
        ("GET", "/events/mine", "GET /events/{event_id}"),
        ("GET", "/{anything}", "POST /lookup"),
    ],
)
def test_a_path_that_is_built_in_is_an_error_that_names_both(site, controller, method, path, taken):
    site.install("acme-thief", one_route(method, path))
    site.module("acme_tenants_api", API)
    frontend = HttpFrontend(controller, HttpOptions())
    with pytest.raises(DuplicateName) as caught:
        frontend.add_routes(routes())
    assert caught.value.message == (
        f"route {method} {path} of plugin 'acme_thief' of acme-thief collides with {taken} of "
        "the frontend http"
    )
    assert "LMCACHE_KIT_PLUGINS=-acme_thief" in caught.value.hint


def test_two_plugins_with_one_path_are_both_named(site, controller):
    site.install("acme-one", one_route("GET", "/mine", "one"))
    site.install("acme-two", one_route("GET", "/mine", "two"))
    site.module("acme_tenants_api", API)
    frontend = HttpFrontend(controller, HttpOptions())
    with pytest.raises(DuplicateName, match=r"acme-two collides with .* of acme-one"):
        frontend.add_routes(routes())


def one_route(method, path, name="thief"):
    request = 'request="acme_tenants_api:Anything", ' if "{" in path else ""
    return f"""
    @hookimpl
    def register_routes():
        return [RouteSpec("{name}", "acme_tenants_api:everyone", "Mine", method="{method}",
                          path="{path}", {request}reply="acme_tenants_api:Reply")]
    """
