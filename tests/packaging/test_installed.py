"""The core and the plugins, installed, used and uninstalled in clean environments."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.conftest import Make
from tests.packaging.distributions import CORE, EXAMPLE, PLUGINS, SOURCES
from tests.packaging.environments import Environment

pytestmark = pytest.mark.wheels

WAIT_S = 60
MAX_SHARE_OF_PYDANTIC = 3
HEAVY = ("torch", "vllm", "aiohttp", "nixl", "numpy", "zmq")
BROKEN = {
    "acme_half": "from lmcache_kit.hookspecs import hookimpl\n"
    "@hookimpl\ndef cache_closing(): pass\n@hookimpl\ndef report_header(nonsense): pass\n",
    "acme_raises": "raise OSError('libacme.so is missing')\n",
    "acme_typo": "from lmcache_kit.hookspecs import hookimpl\n@hookimpl\ndef headers(): pass\n",
}

MODULES = """
import sys
{imports}
print([name for name in {heavy} if name in sys.modules])
"""
CPU_TIME = """
import resource
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
before = used()
{imports}
print(used() - before)
"""
RESOLVED = """
import json, sys
from pkgutil import resolve_name
from lmcache_kit.errors import PluginBroken
from lmcache_kit.plugins import Plugins
from lmcache_kit.specs import KINDS
plugins, found = Plugins.load(), {}
for offer in [each for kind in KINDS for each in plugins.specs(kind)]:
    try:
        target = plugins.resolve(offer.kind, offer.spec.name)
        if offer.spec.config:
            resolve_name(offer.spec.config)()
        assert callable(target)
        found[offer.spec.name] = ""
    except PluginBroken as error:
        found[offer.spec.name] = str(error)
