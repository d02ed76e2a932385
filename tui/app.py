"""The dashboard: one thread follows the events and sends snapshots, panels show what changed in them."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.theme import Theme
from textual.widgets import Static

from tui import draw
from tui.errors import RunError
from tui.format import clock_text
from tui.ranks import rank_rows
from tui.source import EVENTS, RankTails
from tui.view import RunView, fold
from tui.widgets import Loss, Panel, Ranks, Title, Units

INTERRUPTED = 130
READ_SECONDS = 0.2
LEAVE_SECONDS = 2.0
SILENT_SECONDS = 30.0
"""Without an event for this long, a run that has not ended is said to be silent."""

THEME = Theme(
    name="memplan",
    dark=True,
    primary="#d7a65f",
    accent="#d7a65f",
    background="#101318",
    surface="#1b2027",
    foreground="#cdd3dc",
    variables={
        "gpu": "#57b894",
        "host": "#5f95dd",
        "nvme": "#a98be0",
        "mark": "#f2f4f7",
        "ink": "#101318",
        "track": "#20262e",
        "rule": "#333b46",
        "text-muted": "#7d8794",
        "good": "#57b894",
        "warn": "#d7a65f",
        "danger": "#e5645c",
    },
)


class Dashboard(App[int]):
    """Shows the run in a directory until a person leaves; owns nothing in it.

    ``leave_at_end``: leave by itself two seconds after the run has ended. ``clock`` tells the time of day.
    """

    CSS_PATH = "app.tcss"
    ENABLE_COMMAND_PALETTE = False
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (72, "-wide"), (100, "-roomy")]  # noqa: RUF012 - so declared by Textual
    VERTICAL_BREAKPOINTS = [(0, "-short"), (28, "-medium"), (44, "-tall")]  # noqa: RUF012 - so declared by Textual
    BINDINGS: ClassVar = [
        Binding("q,ctrl+q", "leave", "leave"),
        Binding("ctrl+c", "stop", "stop", priority=True),
    ]

    class Snapshot(Message):
        """The run as it is now, as the first rank tells it, and all ranks."""

        def __init__(self, views: Mapping[int, RunView]) -> None:
            super().__init__()
            self.view, self.views = views.get(0, RunView()), dict(views)

    def __init__(self, run_dir: Path, *, leave_at_end: bool = False, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self.register_theme(THEME)
        self.theme = THEME.name
        self._run_dir = run_dir
        self._leave_at_end = leave_at_end
        self._clock = clock
        self._left = threading.Event()
        self.view = RunView()
        self._views: dict[int, RunView] = {}
        self.failure: RunError | None = None
        """Why the events could not be read on."""

    def compose(self) -> ComposeResult:
        """The panels, in the order in which they are read."""
        with Vertical(id="heading"):
            yield Title()
            yield Panel(lambda v, w, _: draw.progress(v, w), _progress_part, id="progress")
        with VerticalScroll(id="body"):
            with Horizontal(id="columns"):
                with Vertical(id="left"):
                    yield Panel(lambda v, w, _: draw.memory(v, w), heading="memory", id="memory")
                    yield Panel(
                        lambda v, w, h: draw.traffic(v.steps, w, h), heading="traffic a step, a second", id="traffic"
                    )
                with Vertical(id="right"):
                    yield Loss()
                    yield Panel(lambda v, w, _: draw.speed(v, w), heading="speed", id="speed")
            yield Ranks()
            yield Units()
            yield Panel(lambda v, w, h: draw.notes(v.notes, w, h), lambda v: v.notes, "notes", id="notes")
        yield Panel(lambda v, _w, _h: draw.ending(v.end, self._leave_at_end), lambda v: v.end, id="ending")
        stop = "   ctrl+c stops training" if self._leave_at_end else ""
        yield Static(f"q leaves, training goes on{stop}", id="keys")

    def on_mount(self) -> None:
        """Start to follow."""
        self.run_worker(self._follow, thread=True)
        self.set_interval(1.0, self._tell_state)

    def on_unmount(self) -> None:
        """Let the following thread end."""
        self._left.set()

    def _follow(self) -> None:
        tails, views = RankTails(self._run_dir), {0: RunView()}
        shown: dict[int, RunView] = {}
        while not self._left.is_set():
            try:
                for rank, event in tails.poll():
                    views[rank] = fold(views.get(rank, RunView()), event)
            except OSError as error:
                self.failure = RunError(f"{self._run_dir / EVENTS} can not be read: {error.strerror}")
                self.call_from_thread(self.exit, 1)
                return
            if any(view is not shown.get(rank) for rank, view in views.items()):
                self.post_message(self.Snapshot(views))
                shown = dict(views)
            self._left.wait(READ_SECONDS)

    def on_dashboard_snapshot(self, message: Snapshot) -> None:
        """Hand the view to every panel."""
        ended = self.view.end is None and message.view.end is not None
        self.view, self._views = message.view, message.views
        for panel in self.query(Panel):
            panel.show(self.view)
        self.query_one("#ending").display = self.view.end is not None
        self.query_one("#keys").display = self.view.end is None
        self._tell_state()
        if ended and self._leave_at_end:
            self.set_timer(LEAVE_SECONDS, self.action_leave)

    def _tell_state(self) -> None:
        clock = self._clock()
        self.query_one(Title).tell(_state(self.view, clock))
        self.query_one(Ranks).show(rank_rows(self._views, clock))

    def action_leave(self) -> None:
        """Leave the dashboard; the run goes on."""
        self.exit(0)

    def action_stop(self) -> None:
        """Leave, and tell the caller that the person wants the run to stop."""
        self.exit(INTERRUPTED)


def _progress_part(view: RunView) -> tuple[object, ...]:
    return view.run, view.step, round(view.elapsed_seconds or 0)


def _state(view: RunView, clock: float) -> draw.Span:
    if view.end is not None:
        return view.end.reason, {"finished": "bold $good", "failed": "bold $danger"}.get(view.end.reason, "bold $warn")
    if view.run is None:
        return "waiting for the run to start", "$text-muted"
    silent = clock - view.latest if view.latest is not None else 0.0
    if silent > SILENT_SECONDS:
        return f"silent for {clock_text(silent)}", "bold $warn"
    return "● training", "bold $good"


def watch(run_dir: Path, *, leave_at_end: bool = False) -> int:
    """Show the dashboard of a run in this terminal until the person leaves or, if asked, until the run ends.

    Returns 0, or 130 when the person pressed ctrl+c (or SIGINT came): who trains then stops. Raises RunError when
    ``run_dir`` is not a directory or its events can not be read; a directory without events is waited for.
    """
    if not run_dir.is_dir():
        raise RunError(f"{run_dir} is not a directory; give the directory that `memplan train --out` wrote")
    app = Dashboard(run_dir, leave_at_end=leave_at_end)
    try:
        result = app.run()
    except KeyboardInterrupt:
        return INTERRUPTED
    if app.failure is not None:
        raise app.failure
    # Textual ends without a result when a signal cancels it, and with a return code when it breaks.
    return result if result is not None else app.return_code or INTERRUPTED
