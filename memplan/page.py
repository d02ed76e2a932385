"""What the HTML pages share: one self-contained file, charts drawn by a library that it holds once, light and dark."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import plotly.io

from memplan.formatting import BYTE_UNITS, format_bytes

STYLE = """
:root { color-scheme: light dark; --ink: #20262e; --muted: #626b78; --rule: #e3e6ea; --back: #fff; --panel: #f5f6f8;
  --warn: #8a5a00; --gpu: #2f8468; --host: #3a6cb4; --nvme: #7a58c0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --muted: #98a2af; --rule: #30363f; --back: #14171b;
  --panel: #1d2127; --warn: #e0b050; --gpu: #58c09b; --host: #7aa7ea; --nvme: #b396f0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 1220px;
  margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .4rem; }
.state, .note { color: var(--muted); margin-top: .2rem; } .warning { color: var(--warn); margin: .3rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; color: var(--muted); } td.figure, th.figure { text-align: right; white-space: nowrap; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1.5rem; }
@media (max-width: 800px) { .pair { grid-template-columns: minmax(0, 1fr); } }
.scroll { overflow-x: auto; } .chart { min-height: 300px; }
.gpu { color: var(--gpu); } .host { color: var(--host); } .nvme { color: var(--nvme); }
.js-plotly-plot .xtick text, .js-plotly-plot .ytick text, .js-plotly-plot .xtitle, .js-plotly-plot .ytitle,
.js-plotly-plot .legendtext, .js-plotly-plot .annotation-text { fill: var(--muted) !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--rule) !important; }
"""
"""Charts have no colours of their own for text and grid: the page's apply, also when its scheme changes."""


def document(title: str, body: str, style: str = "") -> str:
    """The whole page; ``body`` is markup."""
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def figure_of(traces: Iterable[Any], y_title: str = "", x_title: str = "", height: int = 300) -> go.Figure:
    """The traces in the pages' style."""
    figure = go.Figure(list(traces))
    return figure.update_layout(
        template="plotly_white",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height,
        margin={"l": 60, "r": 20, "t": 48, "b": 40},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        showlegend=False,
        xaxis_title=x_title,
        yaxis_title=y_title,
    )


def chart_html(figure: go.Figure, first: bool) -> str:
    """The chart as markup; the ``first`` of a page brings the library along."""
    return str(
        plotly.io.to_html(
            figure, full_html=False, include_plotlyjs=first, config={"displayModeBar": False, "responsive": True}
        )
    )


def table_html(head: Sequence[str], rows: Iterable[Iterable[str]], figures_from: int | None = None) -> str:
    """A table of cells that are markup; the heads from column ``figures_from`` on stand over figures."""
    header = "".join(
        f"<th{' class=figure' if figures_from is not None and at >= figures_from else ''}>{escape(text)}</th>"
        for at, text in enumerate(head)
    )
    header = f"<thead><tr>{header}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<div class='scroll'><table>{header}<tbody>{body}</tbody></table></div>"


def cell(text: str, css: str = "") -> str:
    """A table's cell."""
    return f"<td class='{css}'>{escape(text)}</td>" if css else f"<td>{escape(text)}</td>"


def byte_unit(largest: float) -> tuple[str, int]:
    """The unit in which so many bytes are written, and how many bytes it is."""
    unit = format_bytes(largest).split()[1]
    return unit, 1024 ** BYTE_UNITS.index(unit)
