"""Wheels of core and plugins, installed, used and uninstalled in a clean environment."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import urllib.request
import venv
import zipfile
from dataclasses import dataclass, field
from email import message_from_string
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheels

ROOT = Path(__file__).parents[2]
SOURCES = {"lmcache_kit": ROOT} | {
    f"lmcache_kit_{path.parent.name}": path.parent / "src"
    for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))
}
"""Package name to the folder that holds it."""
INSTALLED = ("lmcache_kit_cpu_backend", "lmcache_kit_http_api")
OLDEST_PLUGGY = "pluggy==1.6.0"
WAIT_S = 60
MAX_IMPORT_S = 0.3
HEAVY = ("torch", "vllm", "aiohttp", "nixl", "numpy", "zmq")

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
import lmcache_kit, lmcache_kit.plugins, lmcache_kit.config
print(used() - before)
"""


@dataclass
class Environment:
    """A virtual environment, away from the sources."""

    folder: Path

    def run(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environ() | environ,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def pip(self, *arguments: str) -> None:
        done = self.run("python", "-m", "pip", "--quiet", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    def python(self, code: str) -> str:
        done = self.run("python", "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def plugins(self) -> list[dict[str, str]]:
        rows: list[dict[str, str]] = json.loads(self.run("lmcache-kit", "plugins", "--json").stdout)
        return rows

    def environ(self) -> dict[str, str]:
        """Ours, less what would let it see our packages."""
        dropped = ("PYTHONPATH", "VIRTUAL_ENV", "XDG_RUNTIME_DIR")
        return {key: value for key, value in os.environ.items() if key not in dropped}


@dataclass
class Life:
    """What was seen with the core alone, with the plugins, and after they were uninstalled."""

    environment: Environment
    modules: dict[str, str] = field(default_factory=dict)
    import_s: float = 0.0
    core_list: str = ""
    core_controller: subprocess.CompletedProcess[str] | None = None
    core_validate: str = ""
    broken: list[dict[str, str]] = field(default_factory=list)
    installed: list[dict[str, str]] = field(default_factory=list)
    torch: str = ""
    consistent: int = -1
    healthz: int = 0
    uninstalled: list[dict[str, str]] = field(default_factory=list)
    last_controller: str = ""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Package name to wheel."""
    out = tmp_path_factory.mktemp("wheels")
    folders = [str(ROOT), *(str(source.parent) for source in SOURCES.values() if source != ROOT)]
    command = ["-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, *command, "--wheel-dir", str(out), *folders], check=True)
    return {path.name.split("-")[0]: path for path in out.glob("*.whl")}


@pytest.fixture(scope="module")
def life(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Life:
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    environment = Environment(folder)
    seen = Life(environment)
    environment.pip("install", str(wheels["lmcache_kit"]), OLDEST_PLUGGY)
    _look_at_the_core(seen)
    plugins = [str(wheels[name]) for name in INSTALLED]
    environment.pip("install", *plugins)
    seen.installed = environment.plugins()
    seen.consistent = environment.run("python", "-m", "pip", "check").returncode
    seen.torch = environment.python("import importlib.util as u; print(u.find_spec('torch'))")
    seen.healthz = _controller_health(environment)
    environment.pip("uninstall", "--yes", *INSTALLED)
    seen.uninstalled = environment.plugins()
    seen.last_controller = environment.run("lmcache_controller").stderr
    return seen


def _look_at_the_core(seen: Life) -> None:
    environment = seen.environment
    for imports in (
        "import lmcache_kit",
        "import lmcache_kit.plugins",
        "import lmcache_kit.config",
        "import lmcache_kit.cli",
        "from lmcache_kit.plugins import Plugins; Plugins.load()",
    ):
        code = MODULES.format(imports=imports, heavy=(*HEAVY, "pydantic"))
        seen.modules[imports] = environment.python(code)
    seen.import_s = min(float(environment.python(CPU_TIME)) for _ in range(5))
    seen.core_list = environment.run("lmcache-kit", "plugins").stdout
    seen.core_controller = environment.run("lmcache_controller")
    example = str(ROOT / "examples" / "lookup" / "example.yaml")
    seen.core_validate = environment.run("lmcache-kit", "validate", example).stderr
    seen.broken = _plugins_with_broken_ones(environment)


def _plugins_with_broken_ones(environment: Environment) -> list[dict[str, str]]:
    """The list with two plugins on the path that do not load, under the oldest pluggy."""
    site = environment.folder / "broken"
    for name, code in {
        "acme_half": "from lmcache_kit.hookspecs import hookimpl\n"
        "@hookimpl\ndef cache_closing(): pass\n@hookimpl\ndef report_header(nonsense): pass\n",
        "acme_typo": "from lmcache_kit.hookspecs import hookimpl\n@hookimpl\ndef headers(): pass\n",
    }.items():
        info = site / f"{name}-1.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[lmcache_kit.v1]\n{name} = {name}\n")
    done = environment.run("lmcache-kit", "plugins", "--json", PYTHONPATH=str(site))
    rows: list[dict[str, str]] = json.loads(done.stdout)
    return rows


def _controller_health(environment: Environment) -> int:
    process = subprocess.Popen(
        [
            str(environment.folder / "bin" / "lmcache_controller"),
            "--port",
            "0",
            "--monitor-port",
            "0",
        ],
        cwd=environment.folder,
        env=environment.environ() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        ready, _, _ = select.select([process.stdout], [], [], WAIT_S)
        line = process.stdout.readline() if ready else ""
        found = re.search(r"http on (http://\S+:\d+)", line)
        assert found, (line, process.poll())
        with urllib.request.urlopen(f"{found[1]}/healthz", timeout=WAIT_S) as reply:
            return int(reply.status)
    finally:
        process.terminate()
        process.wait(WAIT_S)
        process.stdout.close()


# With the core alone.


def test_the_core_alone_lists_no_plugin_and_says_what_to_install(life: Life) -> None:
    assert life.core_list == (
        "No plugins are installed. To store KV and to serve REST: "
        "pip install lmcache-kit-cpu-backend lmcache-kit-http-api\n"
    )


def test_the_controller_without_a_frontend_names_the_package_to_install(life: Life) -> None:
    assert life.core_controller
    assert life.core_controller.returncode != 0
    assert "pip install lmcache-kit-http-api" in life.core_controller.stderr
    assert "Traceback" not in life.core_controller.stderr


def test_a_configuration_whose_backend_is_missing_names_the_package_to_install(life: Life) -> None:
    assert "no backend 'LocalCPUBackend' is installed" in life.core_validate
    assert "pip install lmcache-kit-cpu-backend" in life.core_validate


def test_the_core_imports_nothing_heavy(life: Life) -> None:
    assert life.modules == {
        "import lmcache_kit": "[]",
        "import lmcache_kit.plugins": "[]",
        "import lmcache_kit.config": "['pydantic']",
        "import lmcache_kit.cli": "[]",
        "from lmcache_kit.plugins import Plugins; Plugins.load()": "[]",
    }


def test_the_core_imports_in_under_300_ms_of_processor_time(
    life: Life, record_property: pytest.RecordProperty
) -> None:
    record_property("core_import_s", life.import_s)
    print(f"core, plugins and configuration import in {life.import_s * 1000:.0f} ms")
    assert life.import_s < MAX_IMPORT_S


def test_the_oldest_supported_pluggy_reports_broken_plugins_as_the_newest_does(life: Life) -> None:
    assert [(row["name"], row["state"]) for row in life.broken] == [
        ("acme_half", "failed"),
        ("acme_typo", "failed"),
    ]
    assert "nonsense" in life.broken[0]["failure"]
    assert "unknown hook 'headers'" in life.broken[1]["failure"]


# With the plugins.


def test_installed_plugins_are_there(life: Life) -> None:
    rows = {(row["kind"], row["name"], row["distribution"], row["state"]) for row in life.installed}
    assert rows == {
        ("backend", "LocalCPUBackend", "lmcache-kit-cpu-backend", "ready"),
        ("frontend", "http", "lmcache-kit-http-api", "ready"),
    }
    site = life.environment.folder / "lib"
    assert all(Path(row["path"]).is_relative_to(site) for row in life.installed)


def test_the_wheels_requirements_fit_together(life: Life) -> None:
    assert life.consistent == 0


def test_the_controller_answers_where_there_is_no_torch(life: Life) -> None:
    assert life.torch == "None"
    assert life.healthz == 200


def test_uninstalled_plugins_are_gone(life: Life) -> None:
    assert life.uninstalled == []
    assert "pip install lmcache-kit-http-api" in life.last_controller


# The wheels themselves.


@pytest.mark.parametrize("package", SOURCES)
def test_a_wheel_holds_its_package_and_nothing_else(wheels: dict[str, Path], package: str) -> None:
    with zipfile.ZipFile(wheels[package]) as wheel:
        names = set(wheel.namelist())
    source = SOURCES[package]
    expected = {
        str(path.relative_to(source))
        for path in (source / package).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == expected
    about = {name.partition("/")[2] for name in about}
    assert about - {"entry_points.txt"} == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    assert f"{package}/py.typed" in expected


@pytest.mark.parametrize("package", SOURCES)
def test_a_distribution_is_called_like_its_package(wheels: dict[str, Path], package: str) -> None:
    with zipfile.ZipFile(wheels[package]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(wheel.read(name).decode())
    assert metadata["Name"] == package.replace("_", "-")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_core_requires_nothing_heavy(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["lmcache_kit"]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(wheel.read(name).decode())
    required = {re.split(r"[^\w-]", each)[0] for each in metadata.get_all("Requires-Dist", [])}
    assert required.isdisjoint({"torch", "vllm", "aiohttp", "nixl", "numpy", "transformers"})
