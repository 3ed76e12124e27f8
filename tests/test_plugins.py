"""Plugins as real distributions on the path: loaded each on its own, failures as data."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lmcache_kit import __version__
from lmcache_kit.errors import ConfigError, DuplicateName, PluginBroken, PluginNotFound
from lmcache_kit.first_party import FIRST_PARTY, FirstParty
from lmcache_kit.interfaces import CacheInfo
from lmcache_kit.plugins import BUILTIN_POLICIES, Failure, Plugins

if TYPE_CHECKING:
    from tests.support.sites import FakeSite

ROOT = Path(__file__).parent.parent

BACKEND = """
@hookimpl
def register_backends():
    return [BackendSpec("Vault", "{module}_target:Vault", "on a vault")]
"""

POLICY = """
from lmcache_kit.cache.index.policies import LRU
class Own(LRU): pass
@hookimpl
def make_eviction_policy(name):
    return Own() if name == "{name}" else None
"""


def load(selection: str = "") -> Plugins:
    """All plugins but this repository's own, if they happen to be installed."""
    own = ",".join(f"-{folder.name}" for folder in (ROOT / "plugins").iterdir())
    return Plugins.load(environ={"LMCACHE_KIT_PLUGINS": f"{selection},{own}"})


def names(plugins: Plugins) -> list[str]:
    return [info.name for info in plugins.loaded]


# Loading.


def test_a_plugin_is_found_by_its_entry_point_and_known_with_its_distribution(
    site: FakeSite,
) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"), plugin="vault", version="3.4")
    (info,) = load().loaded
    assert (info.name, info.distribution, info.version) == ("vault", "acme-vault", "3.4")
    assert info.path == str(site.folder / "acme_vault.py")


def test_an_offer_is_known_without_importing_its_target(site: FakeSite) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    plugins = load()
    assert plugins.spec("backend", "Vault").summary == "on a vault"
    assert [offer.plugin.distribution for offer in plugins.specs("backend")] == ["acme-vault"]
    assert not plugins.failures


def test_what_is_asked_for_is_imported(site: FakeSite) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    site.module("acme_vault_target", "class Vault: pass\n")
    assert load().resolve("backend", "Vault").__name__ == "Vault"


