"""The keys of the kit: names, types, defaults, scopes and help."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

from lmcache_kit.config.declare import Declaration, declared, key
from lmcache_kit.config.redaction import redacted
from lmcache_kit.config.values import (
    Address,
    Count,
    KeyFile,
    Names,
    Number,
    Options,
    Ports,
    Ranks,
    SocketPath,
)
from lmcache_kit.first_party import DEFAULT_MEMORY_BACKEND

GIB = 1024**3
DEFAULT_INSTANCE = "lmcache_default_instance"
MAX_TIERS = 7
"""With memory as many locations as the control plane takes."""


FIELDS_ONLY = {"check": "fields"}
"""Context of a validation that leaves :func:`contradictions` to its caller."""


class KitConfig(BaseModel):
    """The configuration of one instance, without the keys of plugins: those are options by now.

    >>> config = KitConfig(chunk_size=64)
    >>> KitConfig.from_json(config.to_json()) == config
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    chunk_size: Count = key(
        256,
        "Tokens per chunk. Instances that share KV need the same value.",
        scope="client",
        ge=1,
        le=65536,
    )
    weights: Literal["sampled", "full"] = key(
        "sampled",
        "How the weights of a model are identified, since KV is of use to the same weights only. "
        "`sampled` reads three pages of each tensor and tells any training, merge or quantisation "
        "apart; `full` reads everything, and finds edits of single elements too. Instances that "
        "share KV need the same value.",
        scope="client",
        lmcache=False,
    )
    weights_id: str | None = key(
        None,
        "Name of the weights, instead of reading them. For weights that lie in no folder: whoever "
        "sets it knows that equal names mean equal weights.",
        scope="client",
        lmcache=False,
        min_length=1,
        max_length=200,
    )
    local_cpu: bool = key(
        True,
        "Keep KV in memory of this host, as LMCache spells the default of `memory_backend`. "
        "`false` has no effect with that default: KV passes through memory, whatever tiers there "
        "are.",
        scope="cache",
    )
    max_local_cpu_size: Number = key(
        5.0,
        "GiB of memory for KV, at most. The memory is taken as it fills.",
        scope="cache",
        gt=0,
    )
    memory_backend: str = key(
        DEFAULT_MEMORY_BACKEND,
        "Backend of the first tier, the memory that all KV passes through. Its name is the "
        "location of that memory in REST and in commands.",
        scope="cache",
        lmcache=False,
        min_length=1,
    )
    tiers: Names = key(
        (),
        "Backends below memory by name, in the order in which lookups ask them.",
        scope="cache",
        lmcache=False,
    )
    backend_options: Options = key(
        {},
        "Options of these backends by name; in a variable as JSON. The page of a plugin lists its "
        "options.",
        scope="cache",
        lmcache=False,
    )
    save_decode_cache: bool = key(False, "Save the KV of generated tokens too.", scope="client")
    save_unfull_chunk: bool = key(True, "Save the last, partial chunk of a prompt.", scope="client")
    cache_policy: str = key(
        "LRU",
        "Eviction policy: `LRU`, `FIFO`, `LFU`, or one of a plugin.",
        scope="cache",
        min_length=1,
    )
    min_retrieve_tokens: Count = key(
        0, "Smallest match in tokens that is loaded.", scope="client", ge=0
    )
    blocking_timeout_secs: Number = key(
        1.0,
        "Seconds that vLLM waits for a lookup. A late answer is a miss.",
        scope="client",
        gt=0,
    )

    enable_controller: bool = key(
        False, "Report to a controller. Needs `controller_url`.", scope="cache"
    )
    lmcache_instance_id: str = key(
        DEFAULT_INSTANCE,
        "Name of this instance, one vLLM server. Clients find its cache process by it.",
        scope="client",
        min_length=1,
        max_length=256,
        pattern=r"^[^\x00-\x1f\x7f]+$",
    )
    controller_url: Address = key(
        None,
        "`HOST:PORT` of the controller's monitor port.",
        scope="cache",
        aliases=("controller_pull_url",),
    )
    controller_key: KeyFile = key(
        None,
        "Path of the controller's `controller.key`, which encrypts the connection to it. Needs "
        "`worker_key`.",
        scope="cache",
        lmcache=False,
    )
    worker_key: KeyFile = key(
        None,
        "Path of this worker's `NAME.key_secret`, which proves its identity to the controller. "
        "Needs `controller_key`.",
        scope="cache",
        lmcache=False,
    )
    controller_reply_url: Address = key(
        None,
        "Accepted and not used. One connection to `controller_url` carries both directions.",
        scope="accepted",
    )
    lmcache_worker_ports: Ports = key(
        None,
        'A port per rank, shown by `/query_worker_info`: `8001`, `"8001,8002"` or a list. No port '
        "is opened.",
        scope="cache",
        aliases=("lmcache_worker_port",),
    )
    lmcache_worker_ids: Ranks = key(
        None, "Ranks that report to the controller. All if absent.", scope="cache"
    )
    lmcache_worker_heartbeat_time: Number = key(
        1.0,
        "Seconds between heartbeats to the controller. It hides an instance after three missed "
        "ones.",
        scope="cache",
        ge=0.05,
        le=3600,
    )
    distributed_url: str | None = key(
        None,
        "Accepted and not used. Nothing listens there; the controller knows the peers.",
        scope="accepted",
    )

    enable_p2p: bool = key(
        False,
        "Take part in moves of KV between instances. This opens the peer port.",
        scope="cache",
    )
    p2p_host: str = key(
        "localhost",
        "Name or address by which peers reach this host. The peer port is bound to it, so the "
        "default serves peers on the same host.",
        scope="cache",
        min_length=1,
        max_length=255,
        pattern=r"^[^\s/]+$",
    )
    p2p_init_ports: Ports = key(
        None,
        "The peer port. Of a list only the first is opened, since one cache process holds all "
        "ranks. If absent any free port; the controller tells peers.",
        scope="cache",
    )
    p2p_lookup_ports: Ports = key(
        None,
        "Accepted and not used. Nothing listens there; the controller looks up.",
        scope="accepted",
    )
    p2p_tls_cert: KeyFile = key(
        None,
        "Path of this host's certificate (PEM), for TLS between peers. With the next two, only "
        "peers whose certificate is of the same authority and names their `p2p_host` are talked "
        "to.",
        scope="cache",
        lmcache=False,
    )
    p2p_tls_key: KeyFile = key(
        None, "Path of the key of `p2p_tls_cert` (PEM).", scope="cache", lmcache=False
    )
    p2p_tls_ca: KeyFile = key(
        None,
        "Path of the certificate of the authority that peers must have theirs from (PEM).",
        scope="cache",
        lmcache=False,
    )
    transfer_channel: str = key(
        "auto",
        "Transport of moves by name, or `auto`. `auto`: the fastest that both sides can use. A "
        "name: that one, and one for any network where it cannot reach a peer. `lmcache-kit "
        "doctor` lists the usable ones.",
        scope="cache",
        min_length=1,
    )
    transport_options: Options = key(
        {},
        "Options of transports by name; in a variable as JSON. The page of a plugin lists its "
        "options.",
        scope="cache",
        lmcache=False,
    )

    cache_process: Literal["spawn", "attach", "embedded"] = key(
        "spawn",
        "Whether to start a cache process. `spawn`: the first client starts it. `attach`: clients "
        "use the one that `lmcache-kit cache-server` runs. `embedded`: it is a thread of the "
        "client, for tests and scripts.",
        scope="client",
        lmcache=False,
    )
    cache_linger_s: Number = key(
        30.0,
        "Seconds that a spawned cache process outlives its last client. A vLLM that is back by "
        "then finds it warm: set more than your model takes to load.",
        scope="cache",
        lmcache=False,
        ge=0,
    )
    cache_start_timeout_s: Number = key(
        20.0,
        "Seconds that a client waits for a cache process to start.",
        scope="client",
        lmcache=False,
        gt=0,
    )
    cache_socket: SocketPath = key(
        None,
        "Absolute path of the Unix socket of the cache process. If absent: "
        "`$XDG_RUNTIME_DIR/lmcache-kit/`, else `/tmp/lmcache-kit-<uid>/`, and a name derived from "
        "the instance's.",
        scope="client",
        lmcache=False,
    )
    lease_ttl_s: Number = key(
        120.0,
        "Seconds after which a lease that a reader forgot to release ends.",
        scope="cache",
        lmcache=False,
        gt=0,
    )

    max_pinned_share: Number = key(
        0.5,
        "Share of the memory, 0 to 1, that pinned chunks may fill. A pin beyond it holds the "
        "longest prefix that fits.",
        scope="cache",
        lmcache=False,
        ge=0,
        le=1,
    )
    pin_timeout_sec: Number | None = key(
        None,
        "Seconds that a pin without a time of its own lasts. `null` or `0`: until it is unpinned.",
        scope="cache",
        ge=0,
    )

    store_codec: str | None = key(
        None,
        "Codec by name that encodes every chunk in the background once it is stored. Readers get "
        "chunks decoded.",
        scope="cache",
        lmcache=False,
        min_length=1,
    )
    codec_options: Options = key(
        {},
        "Options of codecs by name; in a variable as JSON. The page of a plugin lists its options.",
        scope="cache",
        lmcache=False,
    )

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        if info.context is FIELDS_ONLY:
            return self
        found = [each.message for each in contradictions(self)]
        if found:
            raise ValueError("; ".join(found))
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Leave out what is secret in options."""
        return ((name, redacted(value)) for name, value in super().__repr_args__())

    @property
    def lower_tiers(self) -> dict[str, dict[str, Any]]:
        """Backends below memory, in order, each with its options; none is an empty mapping."""
        return {name: self.backend_options.get(name, {}) for name in self.tiers}

    @property
    def locations(self) -> tuple[str, ...]:
        """Memory, then the tiers below it."""
        return (self.memory_backend, *self.tiers)

    @property
    def max_local_cpu_bytes(self) -> int:
        """``max_local_cpu_size`` in bytes."""
        return int(self.max_local_cpu_size * GIB)

    def cache_settings_json(self) -> str:
        """Return the values that tell one cache process of an instance from another, as JSON."""
        read = {name for name, each in KEYS.items() if each.scope == "cache"}
        return self.model_dump_json(include=read)

    def to_json(self) -> str:
        """Return all values, for another process."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> KitConfig:
        """Read what :meth:`to_json` wrote."""
        return cls.model_validate(json.loads(text))


