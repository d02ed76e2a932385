"""RunView: what a run looks like at one moment, folded from its events.

``fold`` is pure and total: any mapping is an event, and one that it does not know, or that lacks what its kind must
have, leaves the view as it is. Histories are bounded, so a view of a long run costs what one of a short run does.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from offload.events import LINKS
from tui.format import bytes_text, seconds_text

TIERS = ("gpu", "host", "nvme")
HISTORY = 256
"""Steps of which everything is kept."""
CURVE_POINTS = 512
"""Points that stand for the loss of the whole run."""
NOTES = 50

Event = Mapping[str, Any]


@dataclass(frozen=True)
class UnitInfo:
    """One unit of the plan; the last three are tiers."""

    name: str
    elements: int
    parameters: str
    gradients: str
    optimizer: str


@dataclass(frozen=True)
class RunInfo:
    """What the run said of itself when it started."""

    model: str
    device: str
    precision: str
    parameters: int | None
    first_step: int
    last_step: int | None
    micro_batch_size: int | None
    gradient_accumulation_steps: int | None
    budget_bytes: dict[str, float]
    predicted_bytes: dict[str, float]
    predicted_step_seconds: float | None
    bottleneck: str | None
    units: tuple[UnitInfo, ...]
    ranks: int = 1
    """Processes that train together."""
    host: str = ""
    session: str = ""
    """Equal in what processes that were started together tell."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as it was measured."""

    step: int
    time: float
    loss: float | None
    gradient_norm: float | None
    learning_rate: float | None
    seconds: float | None
    tokens: float | None
    memory_bytes: dict[str, float]
    peak_bytes: dict[str, float]
    traffic_bytes: dict[str, float]
    waited_seconds: float | None = None
    """Of several ranks: in which this one was inside of collectives."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens trained a second, ``None`` when either is unknown."""
        return self.tokens / self.seconds if self.tokens is not None and self.seconds else None

    def bytes_per_second(self, link: str) -> float | None:
        """Mean rate of one link over the step."""
        moved = self.traffic_bytes.get(link)
        return moved / self.seconds if moved is not None and self.seconds else None


@dataclass(frozen=True)
class Flight:
    """A unit whose bytes are on a link at the moment."""

    unit: str
    link: str


@dataclass(frozen=True)
class Now:
    """What the run is doing at the moment."""

    step: int
    phase: str = ""
    unit: str | None = None
    in_flight: tuple[Flight, ...] = ()


@dataclass(frozen=True)
class Note:
    """A sentence of the run, ``seconds`` after its start."""

    seconds: float
    message: str


@dataclass(frozen=True)
class End:
    """How the run ended: finished, interrupted or failed."""

    reason: str
    step: int | None
    message: str
    rank: int | None = None
    """The one to blame, of several and where it is known."""


@dataclass(frozen=True)
class Curve:
    """A series over the whole run in bounded room: when it is full, neighbours are merged into their mean."""

    points: tuple[tuple[int, float], ...] = ()
    """(step, value), the step being the last one that went into the value."""
    stride: int = 1
    """Values that went into each point."""
    pending: tuple[float, ...] = ()

    def add(self, step: int, value: float) -> "Curve":
        """The curve with one more value."""
        pending = (*self.pending, value)
        if len(pending) < self.stride:
            return replace(self, pending=pending)
        points = (*self.points, (step, fmean(pending)))
        if len(points) < CURVE_POINTS:
            return Curve(points, self.stride)
        pairs = zip(points[::2], points[1::2], strict=True)
        return Curve(tuple((b[0], (a[1] + b[1]) / 2) for a, b in pairs), self.stride * 2)

    def before(self, step: int) -> "Curve":
        """The curve without the values of ``step`` and later ones."""
        if not self.points or self.points[-1][0] < step:
            return self
        return Curve(tuple(p for p in self.points if p[0] < step), self.stride)


@dataclass(frozen=True)
class RunView:
    """A snapshot of a run. Everything is empty or ``None`` until an event says it."""

    run: RunInfo | None = None
    started: float | None = None
    """Time of the latest ``run`` event."""
    latest: float | None = None
    """Time of the latest event."""
    now: Now = Now(0)
    waiting: str = ""
    """The collective that the run has been in for a while now; empty where it computes."""
    steps: tuple[StepRecord, ...] = ()
    """The last HISTORY steps, oldest first."""
    losses: Curve = field(default_factory=Curve)
    notes: tuple[Note, ...] = ()
    end: End | None = None

    @property
    def step(self) -> int:
        """The last step that is complete, 0 before the first."""
        return self.steps[-1].step if self.steps else (self.run.first_step - 1 if self.run else 0)

    @property
    def elapsed_seconds(self) -> float | None:
        """From the start (or the resumption) to the latest event."""
        return None if self.started is None or self.latest is None else max(self.latest - self.started, 0.0)

    @property
    def remaining_seconds(self) -> float | None:
        """What the steps to come should take, at the mean pace of the last sixteen."""
        paces = [s.seconds for s in self.steps[-16:] if s.seconds is not None]
        if not paces or self.run is None or self.run.last_step is None:
            return None
        return fmean(paces) * max(self.run.last_step - self.step, 0)


