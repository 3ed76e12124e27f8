"""The configuration: three sources, origins of values, keys of plugins, messages with a line."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmcache_kit.config import KitConfig, Loaded, load_config
from lmcache_kit.config.load import declarations
from lmcache_kit.config.model import KEYS
from lmcache_kit.errors import ConfigError
from lmcache_kit.first_party import FirstParty
from lmcache_kit.plugins import Plugins
from lmcache_kit.service.service import settings_digest
from tools.docs.keys import keys_table

if TYPE_CHECKING:
    from tests.support.sites import FakeSite

ROOT = Path(__file__).parent.parent
OF_OURS = ("local_disk", "max_local_disk_size", "remote_url", "nixl_backends")

WALK_THROUGH = """\
chunk_size: 256
local_cpu: True
max_local_cpu_size: 5
# cache controller configurations
enable_controller: True
lmcache_instance_id: "lmcache_default_instance"
controller_url: "localhost:9001"
distributed_url: "localhost:8002"
lmcache_worker_port: 8001
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "example.yaml"


def from_text(file: Path, text: str, **environ: str) -> Loaded:
    file.write_text(text)
    return load_config(file=file, environ=environ)


def from_environ(**environ: str) -> Loaded:
    return load_config(environ=environ)


def from_extra(**extra: object) -> Loaded:
    return load_config(environ={}, extra={f"lmcache.{key}": extra[key] for key in extra})


# Sources.


def test_nothing_given_means_the_defaults() -> None:
    loaded = load_config(environ={})
    assert loaded.config == KitConfig()
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.origins.keys() == KEYS.keys()
    assert loaded.warnings == []


def test_the_walk_throughs_file_is_accepted_as_it_is_written(file: Path) -> None:
    loaded = from_text(file, WALK_THROUGH)
    config = loaded.config
    assert (config.chunk_size, config.local_cpu, config.max_local_cpu_size) == (256, True, 5.0)
    assert (config.enable_controller, config.controller_url) == (True, "localhost:9001")
    assert (config.distributed_url, config.lmcache_worker_ports) == ("localhost:8002", (8001,))
    assert loaded.warnings == []


def test_every_value_says_where_it_comes_from(file: Path) -> None:
    file.write_text(WALK_THROUGH)
    loaded = load_config(
        file=file,
        environ={"LMCACHE_MAX_LOCAL_CPU_SIZE": "2"},
        extra={"lmcache.cache_policy": "FIFO", "other": 1},
    )
    assert loaded.origins["chunk_size"] == f"{file}:1"
    assert loaded.origins["lmcache_worker_ports"] == f"{file}:9"
    assert loaded.origins["max_local_cpu_size"] == "LMCACHE_MAX_LOCAL_CPU_SIZE"
    assert loaded.origins["cache_policy"] == "kv_connector_extra_config"
    assert loaded.origins["lease_ttl_s"] == "default"


def test_the_environment_wins_over_the_file_and_vllms_extra_over_both(file: Path) -> None:
    file.write_text("chunk_size: 16\nmin_retrieve_tokens: 1\ncache_policy: LFU\n")
    loaded = load_config(
        file=file,
        environ={"LMCACHE_CHUNK_SIZE": "32", "LMCACHE_MIN_RETRIEVE_TOKENS": "2"},
        extra={"lmcache.chunk_size": 64},
    )
    config = loaded.config
    assert (config.chunk_size, config.min_retrieve_tokens, config.cache_policy) == (64, 2, "LFU")


def test_the_environment_may_name_the_file(file: Path) -> None:
    file.write_text("chunk_size: 16\n")
    assert from_environ(LMCACHE_CONFIG_FILE=str(file)).config.chunk_size == 16


def test_an_alias_in_a_later_source_wins_over_the_other_name(file: Path) -> None:
    loaded = from_text(
        file, "controller_url: localhost:1\n", LMCACHE_CONTROLLER_PULL_URL="localhost:2"
    )
    assert loaded.config.controller_url == "localhost:2"
    assert loaded.origins["controller_url"] == "LMCACHE_CONTROLLER_PULL_URL"


