"""A codec whose blobs run code."""

from __future__ import annotations

import pickle

from lmcache_kit.interfaces import BlobInfo, Codec


class Pickling(Codec):
    format_version = 1

    def encode(self, payload, chunk):
        return pickle.dumps(bytes(payload))

    def decode(self, blob, chunk, out):
        out[:] = pickle.loads(blob)

    def describe(self, blob):
        return BlobInfo(1, 0, len(pickle.loads(blob)), len(blob))

    def max_blob_bytes(self, chunk):
        return chunk.payload_bytes + 100
