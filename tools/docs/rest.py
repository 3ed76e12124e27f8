"""The page of the REST interface: what ``GET /openapi.json`` says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from lmcache_kit_http_api.openapi import document
from lmcache_kit_http_api.routes import ROUTES

from tools.docs.source import prose, table

PAGE = "reference/rest.md"
HEAD = """# REST

What the frontend `http` serves; `GET /openapi.json` says the same to programs. Bodies are JSON.
[The plugin's page](../packages/http_api.md) has what is behind it: how operations go on, who may
call, the options. Every error is an [`ErrorReply`](#ErrorReply), with the codes that
[that page](../packages/http_api.md#errors) lists."""


def page() -> dict[str, str]:
    """Text by page."""
    shown = document(ROUTES)
    models: dict[str, Any] = shown["components"]["schemas"]
    routes = _routes(shown)
    rows = [(f"[`{name}`](#{route['operationId']})", route["summary"]) for name, route in routes]
    parts = [HEAD, table(("Route", "What it does"), rows)]
    for name, route in routes:
        parts += _route(name, route, models)
    statuses = sorted({status for _, route in routes for status in _errors(route)})
    meanings = [(f"`{status}`", HTTPStatus(int(status)).phrase) for status in statuses]
    parts += ["## Statuses {#statuses}", table(("Status", "Meaning"), meanings)]
    parts.append("## Replies {#replies}")
    requests = {_model(route.get("requestBody", {})) for _, route in routes}
    for name, model in models.items():
        if name not in requests:
            parts += [f"### `{name}` {{#{name}}}", prose(model.get("description")), _fields(model)]
    return {PAGE: "\n\n".join(part for part in parts if part) + "\n"}


def _routes(shown: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", route)
        for path, methods in shown["paths"].items()
        for method, route in methods.items()
    ]


def _route(name: str, route: dict[str, Any], models: dict[str, Any]) -> list[str]:
    parts = [f"## `{name}` {{#{route['operationId']}}}", route["summary"] + "."]
    if parameters := route.get("parameters"):
        rows = [(f"`{each['name']}`", each["in"], *_about(each["schema"])) for each in parameters]
        parts.append(table(("Parameter", "In", "Type", "Meaning"), rows))
    if asked := _model(route.get("requestBody", {})):
        parts.append(_fields(models[asked], asked=True))
    reply = _model(route["responses"]["200"])
    kind = next(iter(route["responses"]["200"]["content"]))
    parts.append(f"Reply: [`{reply}`](#{reply})" if reply else f"Reply: `{kind}`")
    if reply and "examples" in models[reply]:
        example = models[reply]["examples"][0].items()
        lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in example)
        parts.append(f"```json\n{{{lines}}}\n```")
    return [*parts, "Errors: " + ", ".join(f"`{each}`" for each in _errors(route))]


def _errors(route: dict[str, Any]) -> list[str]:
    return [status for status in route["responses"] if status != "200"]


def _model(content: dict[str, Any]) -> str:
    """Name of the model in a request's body or a reply; empty where there is none."""
    for each in content.get("content", {}).values():
        return str(each["schema"].get("$ref", "")).rpartition("/")[2]
    return ""


def _fields(model: dict[str, Any], *, asked: bool = False) -> str:
    required = model.get("required", [])
    rows = []
    for name, schema in model.get("properties", {}).items():
        kind, meaning = _about(schema)
        must = ("yes" if name in required else "",) if asked else ()
        rows.append((f"`{name}`", kind, *must, meaning))
    return table(("Field", "Type", *(("Required",) if asked else ()), "Meaning"), rows)


def _about(schema: dict[str, Any]) -> tuple[str, str]:
    """Type and meaning."""
    meaning = schema.get("description", "")
    if schema.get("default") not in (None, ""):
        meaning = f"{meaning} Default: `{json.dumps(schema['default'])}`.".strip()
    return kind_of(schema), meaning


def kind_of(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[`{name}`](#{name})"
    if "anyOf" in schema or "enum" in schema:
        values = [f"`{value}`" for value in schema.get("enum", ())]
        return " or ".join(values or map(kind_of, schema["anyOf"]))
    if "prefixItems" in schema:
        return f"list: {', '.join(map(kind_of, schema['prefixItems']))}"
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        return f"list of {kind_of(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind_of(schema['additionalProperties'])}"
    return kind + _limits(schema)


def _limits(schema: dict[str, Any]) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most"}
    said = [f"{word} {schema[key]}" for key, word in words.items() if key in schema]
    if "maxLength" in schema:
        said.append(f"{schema['maxLength']} characters at most")
    return f" ({', '.join(said)})" if said else ""
