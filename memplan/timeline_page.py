"""A plan's step as a page: every lane's work over time, memory by phase, what would move it, in one HTML file."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go

from memplan.explanation import Explanation
from memplan.formatting import format_bytes, format_seconds
from memplan.page import cell, chart_html, document, figure_of, table_html
from memplan.spans import LANES, Span, Timeline
from memplan.step_words import (
    BUSIEST_COLOUR,
    COLOURS,
    kind_of,
    lane_name,
    lever_lines,
    phases,
    sentences,
    training_words,
    unit_of,
    within_step,
)
from offload.plan import Plan, Tier

FINEST = 1 / 1500
"""Of the step: spans of one kind that are shorter than this are drawn as one, as no screen could show them apart."""
NAMED_FROM = 0.04
"""Of the step: phases shorter than this have no name in the chart."""
EDGED_FROM = 0.004
"""Of the step: bars from this length on have an edge."""
EDGE = 0.7
LANE_HEIGHT = 62
BAR_WIDTH = 0.66
"""Of a lane's height."""
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
STYLE = ".said { margin: .2rem 0; } .said:first-of-type { font-weight: 600; } ol, ul { padding-left: 1.3rem; }"


class Bar(NamedTuple):
    """What is drawn in one piece: a span, or a run of short ones."""

    lane: str
    kind: str
    start_seconds: float
    end_seconds: float
    units: tuple[str, ...]
    busy_seconds: float

    @property
    def label(self) -> str:
        """As short as it can be told from its neighbours."""
        return self.units[0].rpartition(".")[2] if len(self.units) == 1 else ""

    @property
    def name(self) -> str:
        """With its units, the first and the last of many."""
        first, last, count = self.units[0], self.units[-1], len(self.units)
        return f"{first} .. {last} ({count}), {self.kind}" if count > 1 else f"{first} {self.kind}".strip()


def write_timeline_page(steps: Sequence[Explanation], out: Path) -> None:
    """Write the page."""
    out.write_text(timeline_page(steps), encoding="utf-8")


def timeline_page(steps: Sequence[Explanation]) -> str:
    """The page as markup, the steps below each other."""
    model = steps[0].plan.model
    body = "".join(_step(shown, number) for number, shown in enumerate(steps))
    return document(f"{model}: plan", f"<h1>{escape(model)}</h1>{body}", STYLE)


def _step(shown: Explanation, number: int) -> str:
    """All that is said of one step."""
    plan, p = shown.plan, shown.plan.prediction
    between = p.step_seconds_range
    expected = f", expected between {' and '.join(map(format_seconds, between))}" if between is not None else ""
    note = "Drag over a part to see it closer, double-click to see all. Hover for what it is."
    figure = lane_chart(shown) if shown.timeline is None else step_chart(shown, shown.timeline)
    said = "".join(f"<p class='said'>{escape(sentence)}</p>" for sentence in sentences(shown))
    whose = f"{escape(shown.whose)}, one" if shown.whose else "One"
    moves = f"<h2>What would move it</h2>{_list(lever_lines(shown))}" if shown.levers is not None else ""
    why = f"<h2>Why this plan</h2>{_list(plan.reasons)}<h2>Runners-up</h2>{_runners_up(plan)}" if plan.reasons else ""
    return (
        f"<p class='state'>{escape(_made(plan))}</p>"
        f"<h2>{whose} step: {format_seconds(shown.seconds)}{expected}</h2>{said}"
        f"{'' if shown.timeline is None else f'<p class=note>{note}</p>'}"
        f"<div class='chart' id='chart{number}'>{chart_html(figure, first=number == 0)}</div>{moves}"
        f"<div class='pair'><section><h2>Lanes</h2>{_lanes(shown)}</section>"
        f"<section><h2>Memory by phase</h2>{_memory(plan)}</section></div>{why}"
    )


