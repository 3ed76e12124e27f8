"""Print the frequencies in ``_table_data.py``.

Kept for the record: the tables of a table set never change. Other tables would be another set with
another identifier.

Row ``i`` is a logistic distribution, integrated over each symbol, whose mean absolute value is
``2 ** (i / 4 - 5)``. A row holds the frequencies of 0, 1, .. 15 (-k has the frequency of k) and of
the escape; with 1 .. 15 counted twice they sum to 2048. A symbol whose share would be less than
half of 1/2048 gets no frequency, and is escaped.
"""

from __future__ import annotations

import math

TOTAL = 2048
TABLES = 47


def _mass(low: float, high: float, width: float) -> float:
    def below(x: float) -> float:
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, x / width))))

    return below(high) - below(low)


def _width(mean: float) -> float:
    """Return the width of the logistic distribution whose mean absolute symbol is ``mean``."""
    low, high = 1e-3, 1e3
    for _ in range(80):
        width = math.sqrt(low * high)
        got = 2 * sum(k * _mass(k - 0.5, k + 0.5, width) for k in range(1, int(width * 40) + 2))
        low, high = (width, high) if got < mean else (low, width)
    return width


def row(index: int) -> list[int]:
    width = _width(2 ** (index / 4 - 5))
    parts = [TOTAL * _mass(k - 0.5, k + 0.5, width) for k in range(16)]
    parts = [part if part >= 0.5 else 0 for part in parts]
    escape = max(1, round(TOTAL - parts[0] - 2 * sum(parts[1:])))
    counts = [max(1, round(part)) if part else 0 for part in parts]
    counts[0] = TOTAL - escape - 2 * sum(counts[1:])
    return [*counts, escape]


for number in range(TABLES):
    print(f"    {tuple(row(number))},")
