"""Copies between pages and payloads, against vLLM's own writer."""

from __future__ import annotations

from typing import Any

import pytest
from xxhash import xxh3_64

from lmcache_kit.errors import UnsupportedModel
from lmcache_kit.vllm.kv_pages import KVPages, TransferSpec

HEADS, BLOCK, LAYERS, BLOCKS = 3, 64, 2, 9
SEQUENCE = [5, 1, 7, 3]
SPANS = [(0, 250), (0, 128), (3, 250), (64, 192), (100, 110), (128, 250), (70, 71)]


def writer(isa: str) -> Any:
    """vLLM's writer for this instruction set, which need not be that of the attention here."""
    import vllm._custom_ops as ops

    def write(keys: Any, values: Any, pages: Any, slots: Any) -> None:
        blocks, heads, block, _ = pages.shape
        both = pages.view(blocks, heads, 2 * block, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            keys, values, *both, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )

    return write


def has_amx_writer() -> bool:
    """vLLM has a build for AVX-512 and AMX, and one for all other CPUs."""
    import torch

    token = torch.zeros(1, HEADS, 64, dtype=torch.bfloat16)
    pages = torch.zeros(BLOCKS, HEADS, BLOCK, 128, dtype=torch.bfloat16)
    try:
        writer("amx")(token, token, pages, torch.zeros(1, dtype=torch.int64))
    except RuntimeError as error:
        if "Unsupported CPU attention configuration" not in str(error):
            raise
        return False
    return True


