"""The OpenAPI 3.1 document, generated from the table of routes and its models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from lmcache_kit_http_api.models import ErrorReply, Reply
from lmcache_kit_http_api.operations import Raw
from lmcache_kit_http_api.routes import ROUTES, Route

if TYPE_CHECKING:
    from pydantic import BaseModel

_SCHEMAS = "#/components/schemas/"
_READING_ERRORS = (400, 408, 413, 422)
_EVERY_ROUTE_ERRORS = (401, 403, 500)


@cache
def render() -> Raw:
    """The document of this frontend as JSON."""
    return Raw(json.dumps(document(ROUTES)).encode(), "application/json")


def document(routes: Sequence[Route[Any]]) -> dict[str, Any]:
    """The document of these routes."""
    models: list[type[BaseModel]] = [ErrorReply]
    for route in routes:
        asked = route.request if route.source == "body" else None
        models += [m for m in (asked, route.reply) if isinstance(m, type)]
    _, definitions = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)],
        ref_template=_SCHEMAS + "{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lmcache-kit controller",
            "version": "1",
            "description": "Find and operate the KV cache of LLM serving instances.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _operation(route: Route[Any]) -> dict[str, Any]:
    errors = set(route.errors) | {500}
    if not route.open:
        errors |= set(_EVERY_ROUTE_ERRORS)
    shown: dict[str, Any] = {
        "operationId": route.operation.__name__,
        "summary": route.summary,
        "responses": {"200": {"description": "OK", "content": _content(route.reply)}},
    }
    if route.request is not None and route.source == "url":
        errors.add(422)
        shown["parameters"] = _parameters(route)
    elif route.request is not None:
        errors |= set(_READING_ERRORS)
        shown["requestBody"] = {"required": True, "content": _content(route.request)}
    if route.open:
        shown["security"] = [{}]
    for status in sorted(errors):
        shown["responses"][str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": _content(ErrorReply),
        }
    return shown


def _parameters(route: Route[Any]) -> list[dict[str, Any]]:
    """Names in the path, and parameters of the query; none of those is required."""
    fields = route.request.model_json_schema()["properties"] if route.request else {}
    shown = []
    for name, schema in fields.items():
        in_path = f"{{{name}}}" in route.path
        where: dict[str, Any] = {"name": name, "in": "path" if in_path else "query"}
        if in_path:
            where["required"] = True
        shown.append({**where, "schema": schema})
    return shown


def _content(what: type[Reply] | str) -> dict[str, Any]:
    if isinstance(what, str):
        kind = "object" if what == "application/json" else "string"
        return {what: {"schema": {"type": kind}}}
    return {"application/json": {"schema": {"$ref": _SCHEMAS + what.__name__}}}
