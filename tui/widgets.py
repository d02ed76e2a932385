"""The dashboard's panels: each picks its part of a view and draws it again only when that part has changed."""

from collections.abc import Callable
from typing import Any

from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

from tui import draw, ranks
from tui.format import number_text
from tui.ranks import RankRow
from tui.strip import legend, strip, strip_height
from tui.view import RunView

Part = Callable[[RunView], Any]
Picture = Callable[[RunView, int, int], Content]


def steps_part(view: RunView) -> Any:
    """The part of most panels: it changes when a step is complete."""
    return view.run, view.steps[-1:]


class Panel(Widget):
    """Shows what ``picture(view, width, height)`` draws; ``part(view)`` is all that the picture depends on."""

    def __init__(self, picture: Picture, part: Part = steps_part, heading: str = "", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.border_title = heading
        self._picture = picture
        self._part = part
        self._view = RunView()

    def show(self, view: RunView) -> None:
        """Take over a view."""
        changed = self._part(view) != self._part(self._view)
        self._view = view
        if changed:
            self.refresh()

    def render(self) -> Content:
        """The picture at the size that there is."""
        return self._picture(self._view, self.content_size.width, self.content_size.height)


class Title(Panel):
    """The run, and its state at the right."""

    def __init__(self) -> None:
        super().__init__(lambda view, width, _: draw.title(view, self._state, width))
        self._state: draw.Span = ("", "")

    def tell(self, state: draw.Span) -> None:
        """Change the state."""
        if state != self._state:
            self._state = state
            self.refresh()


class Loss(Panel):
    """The loss as a line, its last value in the border."""

    def __init__(self) -> None:
        super().__init__(lambda view, w, h: draw.loss(view.losses, w, h), heading="loss", id="loss")
        self._latest = ""

    def show(self, view: RunView) -> None:
        """Take over a view."""
        super().show(view)
        latest = f"now {number_text(view.steps[-1].loss)}" if view.steps else ""
        if latest != self._latest:
            self._latest = self.border_subtitle = latest


class Ranks(Widget):
    """A line a rank, where there are several."""

    def __init__(self) -> None:
        super().__init__(id="ranks")
        self.border_title = "ranks"
        self.display = False
        self._rows: tuple[RankRow, ...] = ()

    def show(self, rows: tuple[RankRow, ...]) -> None:
        """Take them over."""
        if rows == self._rows:
            return
        resized = ranks.height(rows) != ranks.height(self._rows)
        self._rows, self.display = rows, bool(rows)
        self.border_subtitle = ranks.verdict(rows)
        self.refresh(layout=resized)

    def render(self) -> Content:
        """The picture at the size that there is."""
        return ranks.table(self._rows, self.content_size.width)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002 - Textual's call
        """Rows that the ranks need."""
        return ranks.height(self._rows)


class Units(Panel):
    """The units strip, as high as it needs."""

    def __init__(self) -> None:
        super().__init__(
            lambda view, width, _: strip(view.run.units if view.run else (), view.now, width),
            lambda view: (view.run, view.now),
            "units in forward order",
            id="units",
        )

    def show(self, view: RunView) -> None:
        """Take over a view."""
        resized = view.run != self._view.run
        super().show(view)
        if resized:
            self.refresh(layout=True)

    def on_resize(self) -> None:
        """Fit the legend into the border."""
        self.border_subtitle = legend(self.content_size.width - 4)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002 - Textual's call
        """Rows that the strip needs."""
        return strip_height(len(self._view.run.units) if self._view.run else 0, width)
