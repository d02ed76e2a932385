"""Pictures out of characters, all pure: bars, columns, and a line in braille dots."""

import math
from collections.abc import Sequence

EIGHTHS_UP = " ▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def columns(values: Sequence[float | None], width: int, height: int = 1) -> list[str]:
    """The last ``width`` values as columns from zero to their maximum, newest at the right; rows from the top down."""
    recent = [v if v is not None and math.isfinite(v) and v > 0 else 0.0 for v in values[-width:]] if width > 0 else []
    most = max(recent, default=0.0)
    # An eighth at the top stays free, so that graphs under each other do not touch, and something is never nothing.
    eighths = [max(round(v / most * (height * 8 - 1)), 1) if v > 0 else 0 for v in recent]
    pad = " " * (width - len(recent))
    return [pad + "".join(EIGHTHS_UP[min(max(e - row * 8, 0), 8)] for e in eighths) for row in reversed(range(height))]


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` (two or more) round numbers, evenly spaced, that reach from ``low`` or below to ``high``."""
    if not high > low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50, 100):
        step = power * factor
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 <= max(most, 2):
            break
    return [i * step for i in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """The labels of evenly spaced ticks, with just the decimals that tell them apart."""
    step = values[1] - values[0]
    decimals = next((d for d in range(9) if abs(round(step, d) - step) < step * 1e-6), 9)
    return [f"{v:.{decimals}f}" if abs(v) < 1e6 else f"{v:.3g}" for v in values]


def braille(points: Sequence[tuple[float, float]], width: int, height: int, low: float, high: float) -> list[str]:
    """A line through (x, y) points with y from ``low`` (bottom) to ``high``; gaps where y is not finite.

    x spans the whole width, in increasing order. Points that share a column of dots are drawn as their mean.
    """
    grid = [[0] * width for _ in range(height)]
    last: tuple[int, int] | None = None
    for column, y in _by_column(points, width * 2):
        if not math.isfinite(y):
            last = None
            continue
        share = min(max((y - low) / (high - low), 0.0), 1.0)
        dot = (column, round((1 - share) * (height * 4 - 1)))
        for x, y_dot in _segment(last or dot, dot):
            grid[y_dot // 4][x // 2] |= _DOTS[y_dot % 4][x % 2]
        last = dot
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in grid]


def _by_column(points: Sequence[tuple[float, float]], columns_: int) -> list[tuple[int, float]]:
    if not points:
        return []
    start, span = points[0][0], points[-1][0] - points[0][0]
    found: dict[int, list[float]] = {}
    for x, y in points:
        column = round((x - start) / span * (columns_ - 1)) if span > 0 else 0
        found.setdefault(column, []).append(y)
    return [(column, sum(ys) / len(ys)) for column, ys in found.items()]


def _segment(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots from a to b, both included."""
    count = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    return [
        (a[0] + round((b[0] - a[0]) * i / count), a[1] + round((b[1] - a[1]) * i / count)) for i in range(count + 1)
    ]
