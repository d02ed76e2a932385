"""Watching a run: a terminal dashboard that reads a run's plan and events, and owns nothing in the job."""

from tui.app import Dashboard, watch
from tui.errors import RunError

__all__ = ["Dashboard", "RunError", "watch"]
