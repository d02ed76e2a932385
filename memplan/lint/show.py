"""Findings as a table in the terminal."""

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.lint.finding import SEVERITIES, Finding
from memplan.lint.schema import schema

STYLES = {"error": "bold red", "warning": "yellow", "note": "blue"}


def findings_table(name: str, findings: Sequence[Finding]) -> RenderableType:
    """One row a finding, and how many there are of each kind."""
    if not findings:
        return Text(f"{name}: nothing to find fault with, for DeepSpeed {schema().deepspeed}")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("")
    table.add_column("line", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("suggestion", overflow="fold", max_width=40)
    for finding in findings:
        severity = Text(finding.severity, style=STYLES[finding.severity])
        # As Text: brackets in a message are no markup. The key shares the column, for few terminals are wide enough.
        what = Text(f"{finding.path}\n" if finding.path else "", style="bold").append(finding.message, style="not bold")
        table.add_row(severity, str(finding.line), what, Text(finding.suggestion or ""))
    counts = Counter(finding.severity for finding in findings)
    parts = (f"{counts[s]} {s}{'s' * (counts[s] > 1)}" for s in SEVERITIES if counts[s])
    return Group(table, Text(f"{name}: {', '.join(parts)}, for DeepSpeed {schema().deepspeed}"))
