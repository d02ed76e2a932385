"""Plans and checks as tables for people."""

from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.doctor import Check
from memplan.formatting import format_bytes, format_seconds
from offload.plan import Plan, Tier

STATUS_STYLES = {"ok": "green", "info": "blue", "warn": "yellow", "fail": "bold red"}


def _table(title: str | None = None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )


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
