"""The contracts between the core and its plugins, and nothing else."""

from lmcache_kit.interfaces.backend import Backend, Blob, Data, OpenBlob, Readable, Stock, Stored
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
from lmcache_kit.interfaces.memory import MemoryBackend, Region, Usage
from lmcache_kit.interfaces.transport import Dial, Landed, Link, Offered, Transport

__all__ = [
    "Backend",
    "Blob",
    "BlobInfo",
    "CacheInfo",
    "ChunkInfo",
    "Codec",
    "ControllerAPI",
    "Data",
    "Dial",
    "EvictionPolicy",
    "Frontend",
    "InstanceMatch",
    "Landed",
    "Link",
    "LocationMatch",
    "LookupAnswer",
    "LookupQuery",
    "MemoryBackend",
    "Offered",
    "OpenBlob",
    "Readable",
    "Region",
    "Rope",
    "Stock",
    "Stored",
    "Transport",
    "Usage",
    "WorkerInfo",
]