def test_two_names_of_one_key_must_not_differ(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"controller_url \(.*:1\) and controller_pull_url \(.*:2"
    ):
        from_text(file, "controller_url: localhost:1\ncontroller_pull_url: localhost:2\n")


def test_null_in_a_file_means_the_default(file: Path) -> None:
    loaded = from_text(file, "chunk_size: null\nmin_retrieve_tokens:\n")
    assert (loaded.config.chunk_size, loaded.config.min_retrieve_tokens) == (256, 0)


def test_an_empty_file_and_an_empty_variable_mean_nothing(file: Path) -> None:
    assert from_text(file, "# nothing\n", LMCACHE_CHUNK_SIZE="").config == KitConfig()


# Values.


@pytest.mark.parametrize("text", ["True", "true", "1", "yes", "on", " TRUE "])
def test_a_variable_may_say_true_in_many_ways(text: str) -> None:
    assert from_environ(LMCACHE_SAVE_DECODE_CACHE=text).config.save_decode_cache is True


@pytest.mark.parametrize("text", ["False", "false", "0", "no", "off"])
def test_a_variable_may_say_false_in_many_ways(text: str) -> None:
    assert from_environ(LMCACHE_SAVE_UNFULL_CHUNK=text).config.save_unfull_chunk is False


@pytest.mark.parametrize("value", [8001, "8001", [8001], "[8001]", " 8001, "])
def test_one_port_may_be_written_in_many_ways(value: object) -> None:
    assert from_extra(lmcache_worker_port=value).config.lmcache_worker_ports == (8001,)


@pytest.mark.parametrize("value", [[8001, 8002], "8001,8002", "[8001, 8002]", ["8001", "8002"]])
def test_several_ports_may_be_written_in_many_ways(value: object) -> None:
    assert from_extra(lmcache_worker_ports=value).config.lmcache_worker_ports == (8001, 8002)


@pytest.mark.parametrize(
    "url", ["localhost:9001", "10.0.0.1:1", "tcp://host.example:65535", "[::1]:9001"]
)
def test_addresses_are_host_and_port(url: str) -> None:
    assert from_extra(controller_url=url).config.controller_url == url


def test_options_of_codecs_are_a_mapping_or_json(file: Path) -> None:
    options = {"cachegen": {"level": 1}}
    assert from_text(file, "codec_options: {cachegen: {level: 1}}").config.codec_options == options
    text = '{"cachegen": {"level": 1}}'
    assert from_environ(LMCACHE_CODEC_OPTIONS=text).config.codec_options == options
    assert from_extra(codec_options=options).config.codec_options == options


def test_gibibytes_become_bytes() -> None:
    assert KitConfig(max_local_cpu_size=0.5).max_local_cpu_bytes == 512 * 1024**2


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        KitConfig().chunk_size = 1


@given(
    st.builds(
        KitConfig,
        chunk_size=st.integers(1, 65536),
        max_local_cpu_size=st.floats(0.001, 1e6),
        lmcache_instance_id=st.from_regex(r"\A[^\x00-\x1f\x7f]{1,64}\Z"),
        lmcache_worker_ports=st.none() | st.tuples(st.integers(1, 65535)),
        cache_socket=st.none() | st.just(Path("/tmp/x.sock")),
        cache_process=st.sampled_from(["spawn", "attach", "embedded"]),
    )
)
def test_a_configuration_survives_the_way_to_another_process(config: KitConfig) -> None:
    assert KitConfig.from_json(config.to_json()) == config


def test_key_files_are_found_from_any_working_directory() -> None:
    config = KitConfig(controller_key=Path("c.key"), worker_key=Path("~/w.key_secret"))
    assert config.controller_key == Path.cwd() / "c.key"
    assert config.worker_key == Path.home() / "w.key_secret"


# What is wrong is named with its place.


