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
    table.add_column("key, what, suggestion", overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.severity, style=STYLES[finding.severity]), str(finding.line), _words(finding))
    counts = Counter(finding.severity for finding in findings)
    parts = (f"{counts[s]} {s}{'s' * (counts[s] > 1)}" for s in SEVERITIES if counts[s])
    return Group(table, Text(f"{name}: {', '.join(parts)}, for DeepSpeed {schema().deepspeed}"))


def _words(finding: Finding) -> Text:
    """In one column, for few terminals are wide enough for three. As Text: brackets in a message are no markup."""
    words = Text(f"{finding.path}\n" if finding.path else "", style="bold")
    words.append(finding.message, style="not bold")
    if finding.suggestion:
        words.append(f"\n-> {finding.suggestion}", style="not bold green")
    return words
