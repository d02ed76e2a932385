"""The report of a run: what was planned and what happened, as one HTML page that needs nothing else."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from memplan.page import byte_unit, cell, chart_html, document, figure_of, table_html
from offload.errors import PlanError
from offload.events import LINKS
from offload.plan import Plan
from tui.errors import RunError
from tui.format import bytes_of, bytes_text, clock_text, count_text, number_text, seconds_text
from tui.ranks import RankRow, rank_rows
from tui.source import EVENTS, PLAN, RankTails, Tail
from tui.view import TIERS, RunView, StepRecord, fold, step_record

COLOURS = {
    "gpu": "#3f9f7d",
    "host": "#4a7fc9",
    "nvme": "#8f6fd0",
    "line": "#b9803a",
    "muted": "#8a93a0",
    "over": "#d0524a",
    "host_to_device": "#4a7fc9",
    "device_to_host": "#3f9f7d",
    "nvme_read": "#8f6fd0",
    "nvme_write": "#c0abea",
}


def write_report(run_dir: Path, out: Path) -> None:
    """Write the report of the run in ``run_dir`` to the file ``out``.

    The run may be unfinished. Raises RunError when the plan or the events are missing or can not be read, or when
    ``out`` can not be written.
    """
    plan = _plan(run_dir / PLAN)
    view, steps = _history(run_dir / EVENTS)
    views: dict[int, RunView] = {}
    for rank, event in RankTails(run_dir).poll():
        views[rank] = fold(views.get(rank, RunView()), event)
    rows = rank_rows(views, view.latest or 0.0)
    try:
        out.write_text(page(plan, view, steps, rows), encoding="utf-8")
    except OSError as error:
        raise RunError(f"the report can not be written to {out}: {error.strerror}; name another file") from error


def page(plan: Plan, view: RunView, steps: Sequence[StepRecord], ranks: Sequence[RankRow] = ()) -> str:
    """The whole page. ``steps`` are all steps of the run, ``view`` and ``ranks`` how it stands at the end."""
    charts = [
        ("Loss", loss_chart(steps)),
        ("Memory by tier: actual, peak, predicted, budget", memory_chart(plan, steps)),
        ("Step time, beside its prediction", seconds_chart(plan, steps)),
        ("Tokens a second", tokens_chart(steps)),
        ("Traffic by link, bytes a step", traffic_chart(steps)),
        ("Memory over the run", tiers_chart(steps)),
    ]
    figures = "".join(
        f"<section><h2>{name}</h2><div class='chart' id='chart{i}'>{chart_html(figure, first=i == 0)}</div></section>"
        for i, (name, figure) in enumerate(charts)
    )
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in plan.reasons)
    return document(
        f"{plan.model}: run",
        f"<h1>{escape(plan.model)}</h1><p class='state'>{escape(_state(view))}</p>"
        f"<h2>Summary</h2>{summary_table(plan, view, steps)}"
        f"{f'<h2>Ranks</h2>{ranks_table(ranks)}' if ranks else ''}"
        f"<div class='pair'>{figures}</div>"
        f"<h2>Why this plan</h2><ul>{reasons or '<li>The plan gives no reasons.</li>'}</ul>"
        f"<h2>Placements</h2>{placements_table(plan)}"
        f"<h2>Runners-up</h2>{alternatives_table(plan)}",
    )


def summary_table(plan: Plan, view: RunView, steps: Sequence[StepRecord]) -> str:
    """The run in a few lines, predicted beside actual."""
    last = steps[-1] if steps else None
    # The first step also warms up: it is left out of the mean where there are others.
    seconds = [s.seconds for s in (steps[1:] or steps) if s.seconds is not None]
    rates = [s.tokens_per_second for s in (steps[1:] or steps) if s.tokens_per_second is not None]
    p, budgets, predicted = plan.prediction, plan.budget_bytes, plan.predicted_bytes
    rows = [
        ["steps", f"{len(steps):,}", "", f"{view.run.last_step:,}" if view.run and view.run.last_step else ""],
        ["elapsed", clock_text(view.elapsed_seconds), "", ""],
        ["last loss", number_text(last.loss if last else None), "", ""],
        ["mean step", seconds_text(_mean(seconds)), seconds_text(p.step_seconds), ""],
        ["mean tokens/s", count_text(_mean(rates)), "", ""],
    ]
    for tier in TIERS:
        peak = max((s.peak_bytes[tier] for s in steps if tier in s.peak_bytes), default=None)
        rows.append([f"{tier} peak", bytes_text(peak), bytes_text(predicted[tier]), bytes_text(budgets[tier])])
    rows += [
        ["bottleneck", "", p.bottleneck or "", ""],
        ["parameters", count_text(view.run.parameters if view.run else None), "", ""],
        ["precision, device", f"{plan.precision}, {plan.device} x {plan.gpus}", "", ""],
        ["ZeRO stage", str(plan.zero_stage), "", ""],
        ["batch", f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} x {plan.gpus}", "", ""],
        ["recomputed modules", str(len(plan.recompute)), "", ""],
    ]
    return _table(["", "actual", "predicted", "planned or budget"], rows)


def ranks_table(ranks: Sequence[RankRow]) -> str:
    """How each rank stands: the last steps of each, and the memory of each beside the prediction."""
    tiers = dict.fromkeys(tier for row in ranks for tier, *_ in row.held_bytes)
    rows = []
    for row in ranks:
        held = {tier: (now, predicted) for tier, now, predicted in row.held_bytes}
        memory = [bytes_of(*held.get(tier, (None, None))) for tier in tiers]
        state = f"{row.state} {row.where}".rstrip() + (", slowest" if row.slowest else "")
        waited = seconds_text(row.waited_seconds)
        rows.append([f"{row.rank}", row.host, state, f"{row.step:,}", seconds_text(row.seconds), waited, *memory])
    head = ["rank", "host", "state", "step", "mean step", "of it waiting", *(f"{tier} of predicted" for tier in tiers)]
    return _table(head, rows)


def placements_table(plan: Plan) -> str:
    """Where every unit lives."""
    rows = [[p.unit or "(root)", p.parameters.value, p.gradients.value, p.optimizer.value] for p in plan.placements]
    return _table(["unit", "parameters", "gradients", "optimizer state"], rows)


def alternatives_table(plan: Plan) -> str:
    """The plans that were considered and not taken."""
    if not plan.alternatives:
        return "<p>None were considered.</p>"
    rows = [
        [
            a.description,
            seconds_text(a.step_seconds),
            bytes_text(a.gpu_peak_bytes),
            bytes_text(a.host_bytes),
            bytes_text(a.nvme_bytes),
            a.why_not,
        ]
        for a in plan.alternatives
    ]
    return _table(["plan", "step", "gpu", "host", "nvme", "why not"], rows)


def loss_chart(steps: Sequence[StepRecord]) -> go.Figure:
    """Loss by step."""
    return figure_of([_line("loss", steps, lambda s: s.loss, COLOURS["line"])], "loss", "step")


def seconds_chart(plan: Plan, steps: Sequence[StepRecord]) -> go.Figure:
    """Seconds by step, and the predicted time as a level."""
    lines = [_line("actual", steps, lambda s: s.seconds, COLOURS["line"])]
    if plan.prediction.step_seconds is not None:
        level = _line("predicted", steps, lambda _: plan.prediction.step_seconds, COLOURS["muted"])
        lines.append(level.update(line_dash="dash"))
    return figure_of(lines, "seconds", "step").update_layout(showlegend=True).update_yaxes(rangemode="tozero")


def tokens_chart(steps: Sequence[StepRecord]) -> go.Figure:
    """Tokens a second by step."""
    line = _line("tokens/s", steps, lambda s: s.tokens_per_second, COLOURS["line"])
    return figure_of([line], "tokens a second", "step").update_yaxes(rangemode="tozero")


def memory_chart(plan: Plan, steps: Sequence[StepRecord]) -> go.Figure:
    """Each tier in percent of its budget: held at the end, highest, predicted."""
    budgets = plan.budget_bytes
    last = steps[-1] if steps else None
    bars: list[tuple[str, dict[str, float], str]] = [
        ("predicted", {tier: float(size) for tier, size in plan.predicted_bytes.items()}, COLOURS["muted"]),
        ("peak", last.peak_bytes if last else {}, COLOURS["host"]),
        ("at the end", last.memory_bytes if last else {}, COLOURS["gpu"]),
    ]
    traces = []
    for name, held, colour in bars:
        tiers = [tier for tier in reversed(TIERS) if budgets[tier] and tier in held]
        traces.append(
            go.Bar(
                name=name,
                orientation="h",
                y=tiers,
                x=[held[tier] / budgets[tier] * 100 for tier in tiers],
                text=[bytes_text(held[tier]) for tier in tiers],
                textposition="outside",
                cliponaxis=False,
                marker_color=colour,
                hoverinfo="text+name",
            )
        )
    figure = figure_of(traces, "", "percent of the budget").update_layout(showlegend=True, legend_traceorder="reversed")
    return figure.update_xaxes(range=[0, max(110, *(x for t in traces for x in t.x))]).add_vline(
        100, line_color=COLOURS["over"], line_width=1
    )


def traffic_chart(steps: Sequence[StepRecord]) -> go.Figure:
    """Bytes over every link by step."""
    return _bytes_chart(steps, "traffic_bytes", LINKS)


def tiers_chart(steps: Sequence[StepRecord]) -> go.Figure:
    """Bytes held in every tier by step."""
    return _bytes_chart(steps, "memory_bytes", TIERS)


def _bytes_chart(steps: Sequence[StepRecord], field: str, names: Sequence[str]) -> go.Figure:
    """One line for each name that has any bytes, all in the unit that suits the largest."""
    held: dict[str, list[float | None]] = {name: [getattr(s, field).get(name) for s in steps] for name in names}
    largest = max((b for series in held.values() for b in series if b is not None), default=0.0)
    unit, scale = byte_unit(largest)
    x = [s.step for s in steps]
    lines = [
        _trace(name.replace("_", " "), x, [None if b is None else b / scale for b in series], COLOURS[name])
        for name, series in held.items()
        if any(series)
    ]
    return figure_of(lines, unit, "step").update_layout(showlegend=True).update_yaxes(rangemode="tozero")


def _plan(path: Path) -> Plan:
    if not path.is_file():
        raise RunError(
            f"{path} is missing: {path.parent} is not the directory of a run; give the one of `memplan train`"
        )
    try:
        return Plan.load(path)
    except PlanError as error:
        raise RunError(str(error)) from error


def _history(path: Path) -> tuple[RunView, list[StepRecord]]:
    """How the run stands, and every step of it; steps that were done again count once, as they were done last."""
    if not path.is_file():
        raise RunError(f"{path} is missing: nothing was trained in {path.parent} yet; run `memplan train` first")
    view, steps = RunView(), dict[int, StepRecord]()
    try:
        for event in Tail(path).poll():
            view = fold(view, event)
            if event.get("event") == "run" and view.run is not None:
                steps = {step: record for step, record in steps.items() if step < view.run.first_step}
            elif event.get("event") == "step" and (record := step_record(event)) is not None:
                steps[record.step] = record
    except OSError as error:
        raise RunError(f"{path} can not be read: {error.strerror}") from error
    return view, [steps[step] for step in sorted(steps)]


def _state(view: RunView) -> str:
    if view.end is None:
        return f"step {view.step:,}, not ended"
    return f"{view.end.reason} at step {view.step:,}" + (f": {view.end.message}" if view.end.message else "")


def _line(
    name: str, steps: Sequence[StepRecord], value: Callable[[StepRecord], float | None], colour: str
) -> go.Scatter:
    return _trace(name, [s.step for s in steps], [value(s) for s in steps], colour)


def _trace(name: str, x: Sequence[int], y: Sequence[float | None], colour: str) -> go.Scatter:
    return go.Scatter(name=name, x=x, y=y, mode="lines", line={"color": colour, "width": 1.6})


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return table_html(head, ([cell(text, text if text in TIERS else "") for text in row] for row in rows))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
