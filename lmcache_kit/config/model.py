"""The configuration's keys, their types and defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

GIB = 1024**3
MEMORY = "LocalCPUBackend"
DISK = "LocalDiskBackend"
SERVER = "ValkeyBackend"
SERVER_SCHEMES = ("redis", "rediss", "valkey", "valkeys", "unix")
MAX_TIERS = 7
"""With memory as many locations as the control plane takes."""

_HOST_PORT = re.compile(
    r"(?:tcp://)?(?:\[(?P<six>[0-9a-fA-F:.%]+)\]|(?P<host>[^\s:/\[\]]+)):(?P<port>\d+)"
)


def _int_list(value: Any) -> Any:
    """``8001``, ``"8001"``, ``"8001, 8002"``, ``"[8001, 8002]"`` or a list."""
    if isinstance(value, str):
        value = [part.strip() for part in value.strip().strip("[]").split(",") if part.strip()]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return value


def _text_list(value: Any) -> Any:
    """``UCX``, ``"UCX, GDS"`` or a list."""
    if isinstance(value, str):
        return [part.strip(" '\"") for part in value.strip().strip("[]").split(",") if part.strip()]
    return value


def _address(value: Any) -> Any:
    if value is None or not isinstance(value, str):
        return value
    match = _HOST_PORT.fullmatch(value)
    if not match or not 0 < int(match["port"]) < 65536:
        raise ValueError("an address is HOST:PORT, for example localhost:9001")
    return value


def _absolute(value: Path | None) -> Path | None:
    """The cache process has another working directory."""
    return value and value.expanduser().absolute()


def _folder(value: Any) -> Any:
    """A path, or ``file://`` and a path; ``false`` is none, as LMCache has it."""
    if value is False or (isinstance(value, str) and value.lower() == "false"):
        return None
    if value is True:
        raise ValueError("a folder is expected, for example /var/cache/kv")
    return value.removeprefix("file://") if isinstance(value, str) else value


def _server(value: Any) -> Any:
    scheme = value.partition("://")[0] if isinstance(value, str) else ""
    if isinstance(value, str) and scheme not in SERVER_SCHEMES:
        raise ValueError(f"a URL is expected that begins with one of {', '.join(SERVER_SCHEMES)}")
    return value


def _mapping(value: Any) -> Any:
    """A mapping, or one written as JSON, as a variable has it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def _number(value: Any) -> Any:
    """Booleans are ints to Python; ``chunk_size: true`` is a mistake all the same."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


Port = Annotated[int, Field(ge=1, le=65535), BeforeValidator(_number)]
Rank = Annotated[int, Field(ge=0, le=65535), BeforeValidator(_number)]
Address = Annotated[str | None, BeforeValidator(_address)]
KeyFile = Annotated[Path | None, AfterValidator(_absolute)]
Count = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]


