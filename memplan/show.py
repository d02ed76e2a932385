"""Plans and checks as tables for people."""

from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.doctor import Check
from memplan.formatting import format_bytes, format_seconds
from memplan.step_words import training_words
from offload.plan import Plan, Target, Tier

STATUS_STYLES = {"ok": "green", "info": "blue", "warn": "yellow", "fail": "bold red"}


def table(title: str | None = None) -> Table:
    """An empty table in the house's style."""
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
        rows = table("runners-up")
        rows.add_column("plan")
        for name in ("step", "gpu", "host", "nvme"):
            rows.add_column(name, justify="right")
        rows.add_column("why not")
        for other in plan.alternatives:
            seconds = format_seconds(other.step_seconds) if other.step_seconds is not None else "?"
            sizes = (format_bytes(b) for b in (other.gpu_peak_bytes, other.host_bytes, other.nvme_bytes))
            rows.add_row(other.description, seconds, *sizes, other.why_not)
        parts.append(rows)
    return Group(*parts)


def plan_summary(plan: Plan) -> RenderableType:
    """What the plan does and what is expected of it, beside what was allowed."""
    gpus = f"{plan.gpus} x {plan.device}" + (f" on {plan.nodes} nodes" if plan.nodes > 1 else "")
    engine = "" if plan.target is Target.MEMPLAN else f" with {plan.target}"
    title = Text(f"plan for {plan.model} on {gpus}{engine}: {training_words(plan)}", style="bold")
    rows = table()
    rows.add_column("tier")
    for name in ("predicted", "at most", "allowed"):
        rows.add_column(name, justify="right")
    p, b = plan.prediction, plan.budget
    for tier, sizes in (
        ("gpu", (p.gpu_peak_bytes, max(p.gpu_peak_bytes, p.gpu_upper_bytes), b.gpu_bytes)),
        ("host", (p.host_bytes, max(p.host_bytes, p.host_upper_bytes), b.host_bytes)),
        ("nvme", (p.nvme_bytes, p.nvme_bytes, b.nvme_bytes)),
    ):
        rows.add_row(tier, *map(format_bytes, sizes))
    if p.step_seconds is None:
        return Group(title, rows)
    between = ""
    if p.step_seconds_range is not None:
        between = f" (between {' and '.join(map(format_seconds, p.step_seconds_range))})"
    lane = (p.bottleneck or "").replace("_", " ")
    step = f"predicted step {format_seconds(p.step_seconds)}{between}, bounded by {lane}\n"
    return Group(title, rows, Text(step))


def _placements(plan: Plan) -> Table:
    """Where the units live, runs of equal ones in one row."""
    rows = table("placements, in forward order")
    for name in ("unit", "parameters", "gradients", "optimizer state"):
        rows.add_column(name)
    for tiers, alike in groupby(plan.placements, key=lambda p: (p.parameters, p.gradients, p.optimizer)):
        names = [p.unit or "(root)" for p in alike]
        label = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
        rows.add_row(label, *(_tier(tier) for tier in tiers))
    return rows


def _tier(tier: Tier) -> Text:
    return Text(tier.value, style={Tier.GPU: "green", Tier.HOST: "cyan", Tier.NVME: "magenta"}[tier])


def doctor_table(checks: list[Check]) -> Table:
    """One row a check, with the command that mends what is not right."""
    rows = table()
    for name in ("", "what", "found", "to mend it"):
        rows.add_column(name)
    for check in checks:
        status = Text(check.status, style=STATUS_STYLES[check.status])
        rows.add_row(status, check.name, check.detail, check.remedy or "")
    return rows
