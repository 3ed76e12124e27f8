"""LMCache's CacheGen on given KV: sizes, speed, and the decoded values.

Usage: codec.py MODEL KV.npy BINS CHUNK_TOKENS OUT.npy

``KV.npy``: bfloat16 as uint16, ``[texts, layers, 2, tokens, heads, head_dim]``. ``BINS`` is
"default" or a number for every layer. ``OUT.npy`` receives the array after encoding and decoding.
"""

from __future__ import annotations

import json
import logging
import sys
import time

SPEED_CHUNKS = 2


def main(model: str, source: str, bins: str, chunk_tokens: int, target: str) -> None:
    logging.disable(logging.WARNING)
    import numpy as np
    import torch
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.naive_serde import CreateSerde

    torch.set_num_threads(1)
    kv = np.load(source)
    texts, layers, _, tokens, heads, width = kv.shape
    config = LMCacheEngineConfig.from_defaults(chunk_size=chunk_tokens)
    shape = (layers, 2, chunk_tokens, heads, width)
    metadata = LMCacheMetadata(model, 1, 1, 0, 0, torch.bfloat16, shape)
    encoder, decoder = CreateSerde("cachegen", metadata, config)
    if bins != "default":
        for side in (encoder, decoder):
            for spec in (*side.cachegen_config.kspecs, *side.cachegen_config.vspecs):
                spec.bins = int(bins)
        encoder.key_bins[:] = encoder.value_bins[:] = int(bins)
        if hasattr(decoder, "key_bins"):
            decoder.key_bins[:] = decoder.value_bins[:] = int(bins)

    def wrapped(chunk):
        flat = torch.from_numpy(np.ascontiguousarray(chunk).view(np.int16)).view(torch.bfloat16)
        # [layers, 2, tokens, heads, width] -> [2, layers, tokens, heads * width]
        flat = flat.transpose(0, 1).reshape(2, layers, -1, heads * width).contiguous()
        facts = MemoryObjMetadata(
            shape=flat.shape, dtype=flat.dtype, address=-1, phy_size=flat.numel() * 2,
            ref_count=1, fmt=MemoryFormat.KV_2LTD,
        )  # fmt: skip
        return TensorMemoryObj(flat, facts, None)

    decoded = np.empty_like(kv)
    raw = encoded = 0
    seconds = [0.0, 0.0]
    timed = 0
    for text in range(texts):
        for start in range(0, tokens, chunk_tokens):
            part = kv[text, :, :, start : start + chunk_tokens]
            begin = time.process_time()
            blob = encoder.serialize(wrapped(part))
            middle = time.process_time()
            back = decoder.deserialize(blob).tensor
            end = time.process_time()
            raw += part.nbytes
            encoded += len(blob.byte_array)
            if text or start:  # the first call compiles
                seconds[0] += middle - begin
                seconds[1] += end - middle
                timed += part.nbytes
            back = back.reshape(2, layers, -1, heads, width).transpose(0, 1).to(torch.bfloat16)
            words = back.contiguous().view(torch.int16).numpy().view(np.uint16)
            decoded[text, :, :, start : start + chunk_tokens] = words[:, :, : part.shape[2]]
    np.save(target, decoded)
    figures = {"ratio": raw / encoded, "bits": 16 * encoded / raw}
    if timed:
        figures |= {
            "encode_mbps": timed / seconds[0] / 1e6,
            "decode_mbps": timed / seconds[1] / 1e6,
        }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
