"""/openapi.json, /metrics and the README say what the frontend does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lmcache_kit_http_api import models
from lmcache_kit_http_api.operation_models import LocatedFields
from lmcache_kit_http_api.options import HttpOptions
from lmcache_kit_http_api.parsing import field_names
from lmcache_kit_http_api.routes import ROUTES
from openapi_spec_validator import validate
from prometheus_client.parser import text_string_to_metric_families

PACKAGE = Path(models.__file__).parent
README = (Path(__file__).parents[1] / "README.md").read_text()
OPERATIONS = README.partition("## Operations")[2].partition("## ")[0]


async def document(client):
    status, reply = await client.send("GET", "/openapi.json")
    assert status == 200
    return reply


async def metrics(client):
    async with client.session.get(client.base + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        families = text_string_to_metric_families(await response.text())
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }


async def test_the_document_is_valid_openapi_3_1(client):
    reply = await document(client)
    assert reply["openapi"].startswith("3.1")
    validate(reply)


async def test_the_document_has_every_route_and_no_other(client):
    paths = (await document(client))["paths"]
    described = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert described == {(route.method, route.path) for route in ROUTES}


async def test_the_document_has_the_fields_and_their_limits(client):
    schemas = (await document(client))["components"]["schemas"]
    asked = schemas["LookupRequest"]
    assert asked["required"] == ["tokens"]
    assert asked["additionalProperties"] is False
    assert asked["properties"]["tokens"]["items"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": models.MAX_TOKEN,
    }
    assert schemas["LookupReply"]["additionalProperties"]["maxItems"] == 2


async def test_the_document_has_the_parameters_of_path_and_query(client):
    paths = (await document(client))["paths"]
    (named,) = paths["/events/{event_id}"]["get"]["parameters"]
    assert (named["name"], named["in"], named["required"]) == ("event_id", "path", True)
    found = {(each["name"], each["in"]) for each in paths["/pins"]["get"]["parameters"]}
    assert found == {("instance_id", "query"), ("location", "query")}


async def test_the_document_has_moves_as_they_are_asked_for(client):
    schemas = (await document(client))["components"]["schemas"]
    asked = schemas["MoveRequest"]
    assert asked["required"] == ["old_position", "new_position"]
    assert {"copy", "should_copy", "tokens", "model", "cache_salt"} < asked["properties"].keys()
    position = asked["properties"]["old_position"]
    assert (position["minItems"], position["maxItems"]) == (2, 2)
    transfer = schemas["TransferReply"]["properties"]
    assert set(transfer) == {"transport", "how", "bytes", "seconds", "gb_per_s"}
    operations = schemas["EventReply"]["properties"]
    assert {"old_position", "new_position"} < operations.keys()


async def test_the_document_describes_errors_in_the_one_shape(client):
    for methods in (await document(client))["paths"].values():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if status != "200":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorReply"}


async def test_requests_are_counted_by_route_and_status(client):
    await client.post("/lookup", {"tokens": [1]})
    await client.post("/lookup", {"tokens": [-1]})
    await client.post("/anything/" + "x" * 50, {})
    shown = await metrics(client)
    name = "lmcache_kit_http_requests_total"
    assert shown[name, ("method", "POST"), ("route", "/lookup"), ("status", "200")] == 1
    assert shown[name, ("method", "POST"), ("route", "/lookup"), ("status", "422")] == 1
    assert shown[name, ("method", "other"), ("route", "other"), ("status", "404")] == 1
    assert shown["lmcache_kit_http_request_seconds_count", ("route", "/lookup")] == 2


async def test_the_controllers_counters_are_shown_as_counters_and_gauges(client, controller):
    controller.values = {"lookups_total": 7, "keys": 3}
    shown = await metrics(client)
    assert shown["lmcache_kit_controller_lookups_total",] == 7
    assert shown["lmcache_kit_controller_keys",] == 3
    async with client.session.get(client.base + "/metrics") as response:
        text = await response.text()
    assert "# TYPE lmcache_kit_controller_lookups_total counter" in text
    assert "# TYPE lmcache_kit_controller_keys gauge" in text


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_the_readme_has_every_route_and_its_fields(route):
    named = f"`{route.method} {route.path}`"
    line = next(x for x in README.splitlines() if x.startswith("| `") and named in x.split("|")[1])
    common = set(LocatedFields.model_fields) if "those below" in line else set()
    for field in field_names(route.request) if route.request else []:
        assert f"`{field}`" in (OPERATIONS if field in common else "") + line


def test_the_readme_has_every_option():
    for option in HttpOptions.model_fields:
        assert re.search(rf"^\|[^|]*`{option}`", README, re.M), option


def test_the_readme_has_every_error_code():
    source = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
    codes = set(
        re.findall(r"(?:ApiError\(\s*\w+,\s*|ControlError, |\w+, \d{3}, )\"(\w+)\"", source)
    )
    assert len(codes) > 10
    assert {code for code in codes if f"`{code}`" not in README} == set()


def test_the_readme_has_every_reserved_key():
    assert all(f"`{key}`" in README for key in models.RESERVED_KEYS)
