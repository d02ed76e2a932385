"""Watching a run: a terminal dashboard that reads a run's plan and events, and owns nothing in the job."""

from pathlib import Path

from tui.errors import RunError

__all__ = ["RunError", "watch"]


def watch(run_dir: Path, *, leave_at_end: bool = False) -> int:
    """Show the dashboard of a run in this terminal: ``tui.app.watch``."""
    from tui import app  # with textual, which who only wants the errors need not wait for

    return app.watch(run_dir, leave_at_end=leave_at_end)
