"""The monitor port with keys: who may connect, and what is said to those who may not."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from zmq.auth import create_certificates, load_certificate

from lmcache_kit.errors import ConfigError
from lmcache_kit.protocol.zmq_auth import ControllerKeys, WorkerKeys
from tests.control.conftest import Running, StartAgent, StartController
from tests.control.fakes import FakeTier, chunks_of
from tests.support.waiting import eventually

PROMPT = list(range(100, 112))


class Keys:
    """Keys of a controller that knows the worker ``known`` and not the worker ``stranger``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.others = folder / "others"
        for each in (folder / "workers", self.others):
            each.mkdir()
        create_certificates(folder, "controller")
        create_certificates(folder / "workers", "known")
        create_certificates(self.others, "controller")
        create_certificates(self.others, "stranger")
        for file in folder.rglob("*.key_secret"):
            file.chmod(0o600)

    def of_controller(self) -> ControllerKeys:
        return ControllerKeys.load(self.folder)

    def of_known(self) -> WorkerKeys:
        return self._of(self.folder / "controller.key", self.folder / "workers/known.key_secret")

    def of_stranger(self) -> WorkerKeys:
        return self._of(self.folder / "controller.key", self.others / "stranger.key_secret")

    def of_known_elsewhere(self) -> WorkerKeys:
        """It means to talk to another controller."""
        return self._of(self.others / "controller.key", self.folder / "workers/known.key_secret")

    @staticmethod
    def _of(controller: Path, worker: Path) -> WorkerKeys:
        return WorkerKeys.load(controller, worker)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def guarded(start_controller: StartController, keys: Keys) -> Running:
    """A controller with keys."""
    return start_controller(keys=keys.of_controller())


def filled() -> FakeTier:
    engine = FakeTier()
    engine.store(chunks_of(PROMPT))
    return engine


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


# Who may connect.


def test_a_known_worker_is_taken_in_and_a_lookup_finds_its_chunks(
    guarded: Running, start_agent: StartAgent, keys: Keys
) -> None:
    start_agent(guarded.url, engine=filled(), keys=keys.of_known())
    eventually(lambda: guarded.held(PROMPT) == {"a": 12})
    assert guarded.run(guarded.controller.instances.health("a")) == {0: 0}
    assert guarded.counters()["connections_refused_total"] == 0


REFUSED: list[tuple[Callable[[Keys], WorkerKeys | None], str]] = [
    (Keys.of_stranger, "the controller does not know worker_key"),
    (Keys.of_known_elsewhere, "is controller_key this controller's"),
    (lambda keys: None, "the controller wants encryption"),
]


@pytest.mark.parametrize(
    ("of", "why"), REFUSED, ids=["unknown worker", "wrong controller key", "no keys"]
)
def test_who_is_refused_never_registers_and_says_once_why(
    guarded: Running,
    start_agent: StartAgent,
    keys: Keys,
    caplog: pytest.LogCaptureFixture,
    of: Callable[[Keys], WorkerKeys | None],
    why: str,
) -> None:
    agent, _ = start_agent(guarded.url, "refused", engine=filled(), keys=of(keys))
    eventually(lambda: guarded.counters()["connections_refused_total"] >= 3)
    # An agent without keys learns of it only if it reads the controller's greeting before the
    # connection ends; on a busy machine that can take many attempts.
    eventually(lambda: agent.stats().get("rejected_total", 0) >= 1, timeout_s=120)
    start_agent(guarded.url, "good", engine=filled(), keys=keys.of_known())
    eventually(lambda: guarded.held(PROMPT) == {"good": 12})
    assert agent.stats()["registered"] == 0
    # Which end notices first may vary, and with it what can be known.
    eventually(lambda: [each for each in said(caplog) if why in each])
    assert len(set(said(caplog))) == len(said(caplog))
    assert agent.stats().get("failures_total", 0) == 0


