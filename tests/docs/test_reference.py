"""The reference has everything that there is, by the code's own lists."""

from __future__ import annotations

import inspect
import re

import click
import pytest
from click.testing import CliRunner
from lmcache_kit_http_api.openapi import document
from lmcache_kit_http_api.routes import ROUTES

from lmcache_kit import errors, hookspecs, interfaces, specs
from lmcache_kit.cli.app import BUILTINS, app
from lmcache_kit.config.lmcache import UNSERVED
from lmcache_kit.config.load import declarations
from lmcache_kit.config.model import ALIASES, KEYS
from lmcache_kit.plugins import Plugins
from tools.docs import reference, source


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference.pages()


def sections(page: str) -> dict[str, str]:
    """Text by anchor, up to the next heading that has one."""
    parts = re.split(r"^##+ .*\{#(.+)\}$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(page: str) -> dict[str, str]:
    """Rows of tables, by the name in their first cell."""
    found = re.findall(r"^\| (?:<a id='\w+'></a>)?\[?`([^`]+)`(.*)$", page, flags=re.MULTILINE)
    return dict(found)


def test_every_hook_has_its_arguments_and_what_is_said_of_it(pages: dict[str, str]) -> None:
    shown = sections(pages["reference/hooks.md"])
    hooks = [
        each
        for _, each in inspect.getmembers(hookspecs, inspect.isfunction)
        if hasattr(each, f"{hookspecs.PROJECT}_spec")
    ]
    assert hooks
    for hook in hooks:
        text = shown[hook.__name__]
        assert f"def {hook.__name__}(" in text
        assert all(name in text for name in inspect.signature(hook).parameters)
        assert (inspect.getdoc(hook) or "?").split(".")[0].split("``")[0] in text


def test_every_declaration_has_its_fields(pages: dict[str, str]) -> None:
    shown = sections(pages["reference/hooks.md"])
    declared = [each for name, each in inspect.getmembers(specs) if name.endswith("Spec")]
    own = [each for each in declared if getattr(each, "__module__", "") == specs.__name__]
    named = [each for each in own if inspect.isclass(each) and each.__name__[0] != "_"]
    assert len(named) >= len(specs.KINDS)
    for each in named:
        assert set(each.__dataclass_fields__) == set(rows(shown[each.__name__]))


@pytest.mark.parametrize("name", interfaces.__all__)
def test_every_interface_has_its_methods_and_fields(pages: dict[str, str], name: str) -> None:
    told = "".join(pages[source.page_of(module)] for module in source.MODULES)
    shown = sections(told)
    assert name in shown
    interface = getattr(interfaces, name)
    if not inspect.isclass(interface):
        return
    own = [key for key in vars(interface) if not key.startswith("_")]
    fields = set(inspect.get_annotations(interface))
    for key in {*own, *fields}:
        assert f"{name}.{key}" in shown or key in rows(shown[name]), key


def test_every_public_class_of_the_interfaces_is_in_the_index(pages: dict[str, str]) -> None:
    listed = rows(pages["reference/interfaces/index.md"])
    there = {
        name
        for module in source.MODULES
        for name, each in inspect.getmembers(module, inspect.isclass)
        if each.__module__ == module.__name__ and not name.startswith("_")
    }
    assert set(listed) == there


def test_every_error_has_its_place_in_the_tree_and_its_meaning(pages: dict[str, str]) -> None:
    page = pages["reference/errors.md"]
    there = {
        name
        for name, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, errors.KitError)
    }
    assert set(rows(page)) == there
    tree = page.split("```")[1]
    assert set(re.findall(r"^[ |+-]*([A-Z]\w+)", tree, flags=re.MULTILINE)) == there


def test_errors_have_the_status_that_rest_answers(pages: dict[str, str]) -> None:
    shown = rows(pages["reference/errors.md"])
    assert shown["NoWorker"].endswith("| 503 `no_worker` |")
    assert shown["UnknownName"].endswith("| 404 `unknown_...` |")
    assert shown["CodecError"].endswith("|  |")


