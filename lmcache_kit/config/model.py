"""The configuration's keys, their types and defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

GIB = 1024**3

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
        if not self.local_cpu:
            raise ValueError(
                "local_cpu: false leaves no place for KV; host memory is the only one served"
            )
        return self

    @property
    def location(self) -> str:
        """Name of the backend that holds the KV."""
        return "LocalCPUBackend"

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