def fold(view: RunView, event: Event) -> RunView:
    """The view after one event; the same object when the event says nothing."""
    kind = event.get("event")
    handler = _HANDLERS.get(kind) if isinstance(kind, str) else None
    after = handler(view, event) if handler else view
    time = _number(event, "time")
    return after if after is view or time is None else replace(after, latest=max(time, after.latest or time))


def step_record(event: Event) -> StepRecord | None:
    """The record in a ``step`` event, or ``None`` when it does not say which step it was."""
    step = _whole(event, "step")
    if step is None:
        return None
    return StepRecord(
        step,
        _number(event, "time") or 0.0,
        _number(event, "loss", finite=False),
        _number(event, "gradient_norm", finite=False),
        _number(event, "learning_rate"),
        _number(event, "seconds"),
        _number(event, "tokens"),
        _numbers(event, "memory_bytes", TIERS),
        _numbers(event, "peak_bytes", TIERS),
        _numbers(event, "traffic_bytes", LINKS),
        _number(event, "waited_seconds"),
    )


def _on_run(view: RunView, event: Event) -> RunView:
    """A start or a resumption: steps that will be done again are forgotten."""
    first = _whole(event, "first_step") or 0
    run = RunInfo(
        _text(event, "model"),
        _text(event, "device"),
        _text(event, "precision"),
        _whole(event, "parameters"),
        max(first, 1),
        _whole(event, "last_step"),
        _whole(event, "micro_batch_size"),
        _whole(event, "gradient_accumulation_steps"),
        _numbers(event, "budget_bytes", TIERS),
        _numbers(event, "predicted_bytes", TIERS),
        _number(event, "predicted_step_seconds"),
        _text(event, "bottleneck") or None,
        tuple(_unit(u) for u in _items(event, "units")),
        max(_whole(event, "ranks") or 1, 1),
        _text(event, "host"),
        _text(event, "session"),
    )
    steps = tuple(s for s in view.steps if s.step < run.first_step)
    time = _number(event, "time")
    losses = view.losses.before(run.first_step)
    return RunView(run, time, time, Now(run.first_step - 1), steps=steps, losses=losses, notes=view.notes)


def _on_now(view: RunView, event: Event) -> RunView:
    flights = tuple(
        Flight(_text(f, "unit"), _text(f, "link")) for f in _items(event, "in_flight") if f.get("link") in LINKS
    )
    unit = event.get("unit")
    step = _whole(event, "step") or view.now.step
    now = Now(step, _text(event, "phase"), unit if isinstance(unit, str) else None, flights)
    return replace(view, now=now, waiting="")


def _on_waiting(view: RunView, event: Event) -> RunView:
    return replace(view, waiting=_text(event, "inside"))


def _on_step(view: RunView, event: Event) -> RunView:
    record = step_record(event)
    if record is None:
        return view
    steps, losses = view.steps, view.losses
    if steps and steps[-1].step >= record.step:
        steps, losses = tuple(s for s in steps if s.step < record.step), losses.before(record.step)
    if record.loss is not None:
        losses = losses.add(record.step, record.loss)
    return replace(view, steps=(*steps, record)[-HISTORY:], losses=losses, waiting="")


def _on_checkpoint(view: RunView, event: Event) -> RunView:
    size, seconds = bytes_text(_number(event, "bytes")), seconds_text(_number(event, "seconds"))
    return _noted(view, event, f"checkpoint at step {_whole(event, 'step')}: {size} in {seconds}")


def _on_note(view: RunView, event: Event) -> RunView:
    message = _text(event, "message")
    return _noted(view, event, message) if message else view


def _on_warning(view: RunView, event: Event) -> RunView:
    message = _text(event, "message")
    return _noted(view, event, f"warning: {message}") if message else view


def _on_end(view: RunView, event: Event) -> RunView:
    end = End(_text(event, "reason") or "ended", _whole(event, "step"), _text(event, "message"), _whole(event, "rank"))
    return replace(view, end=end, now=Now(view.now.step), waiting="")


def _noted(view: RunView, event: Event, message: str) -> RunView:
    time = _number(event, "time")
    seconds = 0.0 if time is None or view.started is None else max(time - view.started, 0.0)
    return replace(view, notes=(*view.notes, Note(seconds, " ".join(message.split())))[-NOTES:])


_HANDLERS: dict[str, Callable[[RunView, Event], RunView]] = {
    "run": _on_run,
    "now": _on_now,
    "waiting": _on_waiting,
    "step": _on_step,
    "checkpoint": _on_checkpoint,
    "note": _on_note,
    "warning": _on_warning,
    "end": _on_end,
}


def _unit(data: Event) -> UnitInfo:
    tiers = (tier if (tier := data.get(key)) in TIERS else "" for key in ("parameters", "gradients", "optimizer"))
    return UnitInfo(_text(data, "name"), _whole(data, "elements") or 0, *tiers)


def _text(event: Event, key: str) -> str:
    value = event.get(key)
    return value if isinstance(value, str) else ""


def _whole(event: Event, key: str) -> int | None:
    value = event.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(event: Event, key: str, finite: bool = True) -> float | None:
    value = event.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) or not finite else None


def _numbers(event: Event, key: str, names: tuple[str, ...]) -> dict[str, float]:
    value = event.get(key)
    found = {name: _number(value, name) for name in names} if isinstance(value, Mapping) else {}
    return {name: number for name, number in found.items() if number is not None}


def _items(event: Event, key: str) -> list[Event]:
    value = event.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []
