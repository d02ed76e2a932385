"""A DeepSpeed configuration beside what would be better, in the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.formatting import format_bytes, format_seconds
from memplan.from_config import Verdict
from memplan.show import table
from offload.plan import Plan

BETTER = "best for DeepSpeed"
NO_START = "It does not start, or does something else than it says; memplan lint tells what was probably meant:"


def verdict_tables(name: str, verdict: Verdict) -> RenderableType:
    """What it costs, whether it fits, what to change, and what memplan's own engine would do."""
    parts: list[RenderableType] = [Text(f"{name} on {_machine(verdict.theirs)}", style="bold"), _costs(name, verdict)]
    if verdict.errors:
        parts.append(Text("\n".join((NO_START, *verdict.errors)), style="bold red"))
    if verdict.shortages:
        parts.append(Text("\n".join(verdict.shortages), style="bold red"))
    elif verdict.errors:
        parts.append(Text("What is counted would fit."))
    else:
        parts.append(Text("It fits.", style="green"))
    parts.append(Text("\n".join(f"- {remark}" for remark in verdict.remarks)))
    if verdict.better is None:
        parts.append(Text("No other configuration of DeepSpeed fits either.", style="bold red"))
    elif verdict.changes:
        parts.append(_changes(verdict))
    elif not verdict.errors:
        parts.append(Text("There is nothing to change."))
    return Group(*parts)


def _machine(plan: Plan) -> str:
    return f"{plan.gpus} x {plan.device}" + (f" on {plan.nodes} nodes" if plan.nodes > 1 else "")


def _costs(name: str, verdict: Verdict) -> Table:
    rows: list[tuple[str, Plan]] = [(name, verdict.theirs)]
    rows += [(BETTER, verdict.better)] if verdict.better else []
    rows += [("best for memplan's engine", verdict.own)] if verdict.own else []
    found = table()
    found.add_column("")
    for column in ("step", "gpu, at most", "host", "nvme"):
        found.add_column(column, justify="right")
    for label, plan in rows:
        p = plan.prediction
        seconds = format_seconds(p.step_seconds) if p.step_seconds is not None else "?"
        found.add_row(label, seconds, *(format_bytes(b) for b in (p.gpu_upper_bytes, p.host_bytes, p.nvme_bytes)))
    b = verdict.theirs.budget
    found.add_row("allowed", "", *(format_bytes(n) for n in (b.gpu_bytes, b.host_bytes, b.nvme_bytes)))
    return found


def _changes(verdict: Verdict) -> Table:
    found = table("what to change")
    for column in ("key", "is", "better"):
        found.add_column(column, overflow="fold")
    for change in verdict.changes:
        found.add_row(change.key, change.theirs, change.better)
    return found
