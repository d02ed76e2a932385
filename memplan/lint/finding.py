"""What the linter says: one frozen record a finding."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing about a configuration, and where it stands.

    An ``error`` stops the job or makes it do something else than what is written, a ``warning`` may, a ``note`` is
    only worth knowing.
    """

    severity: Severity
    path: str
    """Dotted, like ``zero_optimization.stage``; "" for the file itself."""
    line: int
    """From 1."""
    message: str
    suggestion: str | None = None
