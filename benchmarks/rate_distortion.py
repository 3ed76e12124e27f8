"""Draw the results of benchmarks/codec.py as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 95, 30, 50, 60
RATIOS = (1, 10)
DECADES = (-5, -1)
FAMILIES = {
    "profile": ("#1b7837", "cachegen with a profile"),
    "level": ("#2166ac", "cachegen"),
    "LMCache": ("#b2182b", "LMCache's CacheGen"),
}
_SKIPPED = ("zstd",)


def draw(rows: list[dict[str, Any]]) -> str:
    """Draw the ratio on the x axis and the divergence on a logarithmic y axis."""
    return "\n".join(_parts(rows)) + "\n"


def _x(ratio: float) -> float:
    first, last = RATIOS
    return LEFT + (ratio - first) / (last - first) * (WIDTH - LEFT - RIGHT)


def _y(divergence: float) -> float:
    low, high = DECADES
    place = (math.log10(max(divergence, 10.0**low)) - low) / (high - low)
    return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)


def _family(name: str) -> str:
    return next(key for key in FAMILIES if key in name)


def _parts(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">'
    )
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    yield _text(WIDTH / 2, 24, "Size and error of KV codecs, SmolLM2-135M", size=16)
    yield from _axes()
    shown = [row for row in rows if not any(word in row["name"] for word in _SKIPPED)]
    for number, (key, (colour, label)) in enumerate(FAMILIES.items()):
        family = [r for r in shown if _family(r["name"]) == key and r["divergence"] > 0]
        points = sorted((_x(row["ratio"]), _y(row["divergence"]), row["name"]) for row in family)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        if key != "LMCache":
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for x, y, name in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
            note = name.split(",")[1].strip() if key == "LMCache" and "," in name else ""
            note = note or ("default bins" if key == "LMCache" else name.split(",", maxsplit=1)[0])
            left = key == "level"
            yield _text(x - 9 if left else x + 9, y + (-6 if left else 14), note,
                        anchor="end" if left else "start", fill=colour)  # fmt: skip
        legend = TOP + 16 + 20 * number
        yield f'<circle cx="{LEFT + 20}" cy="{legend - 4}" r="5" fill="{colour}"/>'
        yield _text(LEFT + 32, legend, label, anchor="start")
    yield "</svg>"


def _axes() -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for ratio in range(RATIOS[0], RATIOS[1] + 1):
        x = _x(ratio)
        yield f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#e0e0e0"/>'
        yield _text(x, bottom + 20, f"{ratio}")
    for decade in range(DECADES[0], DECADES[1] + 1):
        y = _y(10.0**decade)
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e0e0e0"/>'
        yield _text(LEFT - 10, y + 4, f"{10.0**decade:g}", anchor="end")
    yield _text((LEFT + right) / 2, HEIGHT - 16, "times smaller than bfloat16, whole blobs")
    middle = (TOP + bottom) / 2
    yield (
        f'<text x="22" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 22 {middle})">divergence of predictions (KL, nats)</text>'
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "middle", size: int = 13, fill: str = "#222"
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{fill}">{text}</text>'