@pytest.mark.parametrize("key", ["controller_key", "worker_key"])
def test_one_key_file_without_the_other_is_an_error(key: str) -> None:
    with pytest.raises(ConfigError, match="controller_key and worker_key need each other"):
        load_config(environ={}, extra={f"lmcache.{key}": "/some/file"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("chunk_size: many", r"chunk_size: 'many' \(FILE:2\): .*integer"),
        ("chunk_size: 0", r"chunk_size: 0 \(FILE:2\): .*greater than or equal to 1"),
        ("chunk_size: true", r"chunk_size: True \(FILE:2\): a number is expected, not true"),
        ("chunk_size: 2.5", r"chunk_size: 2.5 \(FILE:2\): .*integer"),
        ("max_local_cpu_size: -1", r"max_local_cpu_size: -1 \(FILE:2\): .*greater than 0"),
        ("max_pinned_share: 1.5", r"max_pinned_share: 1\.5 \(FILE:2\): .*less than or equal to 1"),
        ("pin_timeout_sec: -1", r"pin_timeout_sec: -1 \(FILE:2\): .*greater than or equal to 0"),
        ("codec_options: '{'", r"codec_options: \*\*\* \(FILE:2\): not JSON: "),
        ("codec_options: {x: 1}", r"codec_options: \{'x': 1\} \(FILE:2\): .*dictionary"),
        ("max_local_cpu_size: .inf", r"max_local_cpu_size: inf \(FILE:2\): .*finite"),
        ("local_cpu: perhaps", r"local_cpu: 'perhaps' \(FILE:2\): .*boolean"),
        ("cache_process: fork", r"cache_process: 'fork' \(FILE:2\): .*'spawn', 'attach'"),
        ("controller_url: localhost", r"controller_url: 'localhost' \(FILE:2\): .*HOST:PORT"),
        ("controller_url: 'h:70000'", r"controller_url: 'h:70000' \(FILE:2\): .*HOST:PORT"),
        ("controller_url: 9001", r"controller_url: 9001 \(FILE:2\): .*string"),
        ("lmcache_worker_port: 0", r"lmcache_worker_port: 0 \(FILE:2\): .*greater"),
        ("lmcache_worker_ports: [1, x]", r"lmcache_worker_ports: \[1, 'x'\] \(FILE:2\): .*integer"),
        ('lmcache_instance_id: "a\\nb"', r"lmcache_instance_id: 'a\\nb' \(FILE:2\): .*pattern"),
        ("enable_controller: true", r"enable_controller needs controller_url"),
        ("save_decode_cache: [", r"FILE:3: not YAML"),
        ("  chunk_size: 1", r"FILE:2: not YAML \(column 1?\d\): mapping values are not allowed"),
        ("min_retrieve_tokens: 1", r"FILE:2: 'min_retrieve_tokens' stands already in line 1"),
        ("chunk_size: !!python/object/apply:os.getcwd []", r"FILE:2: chunk_size: could not determ"),
        ("chunksize: 1", r"unknown configuration key 'chunksize' \(FILE:2\). Did you mean 'chunk_"),
        ("locl_disk: x", r"'locl_disk' \(FILE:2\). Did you mean 'local_disk'"),
        ("zzz: 1", r"unknown configuration key 'zzz' \(FILE:2\). 'lmcache-kit show-config' lists"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(file: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_text(file, f"min_retrieve_tokens: 7\n{line}\n")
    assert re.search(message.replace("FILE", re.escape(str(file))), str(caught.value))


def test_a_password_in_a_url_is_not_shown(file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        from_text(file, "remote_url: lm://me:s3cret@cache.example:1")
    assert "'lm://***@cache.example:1'" in str(refused.value)
    assert "begins with one of redis, rediss" in str(refused.value)


def test_tiers_stand_in_their_order_with_their_options(file: Path) -> None:
    text = """
        tiers: [Mine, ValkeyBackend]
        backend_options: {Mine: {a: 1}, ValkeyBackend: {ttl_s: 60}}
        local_disk: file:///kv
        max_local_disk_size: 3
        remote_url: redis://cache:6379
    """
    config = from_text(file, textwrap.dedent(text)).config
    assert config.lower_tiers == {
        "Mine": {"a": 1},
        "ValkeyBackend": {"url": "redis://cache:6379", "ttl_s": 60},
        "LocalDiskBackend": {
            "path": "/kv",
            "max_size_gib": 3.0,
            "subfolder": "lmcache_default_instance",
        },
    }
    assert config.locations == ("LocalCPUBackend", *config.lower_tiers)


def test_a_tier_that_tiers_names_has_the_options_that_its_keys_set(file: Path) -> None:
    text = "tiers: [LocalDiskBackend, Mine]\nlocal_disk: /kv\nmax_local_disk_size: 3\n"
    config = from_text(file, text).config
    assert list(config.lower_tiers) == ["LocalDiskBackend", "Mine"]
    assert config.lower_tiers["LocalDiskBackend"]["path"] == "/kv"


def test_options_win_over_the_keys_of_the_same_plugin(file: Path) -> None:
    text = """
        local_disk: /kv
        max_local_disk_size: 3
        backend_options: '{"LocalDiskBackend": {"max_size_gib": 7}}'
    """
    config = from_text(file, textwrap.dedent(text)).config
    assert config.lower_tiers["LocalDiskBackend"]["max_size_gib"] == 7


def test_a_key_of_a_transport_becomes_its_option() -> None:
    config = from_environ(LMCACHE_NIXL_BACKENDS="UCX, GDS").config
    assert config.transport_options == {"nixl": {"backends": ["UCX", "GDS"]}}


def test_what_a_key_of_a_plugin_sets_has_the_origin_of_that_key(file: Path) -> None:
    loaded = from_text(file, "chunk_size: 1\nremote_url: redis://cache:6379\n")
    assert loaded.plugin_values == {"remote_url": "redis://cache:6379"}
    where = {key for key, origin in loaded.origins.items() if origin == f"{file}:2"}
    assert where == {"remote_url", "tiers", "backend_options"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiers: [A, A]", "names a backend twice"),
        ("tiers: A, LocalCPUBackend", "LocalCPUBackend is none of them"),
        ("memory_backend: Mine\ntiers: Mine", "Mine is none of them"),
        ("local_disk: /kv", r"local_disk \(.*:1\) needs max_local_disk_size: GiB of files"),
        (
            "local_disk: /kv\nmax_local_disk_size: -1",
            r"max_local_disk_size: -1 \(.*:2\): .*greater",
        ),
        (
            "local_disk: /kv\nmax_local_disk_size: many",
            r"size: 'many' \(.*:2\): a number is expected",
        ),
        ("local_disk: ~nobody-has-this-name/kv", "Could not determine home directory"),
        ("nixl_backends: 5", r"nixl_backends: 5 \(.*:1\): .*valid tuple"),
        ("local_disk: true", "a folder is expected"),
        ("backend_options: {B: {}}", "has 'B', which tiers does not name"),
        (
            "remote_url: cache:6379",
            r"remote_url: .cache:6379. \(.*:1\): .*begins with one of redis",
        ),
        ("tiers: [a, b, c, d, e, f, g, h]", "there may be 7 tiers"),
    ],
)
def test_tiers_that_cannot_be_are_refused(file: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_text(file, text)


@pytest.mark.parametrize(
    "text",
    ["local_disk: false", "local_disk: null", "max_local_disk_size: 5", "remote_url:", "tiers: []"],
)
def test_no_tier_is_none(file: Path, text: str) -> None:
    assert from_text(file, text).config.lower_tiers == {}


def test_a_value_without_end_is_shown_in_short(file: Path) -> None:
    levels = ["&a0 [x]", *(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    with pytest.raises(ConfigError, match=r"chunk_size: .*integer") as caught:
        from_text(file, f"chunk_size: [{', '.join(levels)}]")
    assert len(str(caught.value)) < 1000


def test_a_file_without_end_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        from_text(file, "chunk_size: " + "[" * 5000)


def test_mistakes_of_every_kind_and_source_are_all_named(file: Path) -> None:
    file.write_text(
        "chunk_size: 0\n"
        "remote_url: x\n"
        "chunksize: 1\n"
        "tiers: [A, A]\n"
        "chunk_size: 2\n"
        "controller_key: /c.key\n"
        "controller_url: localhost:1\n"
        "controller_pull_url: localhost:2\n"
        "lease_ttl_s: !!int many\n"
    )
    environ = {
        "LMCACHE_CACHE_LINGER_S": "-1",
        "LMCACHE_INSTANCE_ID": "a",
        "LMCACHE_KIT_PLUGINS": "-disk_backend",
        "LMCACHE_LOCAL_DISK": "/kv",
    }
    with pytest.raises(ConfigError) as refused:
        load_config(file=file, environ=environ, extra={"lmcache.zzz": 1, "lmcache.yyy": 2})
    for told in (
        f"chunk_size: 0 ({file}:1): Input should be greater",
        f"remote_url: 'x' ({file}:2): ",
        f"unknown configuration key 'chunksize' ({file}:3). Did you mean 'chunk_size'?",
        f"tiers names a backend twice ({file}:4)",
        f"{file}:5: 'chunk_size' stands already in line 1",
        f"need each other: set both, or neither ({file}:6)",
        f"controller_url ({file}:7) and controller_pull_url ({file}:8) mean the same and differ",
        f"{file}:9: lease_ttl_s: no value of the type",
        "cache_linger_s: '-1' (LMCACHE_CACHE_LINGER_S): ",
        "'instance_id' (LMCACHE_INSTANCE_ID). Did you mean 'LMCACHE_LMCACHE_INSTANCE_ID'?",
        "local_disk (LMCACHE_LOCAL_DISK) sets backend LocalDiskBackend",
        "unknown configuration key 'zzz' (kv_connector_extra_config)",
        "unknown configuration key 'yyy' (kv_connector_extra_config)",
    ):
        assert told in str(refused.value)


def test_a_file_that_is_no_yaml_hides_no_mistake_elsewhere(file: Path) -> None:
    file.write_text("a: [")
    with pytest.raises(ConfigError, match=r"example\.yaml.*: not YAML.*; unknown .* 'zzz'"):
        load_config(file=file, environ={}, extra={"lmcache.zzz": 1})


def test_keys_contradict_each_other_only_where_both_are_right(file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        from_text(file, "enable_controller: true\ncontroller_url: nonsense\n")
    assert "needs controller_url" not in str(refused.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(file: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"example.yaml:1: a configuration is lines of 'key: "):
        from_text(file, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigError, match=r"cannot read .*missing.yaml.*No such file"):
        load_config(file=missing, environ={})


def test_a_file_that_the_environment_names_wrongly_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.yaml.*LMCACHE_CONFIG_FILE names it"):
        from_environ(LMCACHE_CONFIG_FILE=str(tmp_path / "missing.yaml"))


def test_a_file_that_is_no_text_is_named(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read .*example.yaml"):
        load_config(file=file, environ={})


def test_a_mistake_in_a_variable_is_named_with_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"chunk_size: 'x' \(LMCACHE_CHUNK_SIZE\): .*integer"):
        from_environ(LMCACHE_CHUNK_SIZE="x")


def test_a_mistake_in_vllms_extra_is_named_with_it() -> None:
    with pytest.raises(ConfigError, match=r"chunk_size: 'x' \(kv_connector_extra_config\)"):
        from_extra(chunk_size="x")


# Keys that are not served.


@pytest.mark.parametrize(
    "key",
    ["local_disk_path_sharding", "remote_serde", "enable_blending", "pd_role", "extra_config"],
)
def test_a_key_that_only_lmcache_serves_is_warned_about_once(file: Path, key: str) -> None:
    file.write_text(f"{key}: something\n")
    (warning,) = load_config(file=file, environ={}, extra={f"lmcache.{key}": "x"}).warnings
    assert warning.startswith(f"keys of LMCache without effect here: {key} ({file}:1")
    assert f"{key} (kv_connector_extra_config" in warning


@pytest.mark.parametrize("value", ["null", "false", "0", "''"])
def test_an_unserved_key_that_asks_for_nothing_is_no_warning(file: Path, value: str) -> None:
    text = f"enable_blending: {value}\nremote_serde: {value}\n"
    assert from_text(file, text).warnings == []


def test_a_near_miss_in_the_environment_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"LMCACHE_CHUNKSIZE\). Did you mean 'LMCACHE_CHUNK_SIZE'"
    ):
        from_environ(LMCACHE_CHUNKSIZE="16")


def test_variables_of_other_software_are_only_warned_about_in_one_line() -> None:
    (warning,) = from_environ(LMCACHE_DASHBOARD_THEME="dark", LMCACHE_GRAFANA="1").warnings
    assert warning.endswith("no configuration keys: LMCACHE_DASHBOARD_THEME, LMCACHE_GRAFANA")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LMCACHE_LOG_LEVEL", "DEBUG"),
        ("LMCACHE_TRACK_USAGE", "false"),
        ("LMCACHE_DISABLE_BANNER", "1"),
        ("LMCACHE_KIT_PLUGINS", "-x"),
        ("LMCACHE_KIT_TOKEN", "secret"),
        ("LMCACHE_CONTROLLER_SERVICE_HOST", "10.0.0.1"),
        ("LMCACHE_CONTROLLER_SERVICE_PORT_HTTP", "9000"),
        ("LMCACHE_CONTROLLER_PORT", "tcp://10.0.0.1:9001"),
        ("LMCACHE_CONTROLLER_PORT_9001_TCP_ADDR", "10.0.0.1"),
        ("LMCACHE_WORKER_PORT", "tcp://10.0.0.1:8001"),
        ("PATH", "/bin"),
    ],
)
def test_variables_that_are_no_keys_are_passed_over(name: str, value: str) -> None:
    loaded = from_environ(**{name: value})
    assert loaded.config == KitConfig()
    assert loaded.warnings == []


def test_extra_configuration_of_others_is_passed_over() -> None:
    assert load_config(environ={}, extra={"shared_storage_path": "/x"}).config == KitConfig()


def test_an_unknown_extra_key_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown configuration key 'chunk_sizes'"):
        from_extra(chunk_sizes=1)


# Memory by name.


def test_the_first_tier_may_be_another_backend_that_has_options(file: Path) -> None:
    text = "memory_backend: Mine\nlocal_cpu: false\nbackend_options: {Mine: {a: 1}}\n"
    config = from_text(file, text).config
    assert config.locations == ("Mine",)
    assert config.backend_options == {"Mine": {"a": 1}}


# Keys that plugins declare.

ACME = """
@hookimpl
def register_backends():
    keys = ({keys})
    return [BackendSpec("{name}", "{name}:a", "", config="acme_options:Options", keys=keys)]
"""
OPTIONS = """
from pydantic import BaseModel, Field
class Options(BaseModel, extra="forbid"):
    shelves: int = Field(default=1, ge=1)
"""
SHELVES = 'ConfigKey("acme_shelves", option="shelves", help="Shelves", type="number", selects=True)'


def test_a_plugin_brings_a_key_of_its_own(site: FakeSite) -> None:
    site.install("acme-vault", ACME.format(name="Vault", keys=f"{SHELVES},"))
    site.module("acme_options", OPTIONS)
    assert from_environ(LMCACHE_ACME_SHELVES="3").config.lower_tiers == {"Vault": {"shelves": 3.0}}
    with pytest.raises(ConfigError, match=r"acme_shelves: '0' \(LMCACHE_ACME_SHELVES\): .*greater"):
        from_environ(LMCACHE_ACME_SHELVES="0")
    with pytest.raises(ConfigError, match=r"Did you mean 'lmcache\.acme_shelves'"):
        from_extra(acme_shelve=1)
    (found,) = (each for each in declarations(Plugins.load()) if each.name == "acme_shelves")
    assert (found.help, found.plugin) == ("Shelves.", "Vault")


def test_a_key_that_two_plugins_declare_can_be_used_from_neither(site: FakeSite) -> None:
    site.install("acme-one", ACME.format(name="One", keys=f"{SHELVES},"))
    site.install("acme-two", ACME.format(name="Two", keys=f"{SHELVES},"))
    with pytest.raises(ConfigError, match=r"acme_shelves \(.*\) is a key of acme-one and acme-two"):
        from_extra(acme_shelves=1)


def test_a_plugin_cannot_take_a_key_of_the_kit(site: FakeSite) -> None:
    keys = SHELVES.replace("acme_shelves", "chunk_size")
    site.install("acme-vault", ACME.format(name="Vault", keys=f"{keys},"))
    assert from_extra(chunk_size=3).config.chunk_size == 3
    assert len(declarations(Plugins.load())) == len({*KEYS, *OF_OURS})


def test_a_key_whose_plugin_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = (FirstParty("backend", "Acme", "lmcache-kit-acme", keys=("acme_folder",)),)
    monkeypatch.setattr("lmcache_kit.first_party.FIRST_PARTY", ours)
    with pytest.raises(ConfigError) as caught:
        from_extra(acme_folder="/kv")
    assert str(caught.value) == (
        "acme_folder (kv_connector_extra_config) sets backend Acme: "
        "no backend 'Acme' is installed. pip install lmcache-kit-acme"
    )
    assert from_extra(acme_folder=False).warnings == []


def test_a_key_whose_plugin_is_blocked_says_so() -> None:
    environ = {"LMCACHE_KIT_PLUGINS": "-valkey_backend", "LMCACHE_REMOTE_URL": "redis://h:1"}
    with pytest.raises(ConfigError, match=r"remote_url .*LMCACHE_REMOTE_URL.* keeps out"):
        load_config(environ=environ)


def test_no_plugin_is_loaded_for_keys_of_the_kit(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plugins, "load", lambda **_: pytest.fail("it loads plugins"))
    assert from_text(file, WALK_THROUGH).warnings == []


# Scopes.


def test_keys_that_the_cache_process_reads_tell_two_of_them_apart() -> None:
    digest = settings_digest(KitConfig())
    for other in (
        KitConfig(cache_policy="LFU"),
        KitConfig(memory_backend="Mine"),
        KitConfig(tiers=("Mine",)),
        KitConfig(tiers=("Mine",), backend_options={"Mine": {"a": 1}}),
        from_extra(nixl_backends="GDS").config,
        from_extra(remote_url="redis://h:1").config,
    ):
        assert settings_digest(other) != digest
    for same in (
        KitConfig(chunk_size=3),
        KitConfig(save_decode_cache=True),
        KitConfig(distributed_url="x:1"),
        KitConfig(cache_process="attach"),
    ):
        assert settings_digest(same) == digest


# Documentation.


def test_every_key_is_declared_with_help_that_begins_with_a_sentence() -> None:
    for each in declarations(Plugins.load()):
        assert each.help.endswith("."), each.name
        assert 0 < len(each.summary) < 100, each.name
        assert each.name == each.name.lower()


def test_the_documentation_has_every_key_as_it_is_declared() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert keys_table() in text, "run: python -m tools.docs.keys"


def test_the_documentation_has_every_variable_of_the_kit() -> None:
    sources = [*ROOT.glob("lmcache_kit/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]
    used = {name for path in sources for name in re.findall(r"LMCACHE_KIT_\w+", path.read_text())}
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert used == set(re.findall(r"LMCACHE_KIT_\w+", text))


def test_the_example_is_the_walk_throughs_file() -> None:
    text = (ROOT / "examples" / "lookup" / "example.yaml").read_text()
    assert text == WALK_THROUGH


def test_reading_the_kits_own_keys_imports_no_registry_of_plugins() -> None:
    code = (
        "import sys; from lmcache_kit.config import load_config;"
        "load_config(environ={'LMCACHE_CHUNK_SIZE': '64'});"
        "print('lmcache_kit.plugins' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
