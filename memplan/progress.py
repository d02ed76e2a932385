"""What a person sees of a run while it goes on: the dashboard, or lines."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from memplan.formatting import format_bytes, format_count, format_seconds

INTERRUPTED = 130
PROGRESS_SECONDS = 2.0
"""Shortest time between two progress lines."""


class Progress:
    """The dashboard, a process of its own on this terminal; progress lines where there is none, or it was left."""

    def __init__(self, run_dir: Path, dashboard: bool, console: Console) -> None:
        self._console = console
        self._last_line = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        if dashboard:
            code = "import sys, pathlib, tui; sys.exit(tui.watch(pathlib.Path(sys.argv[1]), leave_at_end=True))"
            self._process = subprocess.Popen([sys.executable, "-c", code, str(run_dir)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The end of the run is in the events: the dashboard shows it and leaves by itself."""
        if self._process is not None:
            self._process.wait()

    def say(self, message: str) -> None:
        """A line for the person, where no dashboard shows it."""
        if self._process is None:
            self._console.print(message, highlight=False, soft_wrap=True, markup=False)

    def tell(self, step: dict[str, Any], last_step: int) -> bool:
        """One more step; returns whether the person asked to stop from the dashboard."""
        if self._process is not None:
            if (code := self._process.poll()) is None:
                return False
            self._process = None
            if code == INTERRUPTED:
                return True
        now = time.monotonic()
        if now - self._last_line >= PROGRESS_SECONDS or step["step"] in (1, last_step):
            self._last_line = now
            self._console.print(progress_line(step, last_step), highlight=False, soft_wrap=True)
        return False


def progress_line(step: dict[str, Any], last_step: int) -> str:
    """A step in one line."""
    tiers = " ".join(f"{tier} {format_bytes(size)}" for tier, size in step["memory_bytes"].items() if size)
    rate = format_count(step["tokens"] / step["seconds"])
    return (
        f"step {step['step']:>{len(str(last_step))}}/{last_step}  loss {step['loss']:.4f}  "
        f"{format_seconds(step['seconds'])}  {rate} tokens/s  {tiers}"
    )
