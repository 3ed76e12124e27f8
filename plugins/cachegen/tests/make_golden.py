"""Write the golden files anew: only for a new version of the format, which has files of its own.

cd plugins && python -m cachegen.tests.make_golden
"""

from __future__ import annotations

from lmcache_kit_cachegen.codec import CacheGenCodec
from lmcache_kit_cachegen.options import CacheGenOptions

from .conftest import payload_of, round_trip
from .test_format import GOLDEN, golden_chunk

OPTIONS = {
    "rans": CacheGenOptions(),
    "zstd": CacheGenOptions(coder="zstd"),
    "near": CacheGenOptions(level=1),
    "lossless": CacheGenOptions(level=0),
}

GOLDEN.mkdir(exist_ok=True)
for name, options in OPTIONS.items():
    chunk = golden_chunk(name)
    payload = payload_of(chunk)
    blob, out = round_trip(CacheGenCodec(options), payload, chunk)
    (GOLDEN / f"{name}.payload").write_bytes(payload)
    (GOLDEN / f"{name}.blob").write_bytes(blob)
    (GOLDEN / f"{name}.values").write_bytes(out)
