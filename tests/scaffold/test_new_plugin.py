"""``lmcache-kit new-plugin``: what it makes works, and what it cannot make it says."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import secrets
import select
import socket
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email import message_from_string
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from click.testing import CliRunner, Result

from lmcache_kit import __version__
from lmcache_kit.cli.app import app
from lmcache_kit.interfaces import ChunkInfo
from lmcache_kit.layout import KVLayout
from lmcache_kit.plugins import Plugins
from lmcache_kit.scaffold import KINDS, Project, ScaffoldError, render
from lmcache_kit.scaffold.render import requirement
from lmcache_kit.service.build import open_backend
from lmcache_kit.service.codecs import Codecs
from lmcache_kit.testing import FakeController
from tests.scaffold.conftest import WAIT_S, Made, run

if TYPE_CHECKING:
    from tests.support.sites import FakeSite

ROOT = Path(__file__).parents[2]
MAX_STATEMENTS = 40
kinds = pytest.mark.parametrize("kind", KINDS)


def new_plugin(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["new-plugin", *map(str, arguments)])


def statements(source: str) -> int:
    """How many a module has in its functions: its logic."""
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sum(
        isinstance(node, ast.stmt)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for function in functions
        for statement in function.body
        for node in ast.walk(statement)
    )


@contextmanager
def controller(*arguments: str, **environ: str) -> Iterator[str]:
    """One that runs on ports of its own, and the line that it says when it does."""
    program = Path(sys.executable).parent / "lmcache-kit"
    process = subprocess.Popen(
        [program, "controller", "--port", "0", "--monitor-port", "0", *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environ},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    with process.stdout:
        try:
            ready, _, _ = select.select([process.stdout], [], [], WAIT_S)
            yield process.stdout.readline() if ready else "nothing"
        finally:
            process.terminate()
            process.wait(WAIT_S)


def certificates(folder: Path) -> dict[str, Path]:
    """Keys of a configuration, for TLS between two of this host."""
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    files = {
        "p2p_tls_cert": made.cert_chain_pems[0],
        "p2p_tls_key": made.private_key_pem,
        "p2p_tls_ca": authority.cert_pem,
    }
    for key, pem in files.items():
        pem.write_to_path(folder / f"{key}.pem")
    return {key: folder / f"{key}.pem" for key in files}


@pytest.fixture
def on_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The installed ones are on this process's path."""
    monkeypatch.syspath_prepend(str(installed))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("zz_"):
            del sys.modules[name]


# What is made.


@kinds
def test_it_says_what_it_made_and_what_comes_next(made: dict[str, Made], kind: str) -> None:
    each = made[kind]
    head, _, rest = each.said.partition("Next:\n")
    assert f"{kind} 'zz-{kind}' is in {each.folder}" in head
    assert set(re.findall(r"^  (\S+)$", head, flags=re.MULTILINE)) == each.files()
    assert rest.split("\n")[0] == f"  cd {each.folder}"
    assert len(rest.splitlines()) == 3


@kinds
def test_a_plugin_is_complete(made: dict[str, Made], kind: str) -> None:
    package = f"src/zz_{kind}"
    assert made[kind].files() >= {
        ".gitignore",
        "README.md",
        "pyproject.toml",
        f"{package}/__init__.py",
        f"{package}/{kind}.py",
        f"{package}/plugin.py",
        f"{package}/py.typed",
        f"tests/test_{kind}.py",
    }


