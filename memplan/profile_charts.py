"""A profile as charts: memory by module, memory over a step, FLOPs and time by layer."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import plotly.graph_objects as go

from memplan.formatting import format_bytes, format_flops, format_seconds
from memplan.page import byte_unit, figure_of
from memplan.profile_words import HOLDS, path_labels, short_operation
from memplan.rows import MODEL, Row
from profiler.events import Category
from profiler.optimizers import OPTIMIZERS
from profiler.profile import MemoryPoint, ModelProfile

COLOURS = {
    Category.PARAMETER: "#3a6cb4",
    Category.GRADIENT: "#2f8f93",
    Category.OPTIMIZER: "#7a58c0",
    Category.ACTIVATION: "#c2703d",
    Category.WORKSPACE: "#7d8794",
    Category.SCRATCH: "#b9a26a",
    Category.UPDATE: "#a06a8c",
    Category.BUFFER: "#a8617f",
    Category.INPUT: "#8a8f3c",
}
MODULE_COLOUR = "#59636f"
PEAK_COLOUR = "#d0524a"
PASSES = {"forward": "#3a6cb4", "backward": "#c2703d", "recompute": "#a8617f"}
BARS_SHOWN = 24
BY_MODULE = (Category.PARAMETER, Category.GRADIENT, Category.OPTIMIZER, Category.ACTIVATION)


def module_bytes(profile: ModelProfile, root: Row) -> dict[str, Counter[Category]]:
    """Each row's own bytes by category, under the path of its first layer; gradients where parameters are trained."""
    rows = {layer.path: row.alike[0].path for _, row in root.walk() for layer in row.alike}
    found: dict[str, Counter[Category]] = {path: Counter() for path in rows.values()}
    state = OPTIMIZERS[profile.optimizer].state
    for parameter in profile.parameters:
        path = parameter.name.rpartition(".")[0]
        while path not in rows:  # a layer without a row of its own
            path = path.rpartition(".")[0]
        own = found[rows[path]]
        own[Category.PARAMETER] += parameter.bytes
        if parameter.trainable:
            own[Category.GRADIENT] += parameter.bytes
            own[Category.OPTIMIZER] += sum(state(parameter))
    for _, row in root.walk():
        found[row.alike[0].path][Category.ACTIVATION] += row.own("activation_bytes")
    return found


def memory_chart(profile: ModelProfile, root: Row) -> go.Figure:
    """A treemap: every module a tile, in it its own parameters, gradients, optimizer state and saved activations."""
    tiles = _tiles(root, "", module_bytes(profile, root))
    chart = go.Treemap(
        ids=[tile.id for tile in tiles],
        labels=[tile.label for tile in tiles],
        parents=[tile.parent for tile in tiles],
        values=[tile.bytes for tile in tiles],
        text=[format_bytes(tile.bytes) for tile in tiles],
        textinfo="label+text",
        hovertext=[tile.words for tile in tiles],
        hoverinfo="text",
        branchvalues="total",
        marker={
            "colors": [tile.colour for tile in tiles],
            "line": {"width": 1, "color": "rgba(255,255,255,.35)"},
            "pad": {"t": 22},
        },
        textfont={"color": "white"},
    )
    return figure_of([chart], height=520).update_layout(margin={"l": 0, "r": 0, "t": 8, "b": 0})


class _Tile(NamedTuple):
    id: str
    parent: str
    label: str
    bytes: int
    colour: str
    words: str


def _tiles(row: Row, parent: str, own: dict[str, Counter[Category]]) -> list[_Tile]:
    """A row's tile, then those of the rows in it and of what it holds itself."""
    path = row.alike[0].path
    number, name = path or MODEL, row.label + row.times
    inside = [tile for below in row.below for tile in _tiles(below, number, own)]
    for category in BY_MODULE:
        if size := own[path][category]:
            words = f"{name}: {HOLDS[category]}, {format_bytes(size)}"
            inside.append(_Tile(f"{number}/{category}", number, HOLDS[category], size, COLOURS[category], words))
    size = sum(tile.bytes for tile in inside if tile.parent == number)
    return [_Tile(number, parent, name, size, MODULE_COLOUR, f"{name}: {row.type}, {format_bytes(size)}"), *inside]