class Contradiction(NamedTuple):
    """Values that are right by themselves and wrong together, and the keys that they are of."""

    keys: tuple[str, ...]
    message: str


def contradictions(config: KitConfig) -> Iterator[Contradiction]:
    """Yield every contradiction between keys."""
    if config.enable_controller and not config.controller_url:
        yield Contradiction(
            ("enable_controller", "controller_url"),
            "enable_controller needs controller_url, for example localhost:9001",
        )
    if (config.controller_key is None) != (config.worker_key is None):
        yield Contradiction(
            ("controller_key", "worker_key"),
            "controller_key and worker_key need each other: set both, or neither",
        )
    tls = (config.p2p_tls_cert, config.p2p_tls_key, config.p2p_tls_ca)
    if any(tls) and not all(tls):
        yield Contradiction(
            ("p2p_tls_cert", "p2p_tls_key", "p2p_tls_ca"),
            "p2p_tls_cert, p2p_tls_key and p2p_tls_ca need each other",
        )
    if len(set(config.tiers)) < len(config.tiers):
        yield Contradiction(("tiers",), "tiers names a backend twice")
    if config.memory_backend in config.tiers:
        yield Contradiction(
            ("memory_backend", "tiers"),
            f"tiers are below memory: {config.memory_backend} is none of them",
        )
    if len(config.tiers) > MAX_TIERS:
        yield Contradiction(("tiers",), f"there may be {MAX_TIERS} tiers")
    for name in config.backend_options:
        if name not in config.locations:
            yield Contradiction(
                ("backend_options", "tiers", "memory_backend"),
                f"backend_options has {name!r}, which tiers does not name, nor memory_backend",
            )


KEYS: Mapping[str, Declaration] = {
    name: declared(name, field) for name, field in KitConfig.model_fields.items()
}
"""The keys of the kit, by name."""

ALIASES: Mapping[str, str] = {alias: name for name, each in KEYS.items() for alias in each.aliases}
"""Keys by their other spellings."""