@kinds
def test_its_project_file_names_kit_and_entry_point(made: dict[str, Made], kind: str) -> None:
    project = tomllib.loads((made[kind].folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == f"zz-{kind}"
    assert requirement() in project["dependencies"]
    assert project["optional-dependencies"] == {"test": ["lmcache-kit[testing]"]}
    assert project["entry-points"] == {"lmcache_kit.v1": {f"zz_{kind}": f"zz_{kind}.plugin"}}


def test_it_asks_for_the_version_that_it_was_made_by() -> None:
    major, minor = __version__.split(".")[:2]
    assert requirement() == f"lmcache-kit>={major}.{minor},<{major}.{int(minor) + 1}"


@kinds
def test_the_extra_that_its_tests_need_exists(made: dict[str, Made], kind: str) -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "testing" in ours["optional-dependencies"]


@kinds
def test_nothing_of_the_template_is_left(made: dict[str, Made], kind: str) -> None:
    for name in made[kind].files():
        assert "$" not in (made[kind].folder / name).read_text(), name


@kinds
def test_what_to_replace_is_marked(made: dict[str, Made], kind: str) -> None:
    assert "REPLACE" in (made[kind].folder / "src" / made[kind].package / f"{kind}.py").read_text()


@kinds
def test_the_implementation_is_short(made: dict[str, Made], kind: str) -> None:
    module = made[kind].folder / "src" / made[kind].package / f"{kind}.py"
    assert statements(module.read_text()) < MAX_STATEMENTS


@kinds
def test_it_has_no_finding_of_ruff(made: dict[str, Made], kind: str) -> None:
    run("ruff", "check", "--isolated", "--no-cache", ".", cwd=made[kind].folder)
    run("ruff", "format", "--isolated", "--no-cache", "--check", ".", cwd=made[kind].folder)


def test_it_is_typed_strictly(made: dict[str, Made]) -> None:
    folders = [each.folder / sub for each in made.values() for sub in ("src", "tests")]
    path = ":".join(str(each.folder / "src") for each in made.values())
    cache = ROOT / ".mypy_cache" / "new-plugin"
    options = ["--strict", "--config-file=", f"--cache-dir={cache}", "--python-version=3.11"]
    run("mypy", *options, *map(str, folders), cwd=made["codec"].folder.parent, MYPYPATH=path)


# Installed.


@pytest.mark.wheels
@kinds
def test_its_wheel_holds_its_package_and_nothing_else(
    made: dict[str, Made], wheels: Sequence[Path], kind: str
) -> None:
    [path] = [each for each in wheels if each.name.startswith(f"zz_{kind}-")]
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = message_from_string(wheel.read(f"zz_{kind}-0.1.0.dist-info/METADATA").decode())
    files = made[kind].files()
    assert names == {each.removeprefix("src/") for each in files if each.startswith("src/")}
    assert metadata["Name"] == f"zz-{kind}"


@pytest.mark.wheels
@kinds
def test_its_own_tests_pass(made: dict[str, Made], installed: Path, kind: str) -> None:
    options = ["-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error", "-q"]
    said = run("pytest", *options, cwd=made[kind].folder, PYTHONPATH=str(installed))
    assert re.search(r"\d{2,} passed", said)


@pytest.mark.wheels
def test_the_list_of_plugins_has_them_ready(made: dict[str, Made], installed: Path) -> None:
    said = run("lmcache-kit", "plugins", "--json", cwd=installed, PYTHONPATH=str(installed))
    rows = {row["name"]: row for row in json.loads(said)}
    for kind in made:
        row = rows[f"zz-{kind}"]
        assert (row["kind"], row["state"], row["distribution"]) == (kind, "ready", f"zz-{kind}")
        assert Path(row["path"]).is_relative_to(installed)


@pytest.mark.wheels
@pytest.mark.usefixtures("on_path")
def test_a_codec_compresses_what_a_cache_process_stores() -> None:
    codec = Codecs(Plugins.load()).get("zz-codec")
    chunk = ChunkInfo(KVLayout("bfloat16", layers=4, kv_heads=2, head_dim=64), tokens=64)
    payload = (secrets.token_bytes(64) * chunk.payload_bytes)[: chunk.payload_bytes]
    blob = codec.encode(payload, chunk)
    codec.decode(blob, chunk, out := bytearray(chunk.payload_bytes))
    assert out == payload
    assert len(blob) < len(payload) / 10


@pytest.mark.wheels
@pytest.mark.usefixtures("on_path")
def test_a_backend_keeps_what_memory_loses() -> None:
    from tests.peer.conftest import Place

    backend = open_backend(Plugins.load(), "zz-backend", {"max_size_gib": 0.1})
    place = Place("one", stores=[backend])
    try:
        place.store(range(100))
        place.settle()
        place.engine.memory_tier.clear()
        assert place.hit(range(100)) == 100
        assert place.engine.stats()["promoted_chunks_total"] == 7
    finally:
        place.close()


@pytest.mark.wheels
@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize("tls", [False, True], ids=["TCP", "TLS"])
def test_a_transport_moves_kv_between_two_nodes(tmp_path: Path, tls: bool) -> None:
    from tests.peer.conftest import Place

    tokens = list(range(100))
    how: dict[str, Any] = {
        "plugins": Plugins.load(environ={"LMCACHE_KIT_PLUGINS": "-tcp_transport"}),
        "transfer_channel": "zz-transport",
        **(certificates(tmp_path) if tls else {}),
    }
    source, goal = places = [Place(name, **how) for name in ("source", "goal")]
    try:
        source.store(tokens)
        outcome = goal.move(source, tokens)
        assert outcome.state == "done", outcome
        assert (source.hit(tokens), goal.hit(tokens)) == (0, len(tokens))
    finally:
        for place in places:
            place.close()


@pytest.mark.wheels
@pytest.mark.usefixtures("on_path")
async def test_a_frontend_stops_once_it_has_answered() -> None:
    target = Plugins.load().resolve("frontend", "zz-frontend")
    controller = FakeController()
    controller.open.clear()
    frontend = target(controller, resolve_name("zz_frontend.options:Options")(port=0))
    await frontend.start()
    host, port = frontend.endpoints[0].removeprefix("tcp://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b'{"ask": "health", "instance_id": "here"}\n')
    async with asyncio.timeout(WAIT_S):
        while not controller.asked:
            await asyncio.sleep(0.005)
    stopping = asyncio.create_task(frontend.stop())
    await asyncio.sleep(0.05)
    assert not stopping.done(), "it stopped with a request in flight"
    controller.open.set()
    await stopping
    assert await reader.read() == b'{"0":0}\n'
    writer.close()


@pytest.mark.wheels
def test_a_frontend_answers_for_the_controller(installed: Path) -> None:
    with controller("--frontend", "zz-frontend", PYTHONPATH=str(installed)) as said:
        found = re.search(r"zz-frontend on tcp://([\d.]+):(\d+)", said)
        assert found, said
        with socket.create_connection((found[1], int(found[2])), WAIT_S) as connection:
            connection.sendall(b'{"ask": "lookup", "tokens": [1, 2, 3]}\n')
            reply = json.loads(connection.makefile().readline())
    assert reply["instances"] == []


# What cannot be made.


@pytest.mark.parametrize(
    "name", ["", "1st", "-x", "x-", "a--b", "a b", "a.b", "../x", "ä", "x/y", "x" * 65, "a\n"]
)
def test_a_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    for kind in KINDS:
        result = new_plugin(kind, "--into", tmp_path, "--", name)
        assert result.exit_code == 1, kind
        assert f"{name!r} cannot be the name of a plugin. NAME" in result.output
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--name", "'a b' cannot be the offer of a plugin. NAME or --name has letters"),
        ("--distribution", "'a b' cannot be the name of a plugin. NAME or --distribution has"),
    ],
)
def test_a_bad_option_is_named(tmp_path: Path, option: str, said: str) -> None:
    result = new_plugin("codec", "zz", option, "a b", "--into", tmp_path)
    assert (result.exit_code, said in result.output) == (1, True), result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["zlib", "class", "json", "asyncio"])