def timeline_chart(profile: ModelProfile) -> go.Figure:
    """What is allocated at every moment of a steady step, by category; phases shaded, the peak marked."""
    points = profile.timeline
    sums = [sum(point.bytes.values()) for point in points]
    unit, scale = byte_unit(max(sums, default=0))
    moments = list(range(len(points)))
    areas = []
    for category, colour in reversed(COLOURS.items()):
        sizes = [point.bytes.get(category, 0) for point in points]
        if any(sizes):
            area = _level(HOLDS[category], sizes, scale, colour)
            areas.append(area.update(stackgroup="all", fillcolor=colour, line_width=0))
    total = _level("in all", sums, scale, "rgba(0,0,0,0)")
    total.update(
        customdata=[f"{format_bytes(s)} in {p.module or 'the model'}" for s, p in zip(sums, points, strict=True)]
    )
    figure = figure_of([*areas, total.update(showlegend=False)], unit, height=380)
    figure.update_layout(showlegend=True, hovermode="x unified", legend_traceorder="reversed")
    figure.update_xaxes(
        showticklabels=False, showgrid=False, unifiedhovertitle_text="moment %{x}", range=[0, max(len(points) - 1, 1)]
    )
    for number, (phase, start, stop) in enumerate(_phases(points)):
        shade = {"fillcolor": "#808890", "opacity": 0.16 * (number % 2), "line_width": 0}
        figure.add_vrect(start, stop, **shade)
        # In two rows: next to a long phase there may be two that are too short for their names.
        name = {"text": phase, "showarrow": False, "yref": "paper", "y": 0, "yanchor": "top"}
        name["yshift"] = -2 - 16 * (number % 2)
        at_end = stop == len(points) - 1
        figure.add_annotation(x=stop if at_end else (start + stop) / 2, xanchor="right" if at_end else "center", **name)
    if sums:
        peak = max(moments, key=sums.__getitem__)
        figure.add_annotation(
            x=peak,
            y=sums[peak] / scale,
            text=f"peak {format_bytes(sums[peak])}",
            showarrow=True,
            arrowcolor=PEAK_COLOUR,
            ax=0,
            ay=-24,
        )
        figure.update_yaxes(range=[0, 1.12 * sums[peak] / scale])
    return figure


def _phases(points: Sequence[MemoryPoint]) -> Iterator[tuple[str, int, int]]:
    """Each phase with its first moment and the one after its last."""
    start = 0
    for phase, run in groupby(points, key=lambda point: point.phase):
        stop = start + sum(1 for _ in run)
        yield phase, start, min(stop, len(points) - 1)
        start = stop


def _level(name: str, sizes: Sequence[int], scale: int, colour: str) -> go.Scatter:
    return go.Scatter(
        name=name,
        x=list(range(len(sizes))),
        y=[size / scale for size in sizes],
        mode="lines",
        line={"color": colour, "shape": "hv"},
        customdata=[format_bytes(size) for size in sizes],
        hovertemplate="%{customdata}",
    )


def flops_chart(root: Row) -> go.Figure:
    """The layers that compute the most, without what the layers in them compute."""
    passes = {name: {path: float(row.own(f"{name}_flops")) for path, row in path_labels(root)} for name in PASSES}
    bars = {name: flops for name, flops in passes.items() if any(flops.values())}
    return _bars(bars, format_flops, "FLOP")


def layer_time_chart(root: Row) -> go.Figure:
    """The layers that take the longest, without the layers in them."""
    own = {
        path: (row.seconds or 0.0) - sum(below.seconds or 0.0 for below in row.below) for path, row in path_labels(root)
    }
    return _bars({"forward and backward": own}, format_seconds, "s")


def operation_time_chart(profile: ModelProfile) -> go.Figure:
    """The operations that take the longest."""
    return _bars(
        {"all calls": {short_operation(o.name): o.seconds or 0.0 for o in profile.operations}}, format_seconds, "s"
    )


def _bars(parts: dict[str, dict[str, float]], text: Callable[[float], str], unit: str) -> go.Figure:
    """Horizontal bars, the longest first, each of all parts; the rest is one bar."""
    whole: Counter[str] = Counter()
    for values in parts.values():
        whole.update(values)
    ranked = [name for name, value in whole.most_common() if value > 0]
    shown = ranked[:BARS_SHOWN]
    rest = f"{len(ranked) - BARS_SHOWN} others"
    traces = []
    for (part, values), colour in zip(parts.items(), PASSES.values(), strict=False):
        lengths = {name: values[name] for name in shown}
        if len(ranked) > BARS_SHOWN:
            lengths[rest] = sum(values[name] for name in ranked[BARS_SHOWN:])
        traces.append(
            go.Bar(
                name=part,
                orientation="h",
                y=list(lengths),
                x=list(lengths.values()),
                customdata=[text(value) for value in lengths.values()],
                hovertemplate="%{y}<br>%{customdata} " + part + "<extra></extra>",
                marker={"color": colour, "line": {"width": 0}},
            )
        )
    figure = figure_of(traces, height=100 + 22 * len(lengths)).update_layout(barmode="stack", bargap=0.25)
    legend = len(traces) > 1
    figure.update_layout(showlegend=legend, legend_traceorder="normal", margin={"l": 10, "t": 36 if legend else 8})
    return figure.update_yaxes(autorange="reversed", automargin=True, ticklabelstandoff=4).update_xaxes(
        tickformat="~s", ticksuffix=unit
    )