def test_keys_do_not_fit_a_controller_without_them(
    controller: Running, start_agent: StartAgent, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    agent, _ = start_agent(controller.url, "refused", engine=filled(), keys=keys.of_known())
    eventually(lambda: agent.stats().get("rejected_total", 0) >= 3)
    start_agent(controller.url, "good", engine=filled())
    eventually(lambda: controller.held(PROMPT) == {"good": 12})
    assert agent.stats()["registered"] == 0
    eventually(lambda: [each for each in said(caplog) if "the controller does not enc" in each])
    assert len(set(said(caplog))) == len(said(caplog))


@pytest.mark.parametrize("of", [of for of, _ in REFUSED[::2]], ids=["unknown worker", "no keys"])
def test_who_was_refused_comes_in_once_the_controller_is_put_right(
    guarded: Running,
    start_controller: StartController,
    start_agent: StartAgent,
    keys: Keys,
    of: Callable[[Keys], WorkerKeys | None],
) -> None:
    theirs = of(keys)
    agent, _ = start_agent(guarded.url, engine=filled(), keys=theirs)
    eventually(lambda: agent.stats().get("rejected_total", 0) >= 1, timeout_s=120)
    guarded.close()
    shutil.copy(keys.others / "stranger.key", keys.folder / "workers")
    mended = start_controller(guarded.port, keys=keys.of_controller() if theirs else None)
    eventually(lambda: mended.held(PROMPT) == {"a": 12})


def test_a_controller_with_keys_comes_back_after_a_restart(
    guarded: Running, start_controller: StartController, start_agent: StartAgent, keys: Keys
) -> None:
    start_agent(guarded.url, engine=filled(), keys=keys.of_known())
    eventually(lambda: guarded.held(PROMPT) == {"a": 12})
    guarded.close()
    again = start_controller(guarded.port, keys=keys.of_controller())
    eventually(lambda: again.held(PROMPT) == {"a": 12})


def test_nobody_comes_in_when_nobody_is_there_to_ask(
    guarded: Running, start_agent: StartAgent, keys: Keys
) -> None:
    authenticator = guarded.controller._authenticator
    assert authenticator
    guarded.call(authenticator._authenticator.stop)
    agent, _ = start_agent(guarded.url, engine=filled(), keys=keys.of_known())
    eventually(lambda: guarded.counters()["connections_refused_total"] >= 1)
    assert agent.stats()["registered"] == 0


def test_a_taken_port_is_an_error_with_keys_too(
    guarded: Running, start_controller: StartController, keys: Keys
) -> None:
    with pytest.raises(ConfigError, match=f"port {guarded.port} on localhost is taken"):
        start_controller(guarded.port, keys=keys.of_controller())


# Key files.


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path, keys: Keys) -> None:
    with pytest.raises(ConfigError, match=r"worker_key: .*none cannot be read: .*no such file"):
        WorkerKeys.load(keys.folder / "controller.key", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"controller_key: .*workers cannot be read: Is a dir"):
        WorkerKeys.load(keys.folder / "workers", keys.folder / "workers/known.key_secret")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "not a key",
        lambda text: text.replace(b'"', b'"\x80').decode("latin1"),
        lambda text: re.sub(rb'secret-key = "...', b'secret-key = "', text).decode(),
        lambda text: re.sub(rb'secret-key = "..', b'secret-key = "~~', text).decode(),
        lambda text: re.sub(rb'secret-key = ".....', b'secret-key = "#####', text).decode(),
        lambda text: re.sub(rb'secret-key = ".....', b'secret-key = "', text).decode(),
    ],
)
def test_a_damaged_key_file_is_named_and_not_shown(
    keys: Keys, spoil: Callable[[bytes], str]
) -> None:
    file = keys.folder / "workers" / "known.key_secret"
    _, secret = load_certificate(file)
    assert secret
    file.write_text(spoil(file.read_bytes()))
    with pytest.raises(ConfigError, match=r"worker_key: .*known\.key_secret is not a key") as info:
        WorkerKeys.load(keys.folder / "controller.key", file)
    assert secret.decode()[8:-8] not in str(info.value)
    assert info.value.__suppress_context__


def test_a_public_file_where_a_secret_one_belongs_is_named(keys: Keys) -> None:
    with pytest.raises(ConfigError, match=r"worker_key: .*known\.key holds no secret key"):
        WorkerKeys.load(keys.folder / "controller.key", keys.folder / "workers" / "known.key")


def test_the_controllers_secret_is_refused_where_its_public_key_belongs(keys: Keys) -> None:
    worker = keys.folder / "workers" / "known.key_secret"
    with pytest.raises(ConfigError, match=r"controller_key: .*which only its owner may have"):
        WorkerKeys.load(keys.folder / "controller.key_secret", worker)


def test_a_pair_of_two_halves_is_refused(keys: Keys) -> None:
    file = keys.folder / "workers" / "known.key_secret"
    ours, theirs = (load_certificate(each)[0] for each in (file, keys.others / "stranger.key"))
    file.write_bytes(file.read_bytes().replace(ours, theirs))
    with pytest.raises(ConfigError, match="do not belong together"):
        WorkerKeys.load(keys.folder / "controller.key", file)


def test_a_damaged_key_of_one_worker_is_named(keys: Keys) -> None:
    (keys.folder / "workers" / "bad.key").write_text("x")
    with pytest.raises(ConfigError, match=r"--curve: .*bad\.key is not a key file"):
        keys.of_controller()


def test_a_controller_that_knows_no_worker_is_refused(keys: Keys) -> None:
    (keys.folder / "workers" / "known.key").unlink()
    with pytest.raises(ConfigError, match=r"nobody could connect.*lmcache-kit keys .* --worker"):
        keys.of_controller()


def test_a_secret_that_others_may_read_is_warned_about(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    (keys.folder / "controller.key_secret").chmod(0o644)
    keys.of_controller()
    assert [re.sub(r" in .*;", "", each) for each in said(caplog)] == [
        "--curve: others may read the secret key chmod 600 it"
    ]


def test_a_secret_is_not_in_what_is_printed(keys: Keys) -> None:
    for each in (keys.of_known(), keys.of_controller()):
        assert "secret" not in repr(each)
