"""The OpenAPI 3.1 document, generated from the table of routes and its models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic.json_schema import JsonSchemaMode, models_json_schema

from lmcache_kit_http_api.handlers import Document
from lmcache_kit_http_api.models import ErrorReply
from lmcache_kit_http_api.routes import Route

if TYPE_CHECKING:
    from pydantic import BaseModel

_READING_ERRORS = (400, 408, 413, 422)
_EVERY_ROUTE_ERRORS = (401, 403, 500)


_Schemas: TypeAlias = Mapping[Any, Any]
"""A reference to the schema of each model."""


def render(routes: Sequence[Route]) -> Document:
    """Render the document as JSON."""
    return Document(json.dumps(document(routes)).encode(), "application/json")


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Describe these routes. Two models of one name, of different plugins, stay apart."""
    models: list[type[BaseModel]] = [ErrorReply]
    for route in routes:
        asked = None if route.in_url else route.request
        models += [m for m in (asked, route.reply) if isinstance(m, type)]
    mode: JsonSchemaMode = "validation"
    references, definitions = models_json_schema(
        [(model, mode) for model in dict.fromkeys(models)],
        ref_template="#/components/schemas/{model}",
    )
    schemas = {model: schema for (model, _), schema in references.items()}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
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


def _operation(route: Route, schemas: _Schemas) -> dict[str, Any]:
    errors = set(route.errors) | {500}
    if not route.open:
        errors |= set(_EVERY_ROUTE_ERRORS)
    shown: dict[str, Any] = {
        "operationId": route.operation_id or route.handler.__name__,
        "summary": route.summary,
        "responses": {"200": {"description": "OK", "content": _content(route.reply, schemas)}},
    }
    if route.request is not None and route.in_url:
        errors.add(422)
        shown["parameters"] = _parameters(route)
    elif route.request is not None:
        errors |= set(_READING_ERRORS)
        shown["requestBody"] = {"required": True, "content": _content(route.request, schemas)}
    if route.open:
        shown["security"] = [{}]
    for status in sorted(errors):
        shown["responses"][str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": _content(ErrorReply, schemas),
        }
    return shown


def _parameters(route: Route) -> list[dict[str, Any]]:
    """List the names in the path, and the parameters of the query."""
    schema = route.request.model_json_schema() if route.request else {}
    required = schema.get("required", ())
    shown = []
    for name, field in schema.get("properties", {}).items():
        in_path = f"{{{name}}}" in route.path
        where: dict[str, Any] = {"name": name, "in": "path" if in_path else "query"}
        if in_path or name in required:
            where["required"] = True
        shown.append({**where, "schema": field})
    return shown


def _content(what: type[BaseModel] | str, schemas: _Schemas) -> dict[str, Any]:
    if isinstance(what, str):
        kind = "object" if what == "application/json" else "string"
        return {what: {"schema": {"type": kind}}}
    return {"application/json": {"schema": schemas[what]}}
