"""Contracts between the core and its plugins.

1. Hooks declare, interfaces carry: hot paths are plain batched methods of these classes.
2. A contract says who calls a method, from which thread, and how long it may block.
3. The core decides (keys, eviction, pins, verification); a plugin stores, encodes or moves bytes.
4. Doubt is a miss: a plugin reports failure by the errors in :mod:`lmcache_kit.errors`, and
   serving goes on without it.
5. A conformance suite in :mod:`lmcache_kit.testing` tests each contract.
"""

from lmcache_kit.interfaces.backend import (
    Backend,
    Blob,
    BlobRecord,
    CountsDamage,
    Data,
    OpenBlob,
    Readable,
    ReportsMetrics,
    StoreUsage,
)
from lmcache_kit.interfaces.cache import CacheInfo
from lmcache_kit.interfaces.codec import BlobInfo, ChunkInfo, Codec, Rope
from lmcache_kit.interfaces.commands import CommandContext
from lmcache_kit.interfaces.eviction import EvictionPolicy
from lmcache_kit.interfaces.frontend import (
    ControllerAPI,
    Frontend,
    InstanceMatch,
    LocationMatch,
    LookupAnswer,
    LookupQuery,
    ModelInfo,
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
    "CommandContext",
    "ControllerAPI",
    "CountsDamage",
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
    "ModelInfo",
    "OpenBlob",
    "PluginRoute",
    "ReadResult",
    "Readable",
    "ReadableRegion",
    "Region",
    "ReportsMetrics",
    "Rope",
    "RouteHandler",
    "ServesRoutes",
    "StoreUsage",
    "Transport",
    "Usage",
    "WorkerInfo",
]