class KitConfig(BaseModel):
    """One instance's configuration; attributes are called what LMCache calls its keys.

    >>> config = KitConfig(chunk_size=64)
    >>> KitConfig.from_json(config.to_json()) == config
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk_size: Count = Field(default=256, ge=1, le=65536, description="tokens per chunk")
    local_cpu: bool = Field(
        default=True, description="keep KV in this host's memory (LocalCPUBackend)"
    )
    max_local_cpu_size: Number = Field(
        default=5.0, gt=0, description="GiB of memory for KV, at most"
    )
    tiers: Annotated[tuple[str, ...], BeforeValidator(_text_list)] = Field(
        default=(), description="backends below memory, in the order in which they are asked"
    )
    backend_options: Annotated[dict[str, dict[str, Any]], BeforeValidator(_mapping)] = Field(
        default={}, description="options of these backends, by their names"
    )
    local_disk: Annotated[Path | None, BeforeValidator(_folder), AfterValidator(_absolute)] = Field(
        default=None, description="folder for LocalDiskBackend, a tier: a path or a file:// URL"
    )
    max_local_disk_size: Number = Field(
        default=0.0, ge=0, description="GiB of files in local_disk, at most"
    )
    remote_url: Annotated[str | None, BeforeValidator(_server)] = Field(
        default=None, description="server for ValkeyBackend, a tier: redis://HOST:PORT or the like"
    )
    save_decode_cache: bool = Field(default=False, description="save generated tokens' KV too")
    save_unfull_chunk: bool = Field(default=True, description="save a prompt's last, partial chunk")
    cache_policy: str = Field(
        default="LRU", min_length=1, description="eviction: LRU, FIFO, LFU or a plugin's"
    )
    min_retrieve_tokens: Count = Field(
        default=0, ge=0, description="do not load a match of fewer tokens than this"
    )
    blocking_timeout_secs: Number = Field(
        default=1.0, gt=0, description="seconds to wait for a lookup; a late answer is a miss"
    )

    enable_controller: bool = Field(default=False, description="report to a controller")
    lmcache_instance_id: str = Field(
        default="lmcache_default_instance",
        min_length=1,
        max_length=256,
        pattern=r"^[^\x00-\x1f\x7f]+$",
        description="this instance's name",
    )
    controller_url: Address = Field(
        default=None,
        description="HOST:PORT of the controller's monitor (also: controller_pull_url)",
    )
    controller_key: KeyFile = Field(
        default=None, description="controller.key of the controller, to encrypt what it is told"
    )
    worker_key: KeyFile = Field(
        default=None, description="our secret key file, to prove who we are; with controller_key"
    )
    controller_reply_url: Address = Field(
        default=None, description="accepted; one connection to controller_url carries both ways"
    )
    lmcache_worker_ports: Annotated[tuple[Port, ...] | None, BeforeValidator(_int_list)] = Field(
        default=None, description="shown in /query_worker_info; no port is opened"
    )
    lmcache_worker_ids: Annotated[tuple[Rank, ...] | None, BeforeValidator(_int_list)] = Field(
        default=None, description="ranks that report to the controller; all if absent"
    )
    lmcache_worker_heartbeat_time: Number = Field(
        default=1.0, ge=0.05, le=3600, description="seconds between heartbeats to the controller"
    )
    distributed_url: str | None = Field(
        default=None,
        description="accepted; nothing listens there, peers are found by the controller",
    )

    enable_p2p: bool = Field(
        default=False, description="take part in moves of KV between instances"
    )
    p2p_host: str = Field(
        default="localhost",
        min_length=1,
        max_length=255,
        pattern=r"^[^\s/]+$",
        description="address of this host for peers; the peer port is bound there",
    )
    p2p_init_ports: Annotated[tuple[Port, ...] | None, BeforeValidator(_int_list)] = Field(
        default=None, description="the first is the peer port; any free one if absent"
    )
    p2p_lookup_ports: Annotated[tuple[Port, ...] | None, BeforeValidator(_int_list)] = Field(
        default=None, description="accepted; nothing listens there, the controller looks up"
    )
    p2p_tls_cert: KeyFile = Field(
        default=None, description="our certificate (PEM): peers talk TLS; with the next two"
    )
    p2p_tls_key: KeyFile = Field(default=None, description="our certificate's key (PEM)")
    p2p_tls_ca: KeyFile = Field(
        default=None, description="whose certificates peers must show (PEM)"
    )
    transfer_channel: str = Field(
        default="auto",
        min_length=1,
        description="how KV moves between instances: auto, nixl, tcp or a plugin's",
    )
    nixl_backends: Annotated[tuple[str, ...] | None, BeforeValidator(_text_list)] = Field(
        default=None, description="backends of NIXL; UCX if absent"
    )
    transport_options: Annotated[dict[str, dict[str, Any]], BeforeValidator(_mapping)] = Field(
        default={}, description="options of transports, by their names"
    )

    cache_process: Literal["spawn", "attach", "embedded"] = Field(
        default="spawn",
        description="start a cache process, attach to one, or run it in this process",
    )
    cache_linger_s: Number = Field(
        default=30.0, ge=0, description="seconds that a spawned cache outlives its last client"
    )
    cache_start_timeout_s: Number = Field(
        default=20.0, gt=0, description="seconds to wait for a cache process to start"
    )
    cache_socket: Path | None = Field(
        default=None,
        description="Unix socket of the cache process; derived from the instance if absent",
    )
    lease_ttl_s: Number = Field(
        default=120.0, gt=0, description="seconds after which a forgotten lease ends"
    )

    max_pinned_share: Number = Field(
        default=0.5, ge=0, le=1, description="share of the memory that pinned chunks may fill"
    )
    pin_timeout_sec: Number | None = Field(
        default=None,
        ge=0,
        description="seconds that a pin without a time of its own lasts; 0: ever",
    )

    store_codec: str | None = Field(
        default=None, min_length=1, description="codec that encodes every chunk once it is stored"
    )
    codec_options: Annotated[dict[str, dict[str, Any]], BeforeValidator(_mapping)] = Field(
        default={}, description="options of codecs, by their names"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.enable_controller and not self.controller_url:
            raise ValueError("enable_controller needs controller_url, for example localhost:9001")
        if (self.controller_key is None) != (self.worker_key is None):
            raise ValueError("controller_key and worker_key need each other: set both, or neither")
        tls = (self.p2p_tls_cert, self.p2p_tls_key, self.p2p_tls_ca)
        if any(tls) and not all(tls):
            raise ValueError("p2p_tls_cert, p2p_tls_key and p2p_tls_ca need each other")
        if not self.local_cpu:
            raise ValueError(
                "local_cpu: false leaves no place for KV: it comes and goes through host memory; "
                "give it little of that by max_local_cpu_size"
            )
        if self.local_disk and not self.max_local_disk_size:
            raise ValueError("local_disk needs max_local_disk_size, in GiB")
        if len(set(self.tiers)) < len(self.tiers):
            raise ValueError("tiers names a backend twice")
        if MEMORY in self.tiers:
            raise ValueError(f"tiers are below memory: {MEMORY} is none of them")
        if len(self.lower_tiers) > MAX_TIERS:
            raise ValueError(f"there may be {MAX_TIERS} tiers")
        idle = [name for name in self.backend_options if name not in self.lower_tiers]
        if idle:
            raise ValueError(f"backend_options has {idle[0]!r}, which tiers does not name")
        return self

    @property
    def location(self) -> str:
        """Name of the backend that KV comes and goes through."""
        return MEMORY

    @property
    def lower_tiers(self) -> dict[str, dict[str, Any]]:
        """Backends below memory, in order, each with its options; none is an empty mapping."""
        served: dict[str, dict[str, Any]] = {}
        if self.local_disk:
            served[DISK] = {
                "path": str(self.local_disk),
                "max_size_gib": self.max_local_disk_size,
                "subfolder": self.lmcache_instance_id,
            }
        if self.remote_url:
            served[SERVER] = {"url": self.remote_url}
        names = (*self.tiers, *(name for name in served if name not in self.tiers))
        return {name: served.get(name, {}) | self.backend_options.get(name, {}) for name in names}

    @property
    def locations(self) -> tuple[str, ...]:
        """Memory and what is below it."""
        return (self.location, *self.lower_tiers)

    @property
    def max_local_cpu_bytes(self) -> int:
        """``max_local_cpu_size`` in bytes."""
        return int(self.max_local_cpu_size * GIB)

    def to_json(self) -> str:
        """Everything, for another process."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> KitConfig:
        """The reverse of :meth:`to_json`."""
        return cls.model_validate(json.loads(text))