def bars_of(timeline: Timeline) -> list[Bar]:
    """The spans between 0 and the step's end, short ones of one kind that follow each other together."""
    finest = timeline.seconds * FINEST
    found: list[Bar] = []
    for lane in LANES:
        open_bar: Bar | None = None
        for span in (span for span in within_step(timeline) if span.lane == lane):
            bar = _bar(span)
            if open_bar is not None and _joins(open_bar, bar, finest):
                open_bar = open_bar._replace(
                    end_seconds=bar.end_seconds,
                    units=(*open_bar.units, *bar.units),
                    busy_seconds=open_bar.busy_seconds + bar.busy_seconds,
                )
                continue
            found += [open_bar] if open_bar is not None else []
            open_bar = bar
        found += [open_bar] if open_bar is not None else []
    return found


def _bar(span: Span) -> Bar:
    start, end = span.start_seconds, span.end_seconds
    return Bar(span.lane, kind_of(span), start, end, (unit_of(span),), end - start)


def _joins(bar: Bar, following: Bar, finest: float) -> bool:
    """Whether both are too short to be seen apart."""
    return bar.kind == following.kind and following.end_seconds - bar.start_seconds < finest


def step_chart(shown: Explanation, timeline: Timeline) -> go.Figure:
    """Lanes below each other, time from left to right, the phases shaded."""
    scale, unit = _scale(timeline.seconds)
    bars = bars_of(timeline)
    lanes = [lane for lane in LANES if lane in shown.busy_seconds]
    traces = [
        _trace(kind, colour, [bar for bar in bars if bar.kind == kind], lanes, timeline.seconds)
        for kind, colour in COLOURS.items()
        if any(bar.kind == kind for bar in bars)
    ]
    figure = figure_of(traces, height=130 + LANE_HEIGHT * len(lanes))
    figure.update_layout(
        barmode="overlay",
        showlegend=True,
        legend={"traceorder": "normal", "y": -0.12, "yanchor": "top", "itemclick": False, "itemdoubleclick": False},
        uniformtext={"minsize": 9, "mode": "hide"},
        margin={"l": 10, "t": 30, "b": 80},
        hoverlabel={"align": "left"},
        dragmode="zoom",
    )
    figure.update_xaxes(range=[0, timeline.seconds / scale], ticksuffix=f" {unit}", zeroline=False)
    _lane_axis(figure, shown, lanes)
    return figure.update_layout(**_shades(timeline, scale))


def _shades(timeline: Timeline, scale: float) -> dict[str, list[dict[str, Any]]]:
    """The phases behind the lanes, with their names above; all at once, as there may be hundreds."""
    shapes, names = [], []
    for phase in phases(timeline):
        start, end = phase.start_seconds / scale, phase.end_seconds / scale
        shade = {"fillcolor": COLOURS[phase.kind], "opacity": 0.1, "line": {"width": 0}, "layer": "below"}
        shapes.append({"type": "rect", "x0": start, "x1": end, "yref": "paper", "y0": 0, "y1": 1, **shade})
        if phase.end_seconds - phase.start_seconds >= NAMED_FROM * timeline.seconds:
            where = {"x": (start + end) / 2, "y": 1, "yref": "paper", "yanchor": "bottom"}
            names.append({"text": phase.kind, "showarrow": False, **where})
    return {"shapes": shapes, "annotations": names}


def _trace(kind: str, colour: str, bars: Sequence[Bar], lanes: Sequence[str], seconds: float) -> go.Bar:
    scale, _ = _scale(seconds)
    # An edge would hide what is no wider than it.
    edges = [EDGE if bar.end_seconds - bar.start_seconds >= EDGED_FROM * seconds else 0 for bar in bars]
    return go.Bar(
        name=kind,
        orientation="h",
        y=[lanes.index(bar.lane) for bar in bars],
        base=[bar.start_seconds / scale for bar in bars],
        x=[(bar.end_seconds - bar.start_seconds) / scale for bar in bars],
        width=BAR_WIDTH,
        text=[bar.label for bar in bars],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        textfont={"color": "white"},
        customdata=[_hover(bar) for bar in bars],
        hovertemplate="%{customdata}<extra></extra>",
        marker={"color": colour, "line": {"width": edges, "color": "rgba(255,255,255,.5)"}},
    )


def _hover(bar: Bar) -> str:
    """What, and when."""
    times = f"{format_seconds(bar.start_seconds)} to {format_seconds(bar.end_seconds)}"
    return f"<b>{escape(bar.name)}</b><br>{lane_name(bar.lane)}, {times}<br>takes {format_seconds(bar.busy_seconds)}"


