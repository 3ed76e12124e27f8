"""Store and load between vLLM's pages and the shared memory, as shares of memcpy in the same run.

A store gathers and computes checksums; a load verifies checksums and scatters. Chunks are payloads
of shape ``[layers, 2, tokens, heads, dim]``. Each round times a memcpy of as many bytes, a store
and a load, on one thread. A share is the median of the rounds' ratios.

Page orders: ``vec`` and ``amx`` are those of vLLM's CPU attention, detected as at start-up. vLLM
has a writer for ``amx`` only in its build for AVX-512 and AMX; elsewhere this order is left out.
``token`` is the order of CUDA backends, here on CPU tensors.

    python benchmarks/kv_copy.py [--tokens 2048] [--rounds 15] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import lmcache_baseline

SHAPES = {"SmolLM2-135M": (30, 3, 64), "Llama-8B": (32, 8, 128)}
ORDERS = ("vec", "amx", "token")
CHUNK, BLOCK = 256, 128


def writer(isa: str) -> Any:
    """Return vLLM's KV cache writer for an instruction set."""
    import vllm._custom_ops as ops

    def write(keys: Any, values: Any, pages: Any, slots: Any) -> None:
        blocks, heads, block, _ = pages.shape
        both = pages.view(blocks, heads, 2 * block, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            keys, values, *both, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )

    return write


def open_kv_pages(order: str, layers: int, heads: int, dim: int, blocks: int) -> Any:
    """Return random bfloat16 pages in one of the page orders."""
    import torch

    from lmcache_kit.vllm.cpu_pages import CPUPages
    from lmcache_kit.vllm.cuda_pages import CUDAPages

    if order == "token":
        shape = (blocks, BLOCK, heads, 2 * dim)
        caches = [torch.randn(shape).to(torch.bfloat16).permute(0, 2, 1, 3) for _ in range(layers)]
        return CUDAPages(caches, BLOCK)
    shape = (blocks, heads, BLOCK, 2 * dim)
    caches = [torch.randn(shape).to(torch.bfloat16) for _ in range(layers)]
    return CPUPages(caches, writer(order), BLOCK)


def has_writer(order: str) -> bool:
    """Tell whether vLLM's build for this CPU can write pages in this order."""
    import torch

    if order == "token":
        return True
    token = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    pages = torch.zeros(1, 1, BLOCK, 128, dtype=torch.bfloat16)
    try:
        writer(order)(token, token, pages, torch.zeros(1, dtype=torch.int64))
    except RuntimeError as error:
        if "Unsupported CPU attention configuration" not in str(error):
            raise
        return False
    return True


def seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def measure(name: str, order: str, tokens: int, rounds: int) -> dict[str, object]:
    import torch

    from lmcache_kit.vllm.kv_pages import TransferSpec

    layers, heads, dim = SHAPES[name]
    count = -(-tokens // BLOCK)
    pages = open_kv_pages(order, layers, heads, dim, 2 * count)
    sequence = torch.randperm(2 * count)[:count].tolist()
    size = pages.layout.payload_bytes(tokens)
    slab, source = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    memory = memoryview(slab.numpy())
    transfers = []
    for start in range(0, tokens, CHUNK):
        end = min(start + CHUNK, tokens)
        first, last = pages.layout.payload_bytes(start), pages.layout.payload_bytes(end)
        transfers.append(TransferSpec(sequence, start, end, memory[first:last], end - start))
    actions: dict[str, Callable[[], object]] = {
        "memcpy": lambda: slab.copy_(source),
        "store": lambda: pages.gather(transfers),
        "load": lambda: [pages.scatter(transfer) for transfer in transfers],
    }
    for action in actions.values():
        action()
    spent = [{key: seconds(action) for key, action in actions.items()} for _ in range(rounds)]
    result: dict[str, object] = {
        "shape": name,
        "order": order,
        "tokens": tokens,
        "mbytes": round(size / 1e6, 1),
        **{
            f"{key}_gbps": round(size / 1e9 / statistics.median(one[key] for one in spent), 2)
            for key in actions
        },
    }
    for key in ("store", "load"):
        shares = sorted(one["memcpy"] / one[key] for one in spent)
        result[f"{key}_share"] = round(statistics.median(shares), 3)
        result[f"{key}_share_range"] = [round(shares[0], 3), round(shares[-1], 3)]
    return result


def show_lmcache(name: str, options: argparse.Namespace) -> None:
    """Print LMCache's store and retrieve of KV of the same shape, from token-major CPU pages."""
    figures = lmcache_baseline.measure("store", *SHAPES[name], options.tokens)
    if figures is None:
        return
    if options.json:
        print(json.dumps({"shape": name, "baseline": "LMCache", **figures}), flush=True)
    else:
        store, load = figures["store_gb_s"], figures["load_gb_s"]
        print(f"{name:13} LMCache: store {store:.2f} GB/s, load {load:.2f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one JSON line per case")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import vllm._custom_ops  # noqa: F401
    torch.set_num_threads(1)
    orders = [order for order in ORDERS if has_writer(order)]
    if missing := set(ORDERS).difference(orders):
        print(f"not measured, for vLLM has no writer here: {', '.join(missing)}", file=sys.stderr)
    for name in SHAPES:
        show_lmcache(name, options)
        for order in orders:
            result = measure(name, order, options.tokens, options.rounds)
            if options.json:
                print(json.dumps(result), flush=True)
            else:
                print(
                    f"{name:13} {order:6} {result['mbytes']:6} MB   "
                    f"memcpy {result['memcpy_gbps']:5} GB/s   "
                    f"store {result['store_gbps']:5} GB/s = {result['store_share']} of memcpy   "
                    f"load {result['load_gbps']:5} GB/s = {result['load_share']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
