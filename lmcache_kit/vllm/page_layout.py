"""Detect in which order a CPU attention kernel keeps the elements of a page.

The order depends on machine, dtype and head size (plain, transposed, VNNI-packed for AMX ...), and
vLLM documents none of it. Detection writes the index of each element through vLLM's own writer, bit
by bit, as pages of zeros and ones, and reads the indexes back from the page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from lmcache_kit.errors import UnsupportedModel

Writer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""vLLM's KV cache writer of a layer: ``(keys, values, pages, slots)``, with ``keys`` and ``values``
as ``[tokens, heads, dim]`` and ``pages`` as ``[blocks, heads, block, 2 * dim]``."""


class PageLayout(NamedTuple):
    """Order of K, or of V, in a page: element ``(n, d)`` lies at ``rows[n] + columns[d]``.

    ``n`` is the token within the page and ``d`` the dimension within the head.
    """

    rows: np.ndarray[Any, np.dtype[np.uint64]]
    columns: np.ndarray[Any, np.dtype[np.uint64]]


def detect_page_layouts(
    write: Writer, *, heads: int, block: int, dim: int, dtype: torch.dtype
) -> tuple[PageLayout, PageLayout]:
    """Return the layouts of K and of V in a page of ``block`` tokens.

    Raises UnsupportedModel when heads differ, when the page is no permutation of K and V, or when
    the order is not a sum of a row and a column.
    """
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
    return _page_layout(where[: size // 2], block, dim), _page_layout(
        where[size // 2 :], block, dim
    )


def _page_layout(where: torch.Tensor, block: int, dim: int) -> PageLayout:
    table = where.view(block, dim)
    rows, columns = table[:, 0], table[0] - table[0, 0]
    if not torch.equal(table, rows[:, None] + columns[None, :]):
        raise UnsupportedModel("the attention kernel's page order is not separable")
    # A column offset may be negative; unsigned sums wrap around to the right element.
    return PageLayout(rows.numpy().astype(np.uint64), columns.numpy().astype(np.uint64))