def test_every_key_has_its_type_variable_default_and_meaning(pages: dict[str, str]) -> None:
    shown = rows(pages["reference/configuration.md"])
    keys = {each.name: each for each in declarations(Plugins.load())}
    assert list(shown) == list(keys)
    for name, key in keys.items():
        variable, kind, _default, scope, meaning = (
            cell.strip() for cell in shown[name].split(" | ")
        )
        assert f"`LMCACHE_{name.upper()}`" in variable
        assert kind
        assert "anything" not in kind
        assert scope == key.scope
        assert meaning.startswith(key.help)


def test_every_option_of_a_plugin_has_its_type_and_meaning(pages: dict[str, str]) -> None:
    shown = sections(pages["reference/options.md"])
    assert {"LocalDiskBackend", "ValkeyBackend", "nixl"} <= shown.keys()
    for name, text in shown.items():
        assert rows(text), name
        for option, row in rows(text).items():
            kind, *_default, meaning = row.removeprefix(" | ").removesuffix(" |").split(" | ")
            assert kind.strip(), (name, option)
            assert meaning.strip(), (name, option)


def test_every_key_of_lmcache_has_its_fate(pages: dict[str, str]) -> None:
    page = pages["reference/lmcache_keys.md"]
    told = set(re.findall(r"`(\w+)`", page))
    assert told >= {*KEYS, *UNSERVED, *ALIASES, "local_disk", "remote_url", "nixl_backends"}


def test_every_route_has_its_fields_reply_and_errors(pages: dict[str, str]) -> None:
    page = pages["reference/rest.md"]
    shown = sections(page)
    told = document(ROUTES)
    assert set(re.findall(r"^## `(\w+ /\S*)`", page, flags=re.MULTILINE)) == {
        f"{route.method} {route.path}" for route in ROUTES
    }
    for route in ROUTES:
        text = shown[route.handler.__name__]
        fields = route.request.model_fields.items() if route.request else ()
        wanted = {field.alias or name for name, field in fields}
        assert set(rows(text)) == wanted
        statuses = told["paths"][route.path][route.method.lower()]["responses"]
        assert set(re.findall(r"`(\d+)`", text.partition("Errors:")[2])) == set(statuses) - {"200"}
        reply = route.reply if isinstance(route.reply, str) else route.reply.__name__
        assert reply in text


def test_every_field_of_every_reply_is_there(pages: dict[str, str]) -> None:
    shown = sections(pages["reference/rest.md"])
    for route in ROUTES:
        if not isinstance(route.reply, str):
            assert set(rows(shown[route.reply.__name__])) == set(route.reply.model_fields)


def test_every_command_has_every_option_that_help_shows(pages: dict[str, str]) -> None:
    shown = sections(pages["reference/cli.md"])
    offered = [offer.spec.name for offer in Plugins.load().specs("command")]
    for name in [*BUILTINS, *offered]:
        assert any(f"{words}-".startswith(f"lmcache-kit-{name}-") for words in shown), name
    for words, text in shown.items():
        path = next(path for path in _paths() if words == "-".join(("lmcache-kit", *path)))
        told = CliRunner().invoke(app, [*path, "--help"], catch_exceptions=False).output
        options = set(re.findall(r"^\s+(?:-\w, )?(--[\w-]+)", told, flags=re.MULTILINE))
        assert options - {"--help"} == set(re.findall(r"^\| `(--[\w-]+)", text, flags=re.MULTILINE))


def _paths() -> list[tuple[str, ...]]:
    """The words after ``lmcache-kit`` of every command."""
    found: list[tuple[str, ...]] = []

    def walk(command: click.Command, path: tuple[str, ...]) -> None:
        if not isinstance(command, click.Group):
            found.append(path)
            return
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            walk(inner, (*path, name))

    walk(app, ())
    return found


def test_what_docstrings_are_written_in_becomes_markdown() -> None:
    text = source.prose(
        "Ask :meth:`~lmcache_kit.interfaces.Backend.put` of :class:`Codec`, ``a |\n    b``.\n\n"
        "    >>> 1 + 1\n    2\n",
        "reference/interfaces/backend.md",
    )
    assert "[`Backend.put`](#Backend.put)" in text
    assert "[`Codec`](../../reference/interfaces/codec.md#Codec)" in text
    assert "`a | b`" in text
    assert "```pycon\n>>> 1 + 1\n2\n```" in text