def test_a_name_that_python_has_is_refused(tmp_path: Path, name: str) -> None:
    result = new_plugin("codec", name, "--into", tmp_path)
    assert result.exit_code == 1
    assert f"--distribution my-{name}" in result.output
    assert new_plugin("codec", name, "--distribution", f"my-{name}", "--into", tmp_path).output
    assert [each.name for each in tmp_path.iterdir()] == [f"my-{name}"]


def test_an_unknown_kind_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    result = new_plugin("colour", "zz", "--into", tmp_path)
    known = "backend, codec, frontend, transport"
    assert result.output.strip() == f"Error: unknown kind 'colour'. Known: {known}"


def test_a_name_that_an_installed_plugin_offers_is_refused(tmp_path: Path) -> None:
    result = new_plugin("transport", "tcp", "--into", tmp_path)
    assert result.exit_code == 1
    assert "'tcp' exists already, from lmcache-kit-tcp-transport" in result.output
    assert "--name" in result.output
    assert not list(tmp_path.iterdir())


def test_the_same_name_for_another_kind_is_fine(tmp_path: Path) -> None:
    assert new_plugin("frontend", "tcp", "--into", tmp_path).exit_code == 0


def test_a_distribution_that_is_installed_is_refused(tmp_path: Path, site: FakeSite) -> None:
    site.install("acme-there")
    into = tmp_path / "into"
    into.mkdir()
    result = new_plugin("codec", "acme_there", "--name", "zz", "--into", into)
    assert "'acme-there' is installed already, in version 1.2" in result.output
    assert not list(into.iterdir())


