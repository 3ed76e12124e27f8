"""Values as shells, templates and people write them, and passwords that nobody gets to see."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lmcache_kit.cli.app import app
from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.config.entries import Entry, shown
from lmcache_kit.config.redaction import redacted
from lmcache_kit.config.values import read
from lmcache_kit.errors import ConfigError
from lmcache_kit.plugins import Plugins

if TYPE_CHECKING:
    from tests.support.sites import FakeSite

DISK = "LocalDiskBackend"
SERVER = "ValkeyBackend"


@cache
def installed() -> Plugins:
    return Plugins.load()


def disk(folder: str) -> str:
    """The folder that a variable sets."""
    environ = {"LMCACHE_LOCAL_DISK": folder, "LMCACHE_MAX_LOCAL_DISK_SIZE": "1"}
    loaded = load_config(environ=environ, plugins=installed())
    options = loaded.config.lower_tiers.get(DISK, {})
    return str(options.get("path", ""))


# Quotes, and what is not set.


@pytest.mark.parametrize(
    "text", ['"file:///kv"', "'/kv'", "\"'/kv'\"", ' "/kv" ', "'\"file:///kv\"'", '" /kv "']
)
def test_quotes_that_were_left_around_a_variable_are_taken_off(text: str) -> None:
    assert disk(text) == "/kv"


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("LMCACHE_CHUNK_SIZE", '"64"', "chunk_size", 64),
        ("LMCACHE_SAVE_DECODE_CACHE", "'True'", "save_decode_cache", True),
        ("LMCACHE_CONTROLLER_URL", "'localhost:1'", "controller_url", "localhost:1"),
        ("LMCACHE_LMCACHE_WORKER_PORTS", '"[8001, 8002]"', "lmcache_worker_ports", (8001, 8002)),
        ("LMCACHE_TIERS", '"A","B"', "tiers", ("A", "B")),
        ("LMCACHE_CODEC_OPTIONS", '\'{"x": {"a": 1}}\'', "codec_options", {"x": {"a": 1}}),
        ("LMCACHE_CODEC_OPTIONS", '"{"x": {"a": 1}}"', "codec_options", {"x": {"a": 1}}),
        ("LMCACHE_CODEC_OPTIONS", '"{\\"x\\": {\\"a\\": 1}}"', "codec_options", {"x": {"a": 1}}),
    ],
)
def test_quotes_are_taken_off_values_of_every_type(
    variable: str, text: str, key: str, value: object
) -> None:
    assert getattr(load_config(environ={variable: text}).config, key) == value


def test_quotes_around_the_name_of_the_file_are_taken_off(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("chunk_size: 16\n")
    environ = {"LMCACHE_CONFIG_FILE": f'"{tmp_path / "x.yaml"}"'}
    assert load_config(environ=environ).config.chunk_size == 16
    assert load_config(environ={"LMCACHE_CONFIG_FILE": "None"}).config == KitConfig()


def test_quotes_are_taken_off_the_variable_that_selects_plugins() -> None:
    found = Plugins.load(environ={"LMCACHE_KIT_PLUGINS": '"-disk_backend"'})
    assert [each.name for each in found.blocked] == ["disk_backend"]


@pytest.mark.parametrize("text", ["", " ", "null", "None", "NONE", '""', "''", '"null"', "'None'"])
def test_a_variable_that_is_not_set_leaves_the_file_in_force(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text("local_disk: /kv\nmax_local_disk_size: 1\nchunk_size: 16\n")
    environ = dict.fromkeys(("LMCACHE_LOCAL_DISK", "LMCACHE_CHUNK_SIZE", "LMCACHE_ENABLE_PD"), text)
    loaded = load_config(file=tmp_path / "x.yaml", environ=environ)
    assert loaded.config.lower_tiers[DISK]["path"] == "/kv"
    assert loaded.config.chunk_size == 16
    assert loaded.warnings == []


@pytest.mark.parametrize("text", ["None", "'null'", '""', "~", ""])
def test_what_a_template_left_unset_in_a_file_means_the_default(tmp_path: Path, text: str) -> None:
    keys = ("local_disk", "remote_url", "chunk_size", "store_codec", "lmcache_instance_id")
    (tmp_path / "x.yaml").write_text("".join(f"{key}: {text}\n" for key in keys))
    assert load_config(file=tmp_path / "x.yaml", environ={}).config == KitConfig()
    extra = {f"lmcache.{key}": "None" for key in keys}
    assert load_config(environ={}, extra=extra).config == KitConfig()


# Folders.


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("/var/cache/kv", "/var/cache/kv"),
        ("file:///var/cache/kv/", "/var/cache/kv"),
        ("~/kv", str(Path.home() / "kv")),
        ("/data,old/kv", "/data,old/kv"),
        ("false", ""),
    ],
)
def test_a_folder_is_absolute_or_the_users_or_a_url(text: str, folder: str) -> None:
    assert disk(text) == folder


@pytest.mark.parametrize(
    "text",
    [
        "kv",
        "./kv",
        "True",
        "1",
        "file:/kv",
        "file://kv/x",
        "file:kv",
        "s3://bucket/kv",
        "$HOME/kv",
        "${HOME}/kv",
        "/data/$USER/kv",
        "/a/,/b/",
        "file:///a/, file:///b/",
        "/a,~/b",
        "~nobody-has-this-name/kv",
    ],
)
def test_what_would_make_a_folder_that_nobody_means_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"folder|home directory"):
        read("folder", text)
    with pytest.raises(ConfigError, match=r"^local_disk: '.+' \(LMCACHE_LOCAL_DISK\): "):
        disk(text)


@pytest.mark.parametrize("value", [True, 5, ["/a", "/b"]])
def test_a_folder_that_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="a folder is expected"):
        load_config(
            environ={}, extra={"lmcache.local_disk": value, "lmcache.max_local_disk_size": 1}
        )


@pytest.mark.parametrize("path", ["x.sock", "./run/x.sock", "$HOME/x.sock", "file:///x.sock"])
def test_a_socket_below_the_working_directory_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"cache_socket: .* begins with / or ~/"):
        load_config(environ={"LMCACHE_CACHE_SOCKET": path})


# Passwords.

PASSWORDS = [
    "s3CR@ET",
    "s3CR/ET",
    "s3CR#ET",
    "s3CR%ET",
    "s3CR:ET",
    "s3CR?ET",
    "s3CR ET",
    "s3CR@:/ET",
]


def hides(text: str) -> bool:
    return "s3CR" not in text and "ET@" not in text


@pytest.mark.parametrize("password", ["s3CR/ET", "s3CR@#%:? ET"])
@pytest.mark.parametrize("command", ["show-config", "doctor", "validate"])
def test_no_command_shows_a_password(tmp_path: Path, command: str, password: str) -> None:
    url = f"redis://me:{password}@cache.invalid:6379"
    (tmp_path / "a.yaml").write_text(f"remote_url: '{url}'\n")
    options = {SERVER: {"url": url, "password": password, "ttl_s": "x"}}
    (tmp_path / "b.yaml").write_text(f"tiers: [{SERVER}]\nbackend_options: {json.dumps(options)}\n")
    for name in ("a.yaml", "b.yaml"):
        arguments = [command] if command == "doctor" else [command, str(tmp_path / name)]
        environ = {
            "LMCACHE_CONFIG_FILE": str(tmp_path / name),
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.01",
        }
        result = CliRunner().invoke(app, arguments, env=environ)
        assert hides(result.output + result.stderr), result.output + result.stderr


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("form", ["redis://me:{}@h:1", "me:{}@h:1", "redis:/:{}@h", "x://{}@"])
def test_no_error_shows_a_password(form: str, password: str) -> None:
    url = form.format(password)
    for environ in (
        {"LMCACHE_REMOTE_URL": url},
        {"LMCACHE_CHUNK_SIZE": f"redis://{url}"},
        {"LMCACHE_CONTROLLER_URL": url},
        {"LMCACHE_BACKEND_OPTIONS": json.dumps({SERVER: {"url": url}})},
        {"LMCACHE_BACKEND_OPTIONS": json.dumps({SERVER: {"url": url}})[:-1]},
    ):
        try:
            told = repr(load_config(environ=environ, plugins=installed()))
        except ConfigError as refused:
            told = str(refused)
        assert hides(told), told


@pytest.mark.parametrize("tag", ["!!int", "!!bool", "!!timestamp", "!secret", "!!python/name:"])
def test_a_value_of_a_wrong_type_is_not_shown_by_the_parser(tmp_path: Path, tag: str) -> None:
    (tmp_path / "x.yaml").write_text(f'remote_url: {tag} "redis://:s3CR@h"\n')
    with pytest.raises(
        ConfigError, match=r"x\.yaml:1: remote_url: (no value|could not)"
    ) as refused:
        load_config(file=tmp_path / "x.yaml", environ={})
    assert hides(str(refused.value))


@pytest.mark.parametrize("sign", "@/#%? é\\|")
def test_an_unescaped_password_is_told_how_to_escape(sign: str) -> None:
    url = f"redis://me:s3CR{sign}ET@cache.example:6379"
    with pytest.raises(ConfigError, match=r"must be escaped: %40 for @, %2F for /") as refused:
        load_config(environ={"LMCACHE_REMOTE_URL": url})
    assert "redis://***@cache.example:6379" in str(refused.value)


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_an_escaped_password_is_taken_whatever_is_in_it(password: str) -> None:
    url = f"redis://me:{quote(password, safe='')}@cache.example:6379"
    loaded = load_config(environ={"LMCACHE_REMOTE_URL": url}, plugins=installed())
    assert loaded.config.backend_options[SERVER]["url"] == url


@given(st.text(st.characters(codec="utf-8")))
def test_nothing_before_the_host_is_left_of_a_url(password: str) -> None:
    url = f"redis://me:{password}@cache.example:6379"
    assert redacted(url) == redacted(url, "remote_url") == "redis://***@cache.example:6379"
    assert redacted(f"see {url}") == "see redis://***@cache.example:6379"


@pytest.mark.parametrize(
    "url", ["redis://:s3CR", "redis://h?password=s3CR", "redis://h#s3CR", "redis://u:p@h?p=s3CR"]
)
def test_what_is_no_plain_address_is_hidden(url: str) -> None:
    assert hides(shown(Entry("remote_url", url, "x.yaml:1")))


def test_options_that_are_called_secret_are_hidden() -> None:
    hidden = ["password", "apiToken", "aws_secret_access_key", "tls_key", "credentials", "AUTH"]
    plain = ["max_tokens", "tag_keys", "password_file", "key_path", "ttl_s", "author"]
    given = {"Mine": dict.fromkeys([*hidden, *plain], "word") | {"nested": [{"pwd": 7}]}}
    assert redacted(given) == {
        "Mine": dict.fromkeys(hidden, "***")
        | dict.fromkeys(plain, "word")
        | {"nested": [{"pwd": "***"}]}
    }
    assert shown(Entry("x", {"password": "s3CR"}, "F:1")) == "x: {'password': '***'} (F:1)"
    assert shown(Entry("acme_password", "s3CR", "F:1")) == "acme_password: '***' (F:1)"


def test_a_path_of_a_key_file_is_shown() -> None:
    assert "'/c.key'" in shown(Entry("controller_key", "/c.key", "x"))


VAULT = """
@hookimpl
def register_backends():
    keys = (ConfigKey("acme_pin", option="pin", help="PIN", selects=True),)
    return [BackendSpec("Vault", "acme:a", "", config="acme_options:Options", keys=keys)]
"""
OPTIONS = """
from pydantic import BaseModel, Field, SecretStr
class Options(BaseModel):
    pin: SecretStr | None = Field(default=None, min_length=5)
"""


def test_what_a_plugin_declares_as_secret_is_hidden(site: FakeSite) -> None:
    site.install("acme-vault", VAULT)
    site.module("acme_options", OPTIONS)
    with pytest.raises(ConfigError, match=r"acme_pin: \*\*\* \(LMCACHE_ACME_PIN\): .*at least 5"):
        load_config(environ={"LMCACHE_ACME_PIN": "s3CR"})
    for environ in (
        {"LMCACHE_ACME_PIN": "s3CR@ET"},
        {"LMCACHE_TIERS": "Vault", "LMCACHE_BACKEND_OPTIONS": '{"Vault": {"pin": "s3CR@ET"}}'},
    ):
        result = CliRunner().invoke(app, ["show-config"], env=environ)
        assert result.exit_code == 0
        assert "'pin': '***'" in result.output
        assert hides(result.output)