def lane_chart(shown: Explanation) -> go.Figure:
    """Busy seconds by lane, where there is no order in time."""
    scale, unit = _scale(shown.seconds)
    lanes = [lane for lane in LANES if lane in shown.busy_seconds]
    busy = [shown.busy_seconds[lane] for lane in lanes]
    trace = go.Bar(
        orientation="h",
        y=list(range(len(lanes))),
        x=[seconds / scale for seconds in busy],
        customdata=[format_seconds(seconds) for seconds in busy],
        width=BAR_WIDTH,
        hovertemplate="%{customdata}<extra></extra>",
        marker={"color": COLOURS["forward"]},
    )
    figure = figure_of([trace], height=80 + LANE_HEIGHT * len(lanes)).update_layout(margin={"l": 10})
    figure.update_xaxes(range=[0, shown.seconds / scale], ticksuffix=f" {unit}", zeroline=False)
    return _lane_axis(figure, shown, lanes)


def _lane_axis(figure: go.Figure, shown: Explanation, lanes: Sequence[str]) -> go.Figure:
    """Names and busy shares of the lanes, the first one on top, the busiest in colour."""
    names = []
    for lane in lanes:
        name = f"{lane_name(lane)}<br>{shown.busy_seconds[lane] / shown.seconds:.0%}"
        names.append(f"<b style='color:{BUSIEST_COLOUR}'>{name}</b>" if lane == shown.busiest else name)
    return figure.update_yaxes(
        tickvals=list(range(len(lanes))),
        ticktext=names,
        range=[len(lanes) - 0.5, -0.5],
        fixedrange=True,
        automargin=True,
        showgrid=False,
        zeroline=False,
        ticklabelstandoff=6,
    )


def _scale(seconds: float) -> tuple[float, str]:
    """In which unit the axis counts."""
    return next(((scale, unit) for scale, unit in UNITS if seconds >= scale), UNITS[-1])


def _made(plan: Plan) -> str:
    return f"for {plan.target} on {plan.gpus} x {plan.device}: {training_words(plan)}"


def _lanes(shown: Explanation) -> str:
    rows = (
        [cell(lane_name(lane)), _figure(format_seconds(busy)), _figure(f"{busy / shown.seconds:.1%}")]
        for lane, busy in shown.busy_seconds.items()
    )
    return table_html(["lane", "busy", "of the step"], rows, figures_from=1)


def _memory(plan: Plan) -> str:
    """Bytes by phase and tier, and what was allowed."""
    p, b = plan.prediction, plan.budget
    tiers = [tier.value for tier in Tier if tier.value in p.phases]
    names = dict.fromkeys(name for tier in tiers for name in p.phases[tier])
    sizes = {name: [p.phases[tier].get(name) for tier in tiers] for name in names}
    sizes["the most to expect"] = [{"gpu": p.gpu_upper_bytes, "host": p.host_upper_bytes}.get(tier) for tier in tiers]
    sizes["allowed"] = [getattr(b, f"{tier}_bytes") for tier in tiers]
    rows = (
        [cell(name), *(_figure("" if size is None else format_bytes(size)) for size in row)]
        for name, row in sizes.items()
    )
    disk = f"<p class='note'>{format_bytes(p.nvme_bytes)} on NVMe, of {format_bytes(b.nvme_bytes)}.</p>"
    return table_html(["", *tiers], rows, figures_from=1) + (disk if p.nvme_bytes else "")


def _runners_up(plan: Plan) -> str:
    rows = (
        [
            cell(other.description),
            _figure("" if other.step_seconds is None else format_seconds(other.step_seconds)),
            *(_figure(format_bytes(size)) for size in (other.gpu_peak_bytes, other.host_bytes, other.nvme_bytes)),
            cell(other.why_not),
        ]
        for other in plan.alternatives
    )
    return table_html(["plan", "step", "gpu", "host", "nvme", "why not"], rows) if plan.alternatives else "<p>None.</p>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _figure(text: str) -> str:
    return cell(text, "figure")
