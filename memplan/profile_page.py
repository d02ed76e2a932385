"""The page of a profile: everything that is known about a model's step, in one HTML file that needs nothing else."""

from collections.abc import Iterable, Iterator
from datetime import date
from html import escape
from pathlib import Path

import plotly.graph_objects as go
import torch

from memplan import profile_charts as charts
from memplan import profile_words as words
from memplan.formatting import format_bytes, format_count, format_flops, format_seconds
from memplan.page import cell, chart_html, document, table_html
from memplan.rows import Row, fold
from profiler.profile import ModelProfile

STYLE = """
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.facts div { background: var(--panel); border-radius: 6px; padding: .5rem .8rem; color: var(--muted); }
.facts b { display: block; font-size: 1.2rem; color: var(--ink); }
.layers { font-size: .88rem; } .layers th, .layers td { padding: .1rem .7rem .1rem 0; white-space: nowrap; }
.layers td:nth-child(2) { max-width: 13em; overflow: hidden; text-overflow: ellipsis; }
.chart { min-height: 0; }
.aside { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); gap: 0 2.5rem; align-items: start; }
@media (max-width: 900px) { .aside { grid-template-columns: minmax(0, 1fr); } }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
"""
CONTENTS_SHOWN = 12
Chart = tuple[str, str, go.Figure]
"""Title, a sentence on how to read it, and the chart."""


def write_profile_page(profile: ModelProfile, out: Path) -> None:
    """Write the page."""
    out.write_text(profile_page(profile), encoding="utf-8")


def profile_page(profile: ModelProfile) -> str:
    """The page as markup."""
    root = fold(profile.layers)
    drawn = "".join(
        f"<section><h2>{title}</h2><p class='note'>{note}</p>"
        f"<div class='chart' id='chart{i}'>{chart_html(figure, first=i == 0)}</div></section>"
        for i, (title, note, figure) in enumerate(_charts(profile, root))
    )
    return document(
        f"{profile.model}: profile",
        f"<h1>{escape(profile.model)}</h1><p class='state'>{escape(_made(profile))}</p>"
        f"{_facts(profile)}{_warnings(profile)}"
        f"<div class='aside'><section><h2>Peak memory of a step</h2>{_peaks(profile)}</section>"
        f"<section><h2>Step</h2>{_totals(profile)}</section></div>"
        f"{_contents(profile)}{drawn}"
        f"<h2>Layers</h2>{_layers(root)}{_operations(profile)}",
        STYLE,
    )


def _made(profile: ModelProfile) -> str:
    conditions = words.headline(profile).removeprefix(f"{profile.model}: ")
    return f"{conditions}; profiled with memplan on PyTorch {torch.__version__}, {date.today():%Y-%m-%d}"


def _facts(profile: ModelProfile) -> str:
    peaks = profile.peaks
    facts = [
        (format_bytes(peaks.overall_bytes), f"peak allocated, in {peaks.phase}"),
        (format_bytes(peaks.reserved_bytes), "reserved by the allocator"),
    ]
    if profile.device_bytes is not None:
        facts.append((format_bytes(profile.device_bytes), "in nvidia-smi"))
    facts.append((format_count(profile.parameter_elements), "parameters"))
    facts.append((format_flops(profile.forward_flops + profile.backward_flops), "a step, without recompute"))
    if profile.step_seconds is not None:
        facts.append((format_seconds(profile.step_seconds), f"a step on {profile.device}"))
    return "<div class='facts'>" + "".join(f"<div><b>{b}</b>{escape(text)}</div>" for b, text in facts) + "</div>"


def _warnings(profile: ModelProfile) -> str:
    return "".join(f"<p class='warning'>{escape(text)}</p>" for text in words.warnings(profile))


def _charts(profile: ModelProfile, root: Row) -> Iterator[Chart]:
    if profile.timeline:
        note = "A step in the steady state, one moment after the other (not to scale in time)."
        yield "Memory over a step", note, charts.timeline_chart(profile)
    note = "Equal layers are one tile. Not all of it is there at the same moment. Click to look inside."
    yield "Memory by module", note, charts.memory_chart(profile, root)
    note = "Each layer without those inside it, equal ones together, the largest first."
    yield "FLOPs by layer", note, charts.flops_chart(root)
    if root.seconds:
        yield "Time by layer", f"{note} Forward and backward.", charts.layer_time_chart(root)
    if any(o.seconds for o in profile.operations):
        yield "Time by operation", "All calls in forward and backward.", charts.operation_time_chart(profile)


def _peaks(profile: ModelProfile) -> str:
    steady, first = profile.peaks.by_phase, profile.first_peaks.by_phase
    rows = []
    for phase, size in steady.items():
        name = words.phase_name(profile, phase)
        marked = f"<td><b>{name} ◀ peak</b></td>" if phase == profile.peaks.phase else cell(name)
        rows.append(
            [marked, _figure(format_bytes(size)), _figure(format_bytes(first[phase]) if phase in first else "")]
        )
    rows += [[cell(name), _figure(format_bytes(size)), cell("")] for name, size in words.reserves(profile)]
    return table_html(["", "every step", "first step"], rows, figures_from=1)


def _totals(profile: ModelProfile) -> str:
    return table_html([], ([cell(name), cell(text)] for name, text in words.totals(profile)))


def _contents(profile: ModelProfile) -> str:
    found = words.contents(profile.peak_contents)
    if not found:
        return ""
    rows = ([_figure(format_bytes(c.bytes)), _figure(f"{c.share:.1%}"), cell(c.words)] for c in found[:CONTENTS_SHOWN])
    more = len(found) - CONTENTS_SHOWN
    rest = f"<p class='note'>and {more} smaller ones</p>" if more > 0 else ""
    return f"<h2>What the peak in {profile.peaks.phase} is made of</h2>{table_html([], rows)}{rest}"


def _layers(root: Row) -> str:
    rows = list(root.walk())
    columns = words.layer_columns(rows)
    lines = []
    for at, (level, row) in enumerate(rows):
        label = f"<td style='padding-left:{1.1 * level:.1f}em'>{escape(row.label)}</td>"
        kind = f"<td title='{escape(row.type)}'>{escape(row.type + row.times)}</td>"
        lines.append([label, kind, *(_figure(cells[at]) for _, cells in columns)])
    heads = [head.replace("/\n", "/").replace("\n", " ") for head, _ in columns]
    return f"<div class='layers'>{table_html(['layer', 'type', *heads], lines, figures_from=2)}</div>"


def _operations(profile: ModelProfile) -> str:
    rows: Iterable[list[str]] = (
        [
            cell(words.short_operation(o.name)),
            _figure(f"{o.calls:,}"),
            _figure("no formula" if o.flops is None else format_flops(o.flops)),
            _figure(format_bytes(o.moved_bytes)),
            _figure("" if o.seconds is None else format_seconds(o.seconds)),
        ]
        for o in profile.operations
    )
    table = table_html(["operation", "calls", "FLOPs", "bytes moved", "time"], rows, figures_from=1)
    return f"<details><summary>{len(profile.operations)} operations</summary>{table}</details>"


def _figure(text: str) -> str:
    return cell(text, "figure")