def test_a_package_that_is_installed_is_refused(tmp_path: Path) -> None:
    result = new_plugin("codec", "lmcache-kit-tcp-transport", "--name", "zz", "--into", tmp_path)
    assert "is installed already" in result.output
    result = new_plugin("codec", "yaml", "--into", tmp_path)
    assert "a module 'yaml' is installed already" in result.output
    assert not list(tmp_path.iterdir())


def test_a_word_of_the_configuration_is_no_name(tmp_path: Path) -> None:
    result = new_plugin("transport", "auto", "--into", tmp_path)
    assert "a transport cannot be called 'auto'" in result.output


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "zz-zip").mkdir()
    (tmp_path / "zz-zip" / "notes").write_text("mine")
    result = new_plugin("codec", "zz-zip", "--into", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path / 'zz-zip'} exists and is not an empty folder" in result.output
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "zz-zip",
        "zz-zip/notes",
    ]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "zz-zip").mkdir()
    assert new_plugin("codec", "zz-zip", "--into", tmp_path).exit_code == 0
    assert (tmp_path / "zz-zip" / "pyproject.toml").exists()


def test_a_place_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = new_plugin("codec", "zz-zip", "--into", tmp_path / "nowhere")
    assert f"mkdir -p {tmp_path / 'nowhere'}" in result.output


def test_a_place_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = Path.write_text

    def full(self: Path, *arguments: str, **more: str) -> int:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(self)
        return write(self, *arguments, **more)

    monkeypatch.setattr(Path, "write_text", full)
    result = new_plugin("codec", "zz-zip", "--into", tmp_path)
    assert result.exit_code == 1
    assert "No space left on device. Choose another place with --into" in result.output
    assert not list(tmp_path.iterdir())


# Names.


@pytest.mark.parametrize(
    ("name", "package", "class_name"),
    [
        ("zip", "zip", "ZipCodec"),
        ("Acme_Zip", "acme_zip", "AcmeZipCodec"),
        ("zip-codec", "zip_codec", "ZipCodec"),
        ("codec", "codec", "MyCodec"),
    ],
)
def test_names_follow_from_one(name: str, package: str, class_name: str) -> None:
    project = Project.named("codec", name)
    assert (project.package, project.class_name) == (package, class_name)
    assert project.offer == name


def test_the_library_makes_the_same_as_the_command(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    files = render("codec", "zz-zip", tmp_path / "there", offer="zz")
    new_plugin("codec", "zz-zip", "--name", "zz", "--into", tmp_path / "here")
    for path in files:
        twin = tmp_path / "here" / "zz-zip" / path.relative_to(tmp_path / "there")
        assert twin.read_text() == path.read_text()


def test_the_library_refuses_too(tmp_path: Path) -> None:
    with pytest.raises(ScaffoldError, match="unknown kind 'x'"):
        render("x", "zz", tmp_path / "zz")