@pytest.mark.parametrize(
    ("code", "stage", "error"),
    [
        ("import acme_missing", "import", "ModuleNotFoundError: No module named 'acme_missing'"),
        ("1 / 0", "import", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "import", "SystemExit: 3"),
        ("def broken(:", "import", "SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_a_failure_and_harms_nobody(
    site: FakeSite, code: str, stage: str, error: str
) -> None:
    site.install("acme-broken", code)
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    plugins = load()
    assert names(plugins) == ["acme_vault"]
    (failure,) = plugins.failures
    assert (failure.plugin, failure.distribution, failure.stage) == (
        "acme_broken",
        "acme-broken",
        stage,
    )
    assert error in failure.error


def test_a_failure_is_logged_once_as_a_warning(
    site: FakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.install("acme-broken", "1 / 0")
    with caplog.at_level(logging.WARNING, logger="lmcache_kit.plugins"):
        load()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "plugin 'acme_broken' of acme-broken" in record.getMessage()


def test_a_misspelt_hook_is_reported_by_its_plugin(site: FakeSite) -> None:
    site.install("acme-typo", "@hookimpl\ndef register_backend(): return []")
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    plugins = load()
    assert names(plugins) == ["acme_vault"]
    (failure,) = plugins.failures
    assert (failure.plugin, failure.stage) == ("acme_typo", "hooks")
    assert "unknown hook 'register_backend'" in failure.error


def test_a_plugin_with_one_wrong_hook_leaves_none_of_its_others_behind(site: FakeSite) -> None:
    site.install(
        "acme-half",
        BACKEND.format(module="acme_half") + "\n@hookimpl\ndef report_header(nonsense): return 'x'",
    )
    plugins = load()
    assert names(plugins) == []
    assert plugins.specs("backend") == []
    assert plugins.report_headers() == []
    assert plugins.failures[0].stage == "hooks"
    assert "nonsense" in plugins.failures[0].error


def test_a_wrapper_is_refused_because_hooks_are_collected_one_by_one(site: FakeSite) -> None:
    site.install("acme-wrap", "@hookimpl(wrapper=True)\ndef report_header():\n    return (yield)")
    assert "report_header is a wrapper" in load().failures[0].error


def test_one_object_under_two_names_is_loaded_once(site: FakeSite) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"), plugin="acme_a")
    info = site.folder / "acme_vault-1.2.dist-info" / "entry_points.txt"
    info.write_text("[lmcache_kit.v1]\nacme_a = acme_vault\nacme_b = acme_vault\n")
    plugins = load()
    assert names(plugins) == ["acme_a"]
    assert "the same object as plugin 'acme_a'" in plugins.failures[0].error


# Versions.


@pytest.mark.parametrize(
    ("group", "who"), [("lmcache_kit.v2", "lmcache-kit"), ("lmcache_kit.v0", "acme-late")]
)
def test_a_plugin_for_another_api_version_is_not_imported_and_says_which_side_to_upgrade(
    site: FakeSite, group: str, who: str
) -> None:
    site.install("acme-late", "import acme_was_imported", group=group)
    site.module("acme_was_imported", "")
    (failure,) = load().failures
    assert failure.stage == "api version"
    assert failure.error == (
        f"it is for plugin API {group[-1]} and this lmcache-kit speaks 1; "
        f"upgrade with: pip install -U {who}"
    )
    assert "acme_was_imported" not in sys.modules


def test_a_distribution_for_two_api_versions_is_used_with_ours(site: FakeSite) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    info = site.folder / "acme_vault-1.2.dist-info" / "entry_points.txt"
    info.write_text(info.read_text() + "[lmcache_kit.v2]\nacme_vault = acme_vault2\n")
    plugins = load()
    assert names(plugins) == ["acme_vault"]
    assert not plugins.failures


def requires(site: FakeSite, *requirements: str) -> None:
    """Install ``acme-vault``, which cannot be imported unnoticed, with these requirements."""
    code = BACKEND.format(module="acme_vault") + "\nimport acme_was_imported"
    site.install("acme-vault", code)
    site.module("acme_was_imported", "")
    with (site.folder / "acme_vault-1.2.dist-info" / "METADATA").open("a") as metadata:
        metadata.writelines(f"Requires-Dist: {each}\n" for each in requirements)


@pytest.mark.parametrize("wanted", [">=9", "<0.1", "!=0.1.0,>=0.0.1", "==0.2.*", "~=1.4"])
def test_a_plugin_for_another_release_of_the_kit_is_not_imported_and_says_what_to_do(
    site: FakeSite, wanted: str
) -> None:
    requires(site, f"lmcache-kit{wanted}")
    plugins = load()
    (failure,) = plugins.failures
    assert (failure.plugin, failure.distribution) == ("acme_vault", "acme-vault")
    assert failure.stage == "requirement"
    assert failure.error.startswith("it requires lmcache-kit")
    assert wanted.partition(",")[0] in failure.error
    assert f"and this is {__version__}; " in failure.error
    assert failure.error.endswith("pip install -U lmcache-kit acme-vault")
    assert "acme_was_imported" not in sys.modules
    with pytest.raises(PluginNotFound, match=r"no backend 'Vault'.*it requires lmcache-kit"):
        plugins.spec("backend", "Vault")


@pytest.mark.parametrize(
    "requirement",
    [
        "lmcache-kit",
        f"LMCache_Kit (=={__version__})",
        f"lmcache-kit<1,>={__version__}; python_version > '3'",
        "lmcache-kit>=9; python_version < '3'",
        "lmcache-kit[testing]>=9; extra == 'test'",
        "lmcache-kit-extras>=9",
        "acme?",
    ],
)
def test_what_does_not_ask_for_another_release_of_the_kit_is_no_obstacle(
    site: FakeSite, requirement: str
) -> None:
    requires(site, requirement)
    plugins = load()
    assert names(plugins) == ["acme_vault"]
    assert not plugins.failures


def test_a_requirement_that_means_nothing_is_broken_metadata(site: FakeSite) -> None:
    requires(site, "lmcache-kit>=nine")
    (failure,) = load().failures
    assert failure.stage == "metadata"
    assert "InvalidRequirement" in failure.error


def test_a_blocked_plugin_may_require_what_it_likes(site: FakeSite) -> None:
    requires(site, "lmcache-kit>=9")
    assert not load("-acme_vault").failures


@pytest.mark.usefixtures("acme_is_ours")
def test_one_of_our_plugins_for_another_release_is_broken_and_not_missing(
    site: FakeSite,
) -> None:
    site.install("lmcache-kit-acme", "1 / 0")
    metadata = site.folder / "lmcache_kit_acme-1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "Requires-Dist: lmcache-kit<0.1\n")
    with pytest.raises(PluginBroken, match="pip install -U lmcache-kit lmcache-kit-acme") as caught:
        load().spec("codec", "acme")
    assert "reinstall" not in str(caught.value)


def test_other_groups_are_none_of_our_business(site: FakeSite) -> None:
    site.install("acme-other", "1 / 0", group="lmcache_kit.v1.extra")
    plugins = load()
    assert not plugins.failures
    assert not plugins.loaded


def test_broken_metadata_is_a_failure_and_harms_nobody(site: FakeSite) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    site.install("acme-odd")
    (site.folder / "acme_odd-1.2.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe[")
    plugins = load()
    assert names(plugins) == ["acme_vault"]
    assert plugins.failures[0].stage == "metadata"


def test_a_distribution_without_metadata_is_a_failure_and_harms_nobody(site: FakeSite) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    site.install("acme-rest")
    (site.folder / "acme_rest-1.2.dist-info" / "METADATA").unlink()
    plugins = load()
    assert names(plugins) == ["acme_vault"]
    (failure,) = plugins.failures
    assert failure.stage == "metadata"
    assert str(site.folder) in failure.distribution


# Names.


def test_two_distributions_with_the_same_plugin_name_are_both_named_and_not_loaded(
    site: FakeSite,
) -> None:
    site.install("acme-one", "1 / 0", plugin="acme")
    site.install("acme-two", "1 / 0", plugin="acme")
    plugins = load()
    assert names(plugins) == []
    assert plugins.failures == [
        Failure(
            "acme",
            "acme-one",
            "name",
            "acme-two has a plugin of this name too; uninstall one of them",
        ),
        Failure(
            "acme",
            "acme-two",
            "name",
            "acme-one has a plugin of this name too; uninstall one of them",
        ),
    ]


def test_a_distribution_that_lies_on_the_path_twice_counts_once(
    site: FakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    second = tmp_path / "second"
    second.mkdir()
    type(site)(second).install("Acme_Vault", BACKEND.format(module="acme_vault"), version="9")
    monkeypatch.syspath_prepend(str(second))
    plugins = load()
    assert [info.version for info in plugins.loaded] == ["9"]
    assert not plugins.failures


def test_a_name_that_two_plugins_offer_can_be_used_from_neither(site: FakeSite) -> None:
    site.install("acme-one", BACKEND.format(module="acme_one"))
    site.install("acme-two", BACKEND.format(module="acme_two"))
    plugins = load()
    with pytest.raises(
        DuplicateName, match="'Vault' is provided 2 times: by acme-one and by acme-two"
    ):
        plugins.spec("backend", "Vault")
    assert [failure.stage for failure in plugins.failures] == ["name", "name"]
    assert load("-acme_two").spec("backend", "Vault").name == "Vault"


# Hooks.


def test_one_implementation_that_raises_loses_only_its_own_offers(site: FakeSite) -> None:
    site.install("acme-bad", "@hookimpl\ndef register_backends(): raise OSError('no vault')")
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    plugins = load()
    assert [offer.spec.name for offer in plugins.specs("backend")] == ["Vault"]
    assert plugins.failures == [
        Failure("acme_bad", "acme-bad", "register_backends", "OSError: no vault")
    ]


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ("None", "TypeError: 'NoneType' object is not iterable"),
        ("[CodecSpec('c', 'm:a', 's')]", "is no BackendSpec"),
        ("[BackendSpec(5, 'm:a', 's')]", "has no name"),
        ("[BackendSpec('Vault', None, 's')]", "TypeError"),
        ("['Vault']", "'Vault' is no BackendSpec"),
        ("[BackendSpec('', 'm:a', 's')]", "has no name"),
        (
            "[BackendSpec('Vault', 'module.attribute', 's')]",
            "'module.attribute' is no 'module:attribute'",
        ),
        ("(1 / 0 for _ in 'x')", "ZeroDivisionError"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_a_failure(
    site: FakeSite, returned: str, problem: str
) -> None:
    site.install("acme-bad", f"@hookimpl\ndef register_backends(): return {returned}")
    plugins = load()
    assert plugins.specs("backend") == []
    (failure,) = plugins.failures
    assert failure.stage == "register_backends"
    assert problem in failure.error


def test_an_async_hook_is_a_failure(site: FakeSite) -> None:
    site.install("acme-bad", "@hookimpl\nasync def register_backends(): return []")
    assert "a hook must not be async" in load().failures[0].error


def test_every_plugin_hears_of_a_cache_even_if_one_raises(site: FakeSite) -> None:
    site.module("acme_ear", "heard = []")
    code = "import acme_ear\n@hookimpl\ndef {hook}(info): acme_ear.heard.append(info.instance_id)"
    site.install("acme-a", code.format(hook="cache_opened"))
    site.install("acme-b", "@hookimpl\ndef cache_opened(info): raise RuntimeError('deaf')")
    site.install("acme-c", code.format(hook="cache_opened"))
    site.install("acme-d", code.format(hook="cache_closing"))
    plugins = load()
    heard = importlib.import_module("acme_ear").heard
    plugins.cache_opened(CacheInfo("opened", "00", ("LocalCPUBackend",)))
    assert heard == ["opened", "opened"]
    assert [failure.stage for failure in plugins.failures] == ["cache_opened"]
    plugins.cache_closing(CacheInfo("closing", "00", ("LocalCPUBackend",)))
    assert heard[2:] == ["closing"]


def test_headers_are_one_line_per_plugin_that_has_one(site: FakeSite) -> None:
    site.install("acme-a", "@hookimpl\ndef report_header(): return 'shelves: 3'")
    site.install("acme-b", "@hookimpl\ndef report_header(): return None")
    assert load().report_headers() == ["shelves: 3"]


# Selection.


def test_an_allowlist_keeps_all_others_out(site: FakeSite) -> None:
    site.install("acme-a")
    site.install("acme-b", "1 / 0")
    plugins = load("acme-a")
    assert names(plugins) == ["acme_a"]
    assert "acme_b" in [info.name for info in plugins.blocked]
    assert not plugins.failures


def test_a_minus_blocks_one(site: FakeSite) -> None:
    site.install("acme-a")
    site.install("acme-b", "1 / 0")
    plugins = load("-acme_b")
    assert names(plugins) == ["acme_a"]
    assert not plugins.failures


def test_an_allowed_plugin_that_is_not_installed_is_reported(site: FakeSite) -> None:
    site.install("acme-a")
    (failure,) = load("acme_a,acme_z").failures
    assert (failure.plugin, failure.stage) == ("acme_z", "selection")
    assert "installed: acme_a" in failure.error


# Asked for.


@pytest.fixture
def acme_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the codec ``acme`` were in a distribution of this repository."""
    ours = (FirstParty("codec", "acme", "lmcache-kit-acme", keys=("acme_level",)),)
    monkeypatch.setattr("lmcache_kit.first_party.FIRST_PARTY", ours)


@pytest.mark.usefixtures("acme_is_ours")
def test_what_one_of_our_distributions_provides_comes_with_the_pip_command() -> None:
    with pytest.raises(PluginNotFound, match="no codec 'acme' is installed") as caught:
        load().spec("codec", "acme")
    assert caught.value.hint == "pip install lmcache-kit-acme"


def test_an_unknown_name_lists_the_known_ones_and_what_failed(site: FakeSite) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    site.install("acme-broken", "1 / 0")
    with pytest.raises(PluginNotFound, match="no backend 'Box' is installed") as caught:
        load().spec("backend", "Box")
    assert caught.value.hint == "Installed: Vault"
    assert "plugin 'acme_broken' of acme-broken failed (import)" in caught.value.message


def test_a_blocked_provider_is_said_to_be_blocked() -> None:
    if "http_api" not in [info.name for info in Plugins.load(environ={}).loaded]:
        pytest.fail("install the plugins of this repository first: make setup")
    with pytest.raises(PluginNotFound, match="LMCACHE_KIT_PLUGINS keeps out") as caught:
        load().spec("frontend", "http")
    assert caught.value.hint == "Let 'http_api' through in LMCACHE_KIT_PLUGINS, or unset it"


@pytest.mark.usefixtures("acme_is_ours")
def test_a_provider_that_fails_to_load_is_broken_and_not_missing(site: FakeSite) -> None:
    site.install("lmcache-kit-acme", "1 / 0")
    with pytest.raises(PluginBroken, match="ZeroDivisionError: division by zero") as caught:
        load().spec("codec", "acme")
    assert "pip install --force-reinstall lmcache-kit-acme" in caught.value.hint


def test_a_target_that_cannot_be_imported_names_plugin_distribution_and_cause(
    site: FakeSite,
) -> None:
    site.install("acme-vault", BACKEND.format(module="acme_vault"))
    site.module("acme_vault_target", "raise ImportError('libvault.so is missing')")
    expected = r"'Vault' \(plugin 'acme_vault' of acme-vault\).*ImportError: libvault.so is missing"
    with pytest.raises(PluginBroken, match=expected) as caught:
        load().resolve("backend", "Vault")
    assert "pip install --force-reinstall acme-vault" in caught.value.hint


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("def probe(): return 'there is no vault here'", "there is no vault here"),
        ("def probe(): raise OSError('dark')", "its probe failed: OSError: dark"),
    ],
)
def test_what_its_probe_refuses_is_not_imported(site: FakeSite, probe: str, reason: str) -> None:
    spec = "BackendSpec('Vault', 'acme_nothing:Vault', 's', probe='acme_probe:probe')"
    site.install("acme-vault", f"@hookimpl\ndef register_backends(): return [{spec}]")
    site.module("acme_probe", probe)
    with pytest.raises(PluginBroken, match=f"cannot be used here: {reason}"):
        load().resolve("backend", "Vault")


# Eviction policies.


@pytest.mark.parametrize("name", BUILTIN_POLICIES)
def test_the_kits_own_policies_are_there_without_any_plugin(name: str) -> None:
    assert type(load().eviction_policy(name)).__name__ == name


def test_two_caches_get_two_policies() -> None:
    plugins = load()
    assert plugins.eviction_policy("LRU") is not plugins.eviction_policy("LRU")


def test_a_plugin_may_add_a_policy(site: FakeSite) -> None:
    site.install("acme-policy", POLICY.format(name="MINE"))
    assert type(load().eviction_policy("MINE")).__name__ == "Own"


def test_a_plugin_may_replace_one_of_ours(site: FakeSite) -> None:
    site.install("acme-policy", POLICY.format(name="LRU"))
    assert type(load().eviction_policy("LRU")).__name__ == "Own"


def test_an_unknown_policy_lists_the_known_ones(site: FakeSite) -> None:
    site.install("acme-policy", POLICY.format(name="MINE"))
    with pytest.raises(ConfigError, match="unknown cache_policy 'MRU'") as caught:
        load().eviction_policy("MRU")
    assert caught.value.hint == "Known: FIFO, LFU, LRU, those of plugin 'acme_policy'"


def test_a_policy_that_two_plugins_make_names_both(site: FakeSite) -> None:
    site.install("acme-one", POLICY.format(name="MINE"))
    site.install("acme-two", POLICY.format(name="MINE"))
    with pytest.raises(DuplicateName, match="'MINE' is provided by acme-one and acme-two"):
        load().eviction_policy("MINE")


def test_a_plugin_that_raises_for_a_policy_does_not_take_ours_away(site: FakeSite) -> None:
    site.install("acme-bad", "@hookimpl\ndef make_eviction_policy(name): raise OSError('no')")
    plugins = load()
    assert type(plugins.eviction_policy("LRU")).__name__ == "LRU"
    with pytest.raises(PluginBroken, match=r"cache_policy 'MINE'.*acme-bad.*OSError: no"):
        plugins.eviction_policy("MINE")


def test_what_is_no_policy_is_a_failure(site: FakeSite) -> None:
    site.install("acme-bad", "@hookimpl\ndef make_eviction_policy(name): return 'LRU'")
    with pytest.raises(PluginBroken, match="'LRU' is no EvictionPolicy"):
        load().eviction_policy("MINE")


def test_our_distributions_are_named_by_one_rule() -> None:
    assert all(each.distribution.startswith("lmcache-kit-") for each in FIRST_PARTY)
