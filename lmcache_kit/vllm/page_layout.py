"""Learn how a CPU attention kernel orders the elements of a page, by writing through it.

The order depends on machine, dtype and head size (plain, transposed, VNNI-packed for AMX ...), and
vLLM documents none of it. But its writer can be asked: each element's index is written bit by bit,
as pages of zeros and ones, and read back from where the bits came to lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from lmcache_kit.errors import UnsupportedModel

Writer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""``(keys, values, pages, slots)``: vLLM's own KV cache writer of a layer, with ``keys`` and
``values`` as ``[tokens, heads, dim]`` and ``pages`` as ``[blocks, heads, block, 2 * dim]``."""


class Side(NamedTuple):
    """Element ``(n, d)`` of K, or of V, lies at ``rows[n] + columns[d]`` of a page."""

    rows: np.ndarray[Any, np.dtype[np.uint64]]
    columns: np.ndarray[Any, np.dtype[np.uint64]]


def learn_page(
    write: Writer, *, heads: int, block: int, dim: int, dtype: torch.dtype
) -> tuple[Side, Side]:
    """The order of K and V in a page. Raises UnsupportedModel when it cannot be expressed."""
    size = 2 * block * dim
    pages = torch.zeros((2, heads, block, 2 * dim), dtype=dtype)
    slots = torch.arange(block, 2 * block, dtype=torch.int64)  # in the second page
    index = torch.arange(size, dtype=torch.int64).view(2, block, 1, dim)
    found = torch.zeros((heads, size), dtype=torch.int64)
    for bit in range((size - 1).bit_length()):
        plane = ((index >> bit) & 1).to(dtype).expand(2, block, heads, dim).contiguous()
        pages.zero_()
        write(plane[0], plane[1], pages, slots)
        found |= (pages[1].reshape(heads, size) != 0).long() << bit
    if not bool((found == found[0]).all()):
        raise UnsupportedModel("the attention kernel orders the pages of each head differently")
    if not torch.equal(found[0].sort().values, torch.arange(size)):
        raise UnsupportedModel("the attention kernel's pages are no permutation of K and V")
    where = torch.empty(size, dtype=torch.int64)
    where[found[0]] = torch.arange(size)
    return _side(where[: size // 2], block, dim), _side(where[size // 2 :], block, dim)


def _side(where: torch.Tensor, block: int, dim: int) -> Side:
    table = where.view(block, dim)
    rows, columns = table[:, 0], table[0] - table[0, 0]
    if not torch.equal(table, rows[:, None] + columns[None, :]):
        raise UnsupportedModel("the attention kernel's page order is not separable")
    # A column may lie before the first one; unsigned sums wrap round to the right place.
    return Side(rows.numpy().astype(np.uint64), columns.numpy().astype(np.uint64))
