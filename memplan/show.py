"""Profiles, plans and checks as tables for people."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.doctor import Check
from memplan.formatting import format_bytes, format_count, format_flops, format_seconds
from offload.plan import Plan, Tier
from profiler.profile import LayerProfile, ModelProfile

UNCOUNTED_SHOWN = 8
STATUS_STYLES = {"ok": "green", "info": "blue", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class _Row:
    """A layer, or several alike that follow each other; the figures are of all of them together."""

    name: str
    depth: int
    alike: tuple[LayerProfile, ...]

    def total(self, figure: str) -> int:
        """Sum of one figure."""
        return sum(getattr(layer, figure) for layer in self.alike)


def profile_tables(profile: ModelProfile) -> RenderableType:
    """The layers, the totals, the peak by phase, and what was not counted."""
    table = _table(f"{profile.model}: one step of batch {profile.batch_size}, {profile.precision}")
    table.padding = (0, 1, 0, 0)  # six columns and deep names in 80 characters
    # In a narrow terminal the names give way, not the figures.
    for name in ("layer", "type"):
        table.add_column(name, overflow="ellipsis")
    for name in ("params", "fwd FLOP", "bwd FLOP", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _rows(profile.layers):
        parameters, saved = row.total("parameters"), row.total("activation_bytes")
        table.add_row(
            "  " * row.depth + row.name,
            row.alike[0].type + (f" x {len(row.alike)}" if len(row.alike) > 1 else ""),
            format_count(parameters) if parameters else "",
            _flops(row.total("forward_flops")),
            _flops(row.total("backward_flops")),
            format_bytes(saved) if saved else "",
        )
    return Group(table, _totals(profile), *_remarks(profile))


def _flops(count: int) -> str:
    """``10.2 G``: the column's head has the unit."""
    return format_flops(count).removesuffix("FLOP").rstrip() if count else ""


def _table(title: str | None = None, *, header: bool = True) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=header,
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )


def _rows(layers: tuple[LayerProfile, ...]) -> Iterable[_Row]:
    """Every layer under its parent; the later ones of a run of equal siblings are folded into the first."""
    children: dict[str, list[LayerProfile]] = {}
    for layer in layers[1:]:
        children.setdefault(layer.path.rpartition(".")[0], []).append(layer)

    def shape(layer: LayerProfile) -> tuple[object, ...]:
        # What they save is left out: the first of equal blocks also saves what it shares with the others.
        figures = (layer.type, layer.parameters, layer.forward_flops, layer.backward_flops)
        return (*figures, *(shape(child) for child in children.get(layer.path, ())))

    def walk(alike: tuple[LayerProfile, ...], name: str, depth: int) -> Iterable[_Row]:
        yield _Row(name, depth, alike)
        below = [children.get(layer.path, []) for layer in alike]
        start = 0
        for _, run in groupby(below[0], key=shape):
            first, *rest = (layer.path.rpartition(".")[2] for layer in run)
            stop = start + 1 + len(rest)
            label = first if not rest else f"{first}-{rest[-1]}" if first.isdigit() else f"{first} .. {rest[-1]}"
            yield from walk(tuple(layer for each in below for layer in each[start:stop]), label, depth + 1)
            start = stop

    return walk(layers[:1], "(model)", 0)


