"""The contracts between the core and its plugins, and nothing else."""

from lmcache_kit.interfaces.backend import MemoryBackend, Region, Usage
from lmcache_kit.interfaces.cache import CacheInfo
from lmcache_kit.interfaces.codec import BlobInfo, ChunkInfo, Codec, Rope
from lmcache_kit.interfaces.eviction import EvictionPolicy
from lmcache_kit.interfaces.frontend import (
    ControllerAPI,
    Frontend,
    InstanceMatch,
    LocationMatch,
    LookupAnswer,
    LookupQuery,
    WorkerInfo,
)
from lmcache_kit.interfaces.transport import Transport

__all__ = [
    "BlobInfo",
    "CacheInfo",
    "ChunkInfo",
    "Codec",
    "ControllerAPI",
    "EvictionPolicy",
    "Frontend",
    "InstanceMatch",
    "LocationMatch",
    "LookupAnswer",
    "LookupQuery",
    "MemoryBackend",
    "Region",
    "Rope",
    "Transport",
    "Usage",
    "WorkerInfo",
]
