"""The contracts between the core and its plugins, and nothing else."""

from lmcache_kit.interfaces.backend import (
    Backend,
    Blob,
    BlobRecord,
    Data,
    OpenBlob,
    Readable,
    StoreUsage,
)
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
from lmcache_kit.interfaces.routes import PluginRoute, RouteHandler, ServesRoutes
from lmcache_kit.interfaces.transport import Dial, Link, ReadableRegion, ReadResult, Transport

__all__ = [
    "Backend",
    "Blob",
    "BlobInfo",
    "BlobRecord",
    "CacheInfo",
    "ChunkInfo",
    "Codec",
    "ControllerAPI",
    "Data",
    "Dial",
    "EvictionPolicy",
    "Frontend",
    "InstanceMatch",
    "Link",
    "LocationMatch",
    "LookupAnswer",
    "LookupQuery",
    "MemoryBackend",
    "OpenBlob",
    "PluginRoute",
    "ReadResult",
    "Readable",
    "ReadableRegion",
    "Region",
    "Rope",
    "RouteHandler",
    "ServesRoutes",
    "StoreUsage",
    "Transport",
    "Usage",
    "WorkerInfo",
]