def write_tokens(keys: Any, values: Any, pages: Any, slots: Any) -> None:
    """As CUDA backends do it: one vector per token and head, K before V."""
    import torch

    block = pages.shape[2]
    pages[slots // block, :, slots % block] = torch.cat((keys, values), dim=-1)


class Case:
    """Caches with 250 tokens of random KV in them, written by ``write``."""

    def __init__(self, write: Any, caches: Any, dim: int) -> None:
        import torch

        self.write, self.caches = write, caches
        shape = (LAYERS, 2, 250, HEADS, dim)
        self.kv = torch.randn(shape).to(caches[0].dtype)
        position = torch.arange(250)
        self.slots = torch.tensor(SEQUENCE)[position // BLOCK] * BLOCK + position % BLOCK
        self.fill(caches, 0, 250)

    def fill(self, caches: Any, start: int, end: int) -> None:
        for cache, (keys, values) in zip(caches, self.kv, strict=True):
            part = slice(start, end)
            self.write(keys[part].contiguous(), values[part].contiguous(), cache, self.slots[part])

    def payload(self, start: int, end: int) -> bytearray:
        import torch

        part = self.kv[:, :, start:end].contiguous()
        return bytearray(part.view(torch.uint8).numpy().tobytes())

    def check(self, pages: KVPages, empty: Any, emptied: KVPages) -> None:
        """Gather each span from ``pages``; scatter it to the ``empty`` caches of ``emptied``."""
        import torch

        for start, end in SPANS:
            payload = bytearray(pages.layout.payload_bytes(end - start))
            transfer = TransferSpec(SEQUENCE, start, end, memoryview(payload), end - start)
            (checksum,) = pages.gather([transfer])
            assert payload == self.payload(start, end)
            assert checksum == xxh3_64(payload).intdigest()
            for first, last in {(start, end), (start + (end - start) // 3, end)}:
                for cache in empty:
                    cache.zero_()
                wanted = [torch.zeros_like(cache) for cache in empty]
                self.fill(wanted, first, last)
                part = transfer._replace(start=first, end=last, skip=first - start)
                assert emptied.scatter(part) == checksum
                assert all(torch.equal(a, b) for a, b in zip(empty, wanted, strict=True))


@pytest.mark.parametrize(
    ("isa", "dtype", "dim"),
    [
        ("vec", "bfloat16", 64),
        ("vec", "float16", 128),
        ("vec", "float32", 64),
        ("vec16", "bfloat16", 80),
        ("vec16", "float32", 80),
        ("amx", "bfloat16", 64),
        ("amx", "bfloat16", 128),
    ],
)
def test_cpu_pages_hold_what_vllm_wrote(isa: str, dtype: str, dim: int) -> None:
    import torch

    from lmcache_kit.vllm.cpu_pages import CPUPages

    def new() -> list[torch.Tensor]:
        shape = (BLOCKS, HEADS, BLOCK, 2 * dim)
        return [torch.randn(shape).to(getattr(torch, dtype)) for _ in range(LAYERS)]

    if isa == "amx" and not has_amx_writer():
        pytest.skip("vLLM's build for this CPU has no writer for AMX")
    case, empty = Case(writer(isa), new(), dim), new()
    case.check(CPUPages(case.caches, case.write, BLOCK), empty, CPUPages(empty, case.write, BLOCK))


def test_cpu_pages_of_layers_that_share_one_memory() -> None:
    """As one allocation of ``[blocks, layers, heads, block, content]``."""
    import torch

    from lmcache_kit.vllm.cpu_pages import CPUPages

    def new() -> list[torch.Tensor]:
        memory = torch.randn(BLOCKS, LAYERS, HEADS, BLOCK, 128).to(torch.bfloat16)
        return [memory[:, layer] for layer in range(LAYERS)]

    learnt = writer("vec")

    def write(keys: Any, values: Any, pages: Any, slots: Any) -> None:
        copy = pages.contiguous()  # the writer itself wants contiguous caches
        learnt(keys, values, copy, slots)
        pages.copy_(copy)

    case, empty = Case(write, new(), 64), new()
    case.check(CPUPages(case.caches, write, BLOCK), empty, CPUPages(empty, write, BLOCK))


@pytest.mark.parametrize("order", ["NHD", "HND", "cross-layer"])
def test_token_pages_of_any_strides(order: str) -> None:
    import torch

    from lmcache_kit.vllm.cuda_pages import CUDAPages

    case, empty = Case(write_tokens, new_token_caches(order, "cpu"), 64), new_token_caches(order)
    case.check(CUDAPages(case.caches, BLOCK), empty, CUDAPages(empty, BLOCK))
    assert isinstance(empty[0], torch.Tensor)


def new_token_caches(order: str, device: str = "cpu") -> Any:
    import torch

    content = 128
    if order == "NHD":
        shape = (LAYERS, BLOCKS, BLOCK, HEADS, content)
        memory = torch.randn(shape).to(device, torch.bfloat16)
        return [layer.permute(0, 2, 1, 3) for layer in memory]
    if order == "HND":
        shape = (LAYERS, BLOCKS, HEADS, BLOCK, content)
        return list(torch.randn(shape).to(device, torch.bfloat16))
    shape = (BLOCKS, BLOCK, LAYERS, HEADS, content)
    memory = torch.randn(shape).to(device, torch.bfloat16)
    return [memory[:, :, layer].permute(0, 2, 1, 3) for layer in range(LAYERS)]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["NHD", "HND", "cross-layer"])
def test_token_pages_on_a_gpu_with_pinned_memory(order: str) -> None:
    import mmap

    import torch

    from lmcache_kit.vllm.cuda_pages import CUDAPages

    caches = new_token_caches(order, "cuda")
    pages = CUDAPages(caches, BLOCK)
    memory = memoryview(mmap.mmap(-1, 1 << 24))
    pages.register_memory("a life", memory)
    kv = torch.randn(LAYERS, 2, 250, HEADS, 64).to(torch.bfloat16)
    nbytes = pages.layout.payload_bytes(250)
    memory[:nbytes] = kv.view(torch.uint8).numpy().tobytes()
    checksum = pages.scatter(TransferSpec(SEQUENCE, 0, 250, memory[:nbytes], 250))
    torch.cuda.synchronize()
    assert checksum == xxh3_64(memory[:nbytes]).intdigest()
    memory[nbytes : 2 * nbytes] = bytes(nbytes)
    assert pages.gather([TransferSpec(SEQUENCE, 0, 250, memory[nbytes : 2 * nbytes], 250)]) == [
        checksum
    ]
    pages.close()


@pytest.mark.parametrize("kind", ["cpu", "token"])
def test_blocks_of_the_scheduler_may_be_several_pages(kind: str) -> None:
    import torch

    from lmcache_kit.vllm.cpu_pages import CPUPages
    from lmcache_kit.vllm.cuda_pages import CUDAPages

    caches = [torch.randn(8, HEADS, 32, 128).to(torch.bfloat16) for _ in range(LAYERS)]
    pages: KVPages = CPUPages(caches, writer("vec"), 64) if kind == "cpu" else CUDAPages(caches, 64)
    kv = torch.randn(LAYERS, 2, 100, HEADS, 64).to(torch.bfloat16)
    position = torch.arange(100)
    pages_of_blocks = torch.tensor([6, 7, 2, 3])  # of blocks 3 and 1
    slots = pages_of_blocks[position // 32] * 32 + position % 32
    write = writer("vec") if kind == "cpu" else write_tokens
    for cache, (keys, values) in zip(caches, kv, strict=True):
        write(keys, values, cache, slots)
    payload = bytearray(pages.layout.payload_bytes(100))
    pages.gather([TransferSpec([3, 1], 0, 100, memoryview(payload), 100)])
    assert payload == kv.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", ["cpu", "token"])
@pytest.mark.parametrize("blocks", [[BLOCKS], [-1], [0, BLOCKS + 3]])
def test_a_block_outside_of_the_cache_is_never_touched(kind: str, blocks: list[int]) -> None:
    import torch

    from lmcache_kit.vllm.cpu_pages import CPUPages
    from lmcache_kit.vllm.cuda_pages import CUDAPages

    caches = [torch.zeros(BLOCKS, HEADS, BLOCK, 128, dtype=torch.bfloat16) for _ in range(LAYERS)]
    pages: KVPages = (
        CPUPages(caches, writer("vec"), BLOCK) if kind == "cpu" else CUDAPages(caches, BLOCK)
    )
    tokens = len(blocks) * BLOCK
    payload = memoryview(bytearray(pages.layout.payload_bytes(tokens)))
    with pytest.raises(IndexError, match="not within the blocks of the KV cache"):
        pages.scatter(TransferSpec(blocks, 0, tokens, payload, tokens))


def test_a_page_order_that_depends_on_the_head_is_refused() -> None:
    import torch

    from lmcache_kit.vllm.page_layout import detect_page_layouts

    def write(keys: Any, values: Any, pages: Any, slots: Any) -> None:
        write_tokens(keys, values, pages, slots)
        pages[:, 1] = pages[:, 1].flip(1)

    with pytest.raises(UnsupportedModel, match="orders the pages of each head differently"):
        detect_page_layouts(write, heads=2, block=32, dim=16, dtype=torch.bfloat16)


def test_a_page_order_without_structure_is_refused() -> None:
    import torch

    from lmcache_kit.vllm.page_layout import detect_page_layouts

    order = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(1))

    def write(keys: Any, values: Any, pages: Any, slots: Any) -> None:
        write_tokens(keys, values, pages, slots)
        flat = pages.view(pages.shape[0], pages.shape[1], -1)
        flat.copy_(flat[:, :, order].clone())

    with pytest.raises(UnsupportedModel, match="not separable"):
        detect_page_layouts(write, heads=2, block=32, dim=16, dtype=torch.bfloat16)


def test_a_writer_that_changes_values_is_refused() -> None:
    import torch

    from lmcache_kit.vllm.page_layout import detect_page_layouts

    def write(keys: Any, values: Any, pages: Any, slots: Any) -> None:
        write_tokens(keys, keys, pages, slots)

    with pytest.raises(UnsupportedModel, match="no permutation of K and V"):
        detect_page_layouts(write, heads=2, block=32, dim=16, dtype=torch.bfloat16)