print(json.dumps(found))
"""


def imports_s(environment: Environment, imports: str) -> float:
    """Processor time of an import, at best."""
    code = CPU_TIME.format(imports=imports)
    return min(float(environment.python(code)) for _ in range(3))


def configuration(environment: Environment, text: str) -> Path:
    file = environment.folder / "kit.yaml"
    file.write_text(text.format(folder=environment.folder))
    return file


def put(site: Path, name: str, code: str, *requires: str) -> None:
    """A plugin that is not well, in a folder for the path."""
    info = site / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(code)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1"]
    lines += [f"Requires-Dist: {each}" for each in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "entry_points.txt").write_text(f"[lmcache_kit.v1]\n{name} = {name}\n")


# With the core alone.


@pytest.fixture(scope="module")
def core(environment: Make) -> Environment:
    return environment(CORE)


def test_the_core_alone_lists_no_plugin_and_says_what_to_install(core: Environment) -> None:
    assert core.run("lmcache-kit", "plugins").stdout == (
        "No plugins are installed. To store KV and to serve REST: "
        "pip install lmcache-kit-cpu-backend lmcache-kit-http-api\n"
    )


def test_the_controller_without_a_frontend_names_the_package_to_install(core: Environment) -> None:
    done = core.run("lmcache_controller")
    assert done.returncode != 0
    assert "pip install lmcache-kit-http-api" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["", "store_codec: cachegen\n"])
def test_a_configuration_whose_backend_is_missing_names_the_package_to_install(
    core: Environment, text: str
) -> None:
    file = configuration(core, f"chunk_size: 256\n{text}")
    done = core.run("lmcache-kit", "validate", str(file))
    assert done.returncode != 0
    assert "no backend 'LocalCPUBackend' is installed" in done.stderr
    assert "pip install lmcache-kit-cpu-backend" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_finds_what_is_missing(core: Environment) -> None:
    done = core.run("lmcache-kit", "doctor", "--json")
    remedies = {row["name"]: (row["state"], row["remedy"]) for row in json.loads(done.stdout)}
    assert done.returncode == 1
    missing = ("fail", "pip install lmcache-kit-cpu-backend")
    assert remedies["backend LocalCPUBackend"] == missing
    assert remedies["frontend http"] == ("warn", "pip install lmcache-kit-http-api")


@pytest.mark.parametrize(
    ("imports", "loaded"),
    [
        ("import lmcache_kit", []),
        ("import lmcache_kit.plugins", []),
        ("import lmcache_kit.config", ["pydantic"]),
        ("import lmcache_kit.cli", []),
        ("from lmcache_kit.plugins import Plugins; Plugins.load()", []),
    ],
)
def test_the_core_imports_nothing_heavy(core: Environment, imports: str, loaded: list[str]) -> None:
    code = MODULES.format(imports=imports, heavy=(*HEAVY, "pydantic"))
    assert core.python(code) == str(loaded)


def test_the_core_imports_about_as_fast_as_pydantic_alone(
    core: Environment, record_property: Callable[[str, object], None]
) -> None:
    """Which takes a tenth of a second where nothing else runs; so the core takes under 0.3 s."""
    ours = imports_s(core, "import lmcache_kit, lmcache_kit.plugins, lmcache_kit.config")
    pydantic = imports_s(core, "import pydantic; pydantic.BaseModel")
    record_property("core_import_s", ours)
    print(f"core, plugins and configuration: {ours:.3f} s; pydantic: {pydantic:.3f} s")
    assert ours < MAX_SHARE_OF_PYDANTIC * pydantic


def test_the_core_needs_no_more_than_it_requires(core: Environment) -> None:
    done = core.pip("check")
    assert done.returncode == 0, done.stdout
    assert core.python("import importlib.util as u; print(u.find_spec('torch'))") == "None"


# With one plugin.


@dataclass(frozen=True)
class Alone:
    """What was seen of a plugin beside the core and nothing else."""

    name: str
    environment: Environment
    rows: list[dict[str, str]]
    resolved: dict[str, str]


@pytest.fixture(scope="module", params=PLUGINS)
def alone(request: pytest.FixtureRequest, environment: Make) -> Alone:
    made = environment(CORE, request.param)
    return Alone(request.param, made, made.plugins(), json.loads(made.python(RESOLVED)))


def test_a_plugin_alone_is_listed_with_where_it_lies(alone: Alone) -> None:
    assert alone.rows
    site = alone.environment.site
    for row in alone.rows:
        assert row["distribution"] == alone.name
        assert row["state"] in ("ready", "unusable"), row["failure"]
        assert Path(row["path"]).is_relative_to(site / SOURCES[alone.name].package)


def test_what_a_plugin_offers_can_be_used_or_says_why_not(alone: Alone) -> None:
    assert alone.resolved.keys() == {row["name"] for row in alone.rows}
    for row in alone.rows:
        if row["state"] == "ready":
            assert alone.resolved[row["name"]] == ""
        else:
            assert row["failure"]
            assert row["failure"] in alone.resolved[row["name"]]


def test_a_plugin_alone_requires_all_that_it_needs(alone: Alone) -> None:
    done = alone.environment.pip("check")
    assert done.returncode == 0, done.stdout


# With all of them.


@dataclass
class Life:
    """What was seen while plugins came and went."""

    installed: list[dict[str, str]] = field(default_factory=list)
    healthz: int = 0
    status: dict[str, Any] = field(default_factory=dict)
    broken: list[dict[str, str]] = field(default_factory=list)
    broken_doctor: list[dict[str, str]] = field(default_factory=list)
    less: list[dict[str, str]] = field(default_factory=list)
    refused: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)
    none: list[dict[str, str]] = field(default_factory=list)


CONFIGURED = {
    "lmcache-kit-cachegen": "store_codec: cachegen",
    "lmcache-kit-disk-backend": "local_disk: {folder}/disk\nmax_local_disk_size: 0.01",
    EXAMPLE: "tiers: [SQLiteBackend]\n"
    "backend_options: {{SQLiteBackend: {{path: {folder}/kv.sqlite, max_size_gib: 0.01}}}}",
}
"""What a configuration says that asks for a plugin."""
SIZES = "max_local_cpu_size: 0.01\ncache_socket: {folder}/c.sock\n"


@pytest.fixture(scope="module")
def life(environment: Make) -> Life:
    made = environment(*SOURCES)
    seen = Life(installed=made.plugins(), healthz=_controller_health(made))
    seen.status = _cache_server_status(made)
    site = made.folder / "broken"
    for name, code in BROKEN.items():
        put(site, name, code)
    put(site, "acme_late", "raise AssertionError('imported')", "lmcache-kit>=9")
    seen.broken = made.plugins(PYTHONPATH=str(site))
    doctor = made.run("lmcache-kit", "doctor", "--json", PYTHONPATH=str(site))
    seen.broken_doctor = json.loads(doctor.stdout)
    made.uninstall(*CONFIGURED)
    seen.less = made.plugins()
    for name, text in CONFIGURED.items():
        file = configuration(made, SIZES + text)
        seen.refused[name] = made.run("lmcache-kit", "cache-server", "--config", str(file))
    made.uninstall(*(name for name in PLUGINS if name not in CONFIGURED))
    seen.none = made.plugins()
    return seen


def _controller_health(environment: Environment) -> int:
    command = ("lmcache_controller", "--port", "0", "--monitor-port", "0")
    with (
        environment.running(*command, until=r"http on (http://\S+:\d+)") as found,
        urllib.request.urlopen(f"{found[1]}/healthz", timeout=WAIT_S) as reply,
    ):
        return int(reply.status)


def _cache_server_status(environment: Environment) -> dict[str, Any]:
    """With all backends that ``CONFIGURED`` asks for."""
    example = CONFIGURED[EXAMPLE].replace("[", "[LocalDiskBackend, ")
    file = configuration(environment, f"{SIZES}{CONFIGURED['lmcache-kit-disk-backend']}\n{example}")
    command = ("lmcache-kit", "cache-server", "--config", str(file))
    with environment.running(*command, until="cache-server: instance"):
        done = environment.run(*command, "--status", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"files": {path.name for path in environment.folder.iterdir()}}


def distributions(rows: list[dict[str, str]]) -> set[str]:
    return {row["distribution"] for row in rows}


def test_all_plugins_are_there_together(life: Life) -> None:
    assert distributions(life.installed) == set(PLUGINS)
    assert "failed" not in {row["state"] for row in life.installed}


def test_the_controller_answers_where_there_is_no_torch(life: Life) -> None:
    assert life.healthz == 200


def test_a_cache_process_has_all_backends_that_its_configuration_names(life: Life) -> None:
    assert life.status["location"] == "LocalCPUBackend"
    assert {"disk", "kv.sqlite"} <= life.status["files"]


def test_broken_distributions_are_listed_and_harm_nobody(life: Life) -> None:
    failed = {row["name"]: row["failure"] for row in life.broken if row["state"] == "failed"}
    assert failed.keys() == {*BROKEN, "acme_late"}
    assert "nonsense" in failed["acme_half"]
    assert "OSError: libacme.so is missing" in failed["acme_raises"]
    assert "unknown hook 'headers'" in failed["acme_typo"]
    assert [row for row in life.broken if row["state"] != "failed"] == life.installed


def test_a_plugin_for_another_release_is_listed_with_what_to_do(life: Life) -> None:
    [row] = [row for row in life.broken if row["name"] == "acme_late"]
    [check] = [each for each in life.broken_doctor if each["name"] == "plugin acme_late"]
    for text in (row["failure"], check["detail"]):
        assert "it requires lmcache-kit>=9 and this is" in text
        assert "pip install -U lmcache-kit acme_late" in text
    assert check["state"] == "warn"


def test_what_is_uninstalled_is_gone_and_the_others_stay(life: Life) -> None:
    assert distributions(life.less) == set(PLUGINS) - CONFIGURED.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lmcache-kit-cachegen", "no codec 'cachegen' is installed. pip install {name}"),
        (
            "lmcache-kit-disk-backend",
            "no backend 'LocalDiskBackend' is installed. pip install {name}",
        ),
        (EXAMPLE, "no backend 'SQLiteBackend' is installed. Installed: LocalCPUBackend"),
    ],
)
def test_a_configuration_that_names_what_is_gone_is_refused_with_what_to_do(
    life: Life, name: str, message: str
) -> None:
    done = life.refused[name]
    assert done.returncode != 0
    assert message.format(name=name) in done.stderr
    assert "Traceback" not in done.stderr


def test_when_all_are_uninstalled_none_is_left(life: Life) -> None:
    assert life.none == []
