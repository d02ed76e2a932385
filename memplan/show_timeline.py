"""A step as a timeline in the terminal: one row a lane, a cell as high as the lane is busy in its share of the time."""

from collections import defaultdict
from collections.abc import Sequence
from math import floor, log10
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from memplan.explanation import Explanation
from memplan.formatting import format_seconds
from memplan.spans import LANES, Span, Timeline
from memplan.step_words import (
    BUSIEST_COLOUR,
    COLOURS,
    Phase,
    kind_of,
    lane_name,
    lever_lines,
    phases,
    sentences,
    within_step,
)

HEIGHTS = " ▁▂▃▄▅▆▇"
"""No full block at the end: rows stay apart."""
LENGTHS = " ▏▎▍▌▋▊▉█"
SHARE_WIDTH = 7
NARROW = 48
"""Below so many columns there is no room for figures."""
TICK_CELLS = 8
"""At least from one tick to the next."""
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


class Cell(NamedTuple):
    """A lane in one part of the step."""

    busy: float
    """Share of the time, 0 to 1."""
    kind: str
    """Of what takes most of it; "" where nothing does."""


def timeline_view(shown: Explanation, width: int) -> RenderableType:
    """The step, what bounds it, and what would move it, in at most ``width`` columns."""
    name_width = 3 + max(len(lane_name(lane)) for lane in shown.busy_seconds)
    figures_width = SHARE_WIDTH + _seconds_width(shown) if width >= NARROW else 0
    cells = max(1, width - name_width - figures_width)
    t = shown.timeline
    drawn = _bars(shown, name_width, cells) if t is None else _chart(shown, t, name_width, cells)
    rows = [_title(shown), Text(), *drawn, *([] if t is None else [Text(), *_legend(t, width)])]
    for row in rows:
        row.no_wrap, row.overflow = True, "crop"
        row.truncate(width)
    said = Text("\n".join(["", *sentences(shown), ""]))
    if shown.levers is None:
        return Group(*rows, said)
    moves = Text("\n".join(f"- {line}" for line in lever_lines(shown)))
    return Group(*rows, said, Text("what would move it", style="bold"), moves)


def lane_cells(spans: Sequence[Span], seconds: float, count: int) -> list[Cell]:
    """One lane's spans, which lie between 0 and ``seconds``, as so many cells of equal time."""
    kinds: list[dict[str, float]] = [defaultdict(float) for _ in range(count)]
    width = seconds / count
    for span in spans:
        kind = kind_of(span)
        first = min(int(span.start_seconds / width), count - 1)
        last = min(int(span.end_seconds / width), count - 1)
        for at in range(first, last + 1):
            part = min(span.end_seconds, (at + 1) * width) - max(span.start_seconds, at * width)
            if part > 0:
                kinds[at][kind] += part / width
    return [Cell(min(1.0, sum(k.values())), max(k, key=k.__getitem__, default="")) for k in kinds]


def tick_seconds(seconds: float, count: int) -> float:
    """From one tick of the axis to the next: 1, 2 or 5 times a power of ten."""
    least = seconds * TICK_CELLS / count
    power = float(10 ** floor(log10(least)))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)


def _chart(shown: Explanation, timeline: Timeline, name_width: int, count: int) -> list[Text]:
    """Phases above, a row a lane, the axis below."""
    margin = " " * name_width
    spans = within_step(timeline)
    rows = [Text.assemble(margin, _phase_row(phases(timeline), timeline.seconds, count))]
    for lane in LANES:
        if lane in shown.busy_seconds:
            drawn = lane_cells([span for span in spans if span.lane == lane], timeline.seconds, count)
            cells = Text.assemble(*((_height(cell), COLOURS.get(cell.kind, "")) for cell in drawn))
            rows.append(_row(shown, lane, name_width, cells))
    return [*rows, Text.assemble(margin, (_axis(timeline.seconds, count), "dim"))]


def _bars(shown: Explanation, name_width: int, count: int) -> list[Text]:
    """A row a lane, as long as it is busy: there is no order in time."""
    rows = []
    for lane in LANES:
        if lane in shown.busy_seconds:
            eighths = max(1, round(8 * count * min(1.0, shown.busy_seconds[lane] / shown.seconds)))
            bar = (LENGTHS[8] * (eighths // 8) + LENGTHS[eighths % 8].strip()).ljust(count)
            rows.append(_row(shown, lane, name_width, Text(bar, COLOURS["forward"])))
    return rows


def _row(shown: Explanation, lane: str, name_width: int, cells: Text) -> Text:
    busy = shown.busy_seconds[lane]
    bounds = lane == shown.busiest
    style = f"bold {BUSIEST_COLOUR}" if bounds else ""
    name = f"{'▶' if bounds else ' '} {lane_name(lane)}"[: name_width - 1].ljust(name_width)
    figures = f"{busy / shown.seconds:>{SHARE_WIDTH - 1}.0%} {format_seconds(busy):>{_seconds_width(shown)}}"
    return Text.assemble((name, style), cells, (figures, style))


def _seconds_width(shown: Explanation) -> int:
    """Of the longest lane's seconds."""
    return max(len(format_seconds(busy)) for busy in shown.busy_seconds.values())


def _height(cell: Cell) -> str:
    """What is there at all is seen."""
    return HEIGHTS[max(1, round(cell.busy * (len(HEIGHTS) - 1)))] if cell.kind else " "


def _phase_row(found: Sequence[Phase], seconds: float, count: int) -> Text:
    """Each phase as a bracket with its name where there is room."""
    row = Text()
    for phase in found:
        begin, end = (round(moment / seconds * count) for moment in (phase.start_seconds, phase.end_seconds))
        inner = end - begin - 2
        name = f" {phase.kind} " if len(phase.kind) + 2 <= inner else ""
        bracket = f"╭{name.center(inner, '─')}╮" if inner >= 0 else "│" * (end - begin)
        row.append(bracket, COLOURS.get(phase.kind, ""))
    return row


def _axis(seconds: float, count: int) -> str:
    """Ticks with their times, as many as have room."""
    step = tick_seconds(seconds, count)
    scale, unit = next(((scale, unit) for scale, unit in SECONDS if seconds >= scale), SECONDS[-1])
    row = ""
    for number in range(int(seconds / step) + 1):
        label = f"╵{number * step / scale:.10g} {unit}"
        at = round(number * step / seconds * count)
        if at + len(label) <= count:
            row = row.ljust(at) + label
    return row.ljust(count)


def _title(shown: Explanation) -> Text:
    how = "rows are as long" if shown.timeline is None else "cells are as high"
    whose = f"{shown.whose}: " if shown.whose else ""
    return Text.assemble(
        (f"{whose}one step, {format_seconds(shown.seconds)}", "bold"), (f"; {how} as their lane is busy", "dim")
    )


def _legend(timeline: Timeline, width: int) -> list[Text]:
    """The colours of what there is, in as many lines as needed."""
    lines = [Text()]
    there = {kind_of(span) for span in timeline.spans}
    for kind in (kind for kind in COLOURS if kind in there):
        if lines[-1] and len(lines[-1]) + len(kind) + 2 > width:
            lines.append(Text())
        lines[-1].append("■ ", COLOURS[kind]).append(f"{kind}  ", "dim")
    return lines