def _totals(profile: ModelProfile) -> Table:
    peaks = profile.peaks
    table = _table("a plain training step on a GPU", header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", f"{format_count(profile.parameter_elements)}")
    trained = profile.trainable_elements
    if trained != profile.parameter_elements:
        table.add_row("of which trained", format_count(trained))
    table.add_row("FLOPs forward + backward", format_flops(profile.forward_flops + profile.backward_flops))
    for phase, size in peaks.by_phase.items():
        table.add_row(f"peak in {phase}" + (f" ({profile.optimizer})" if phase == "step" else ""), format_bytes(size))
    table.add_section()
    table.add_row("peak allocated", format_bytes(peaks.overall_bytes), style="bold")
    table.add_row("peak reserved by the allocator", format_bytes(peaks.reserved_bytes))
    return table


def _remarks(profile: ModelProfile) -> Iterable[Text]:
    if profile.uncounted_ops:
        by_calls = sorted(profile.uncounted_ops.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} x {calls}" for name, calls in by_calls[:UNCOUNTED_SHOWN])
        more = len(by_calls) - UNCOUNTED_SHOWN
        rest = f" and {more} more (see --json)" if more > 0 else ""
        yield Text(f"no FLOPs counted for: {shown}{rest}", style="dim")
    for assumption in profile.assumptions:
        yield Text(f"assumed: {assumption}", style="yellow")


def plan_tables(plan: Plan) -> RenderableType:
    """The plan, why, and the runners-up."""
    reasons = Text("\n".join(f"- {reason}" for reason in plan.reasons))
    parts: list[RenderableType] = [plan_summary(plan), _placements(plan), Text("why", style="bold"), reasons]
    if plan.alternatives:
        table = _table("runners-up")
        table.add_column("plan")
        for name in ("step", "gpu", "host", "nvme"):
            table.add_column(name, justify="right")
        table.add_column("why not")
        for other in plan.alternatives:
            seconds = format_seconds(other.step_seconds) if other.step_seconds is not None else "?"
            sizes = (format_bytes(b) for b in (other.gpu_peak_bytes, other.host_bytes, other.nvme_bytes))
            table.add_row(other.description, seconds, *sizes, other.why_not)
        parts.append(table)
    return Group(*parts)


def plan_summary(plan: Plan) -> RenderableType:
    """What the plan does and what is expected of it, beside what was allowed."""
    batch = f"micro-batch {plan.micro_batch_size} x {plan.gradient_accumulation_steps} accumulated"
    gpus = f"{plan.gpus} x {plan.device}"
    recompute = f"recompute {len(plan.recompute)} blocks" if plan.recompute else "no recompute"
    stage = f"ZeRO stage {plan.zero_stage}"
    title = Text(f"plan for {plan.model} on {gpus}: {plan.precision}, {stage}, {batch}, {recompute}", style="bold")
    table = _table()
    table.add_column("tier")
    table.add_column("predicted", justify="right")
    table.add_column("allowed", justify="right")
    p, b = plan.prediction, plan.budget
    table.add_row("gpu", format_bytes(p.gpu_peak_bytes), format_bytes(b.gpu_bytes))
    table.add_row("host", format_bytes(p.host_bytes), format_bytes(b.host_bytes))
    table.add_row("nvme", format_bytes(p.nvme_bytes), format_bytes(b.nvme_bytes))
    if p.step_seconds is None:
        return Group(title, table)
    return Group(title, table, Text(f"predicted step {format_seconds(p.step_seconds)}, bounded by {p.bottleneck}\n"))


def _placements(plan: Plan) -> Table:
    """Where the units live, runs of equal ones in one row."""
    table = _table("placements, in forward order")
    for name in ("unit", "parameters", "gradients", "optimizer state"):
        table.add_column(name)
    for tiers, alike in groupby(plan.placements, key=lambda p: (p.parameters, p.gradients, p.optimizer)):
        names = [p.unit or "(root)" for p in alike]
        label = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
        table.add_row(label, *(_tier(tier) for tier in tiers))
    return table


def _tier(tier: Tier) -> Text:
    return Text(tier.value, style={Tier.GPU: "green", Tier.HOST: "cyan", Tier.NVME: "magenta"}[tier])


def doctor_table(checks: list[Check]) -> Table:
    """One row a check, with the command that mends what is not right."""
    table = _table()
    for name in ("", "what", "found", "to mend it"):
        table.add_column(name)
    for check in checks:
        status = Text(check.status, style=STATUS_STYLES[check.status])
        table.add_row(status, check.name, check.detail, check.remedy or "")
    return table
