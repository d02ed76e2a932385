"""What a CPU issues in a step: operations by phase and kind, calls of modules, gradients."""

from collections import Counter
from collections.abc import Iterable

from profiler.events import BACKWARD, FORWARD, LOSS, Call, Event, Gradient, Op
from profiler.kinds import kind_of


def issue_name(op: Op) -> str | None:
    """Which of a calibration's issues an operation is, "phase/kind"; ``None`` where a real step has no such operation.

    Recomputation issues forward's operations, from Python as forward does.
    """
    backward = op.phase == BACKWARD and not op.recompute
    if backward and op.name == "aten::detach":
        return None  # the trace's own: autograd hands saved tensors back without an operation
    return f"{BACKWARD if backward else FORWARD}/{kind_of(op)}"


def issues_of(events: Iterable[Event]) -> dict[str, Counter[str]]:
    """How many of each issue forward, without the loss, and backward have."""
    counts: dict[str, Counter[str]] = {FORWARD: Counter(), BACKWARD: Counter()}
    for event in events:
        if isinstance(event, Call):
            counts[FORWARD]["call"] += 1
        elif isinstance(event, Gradient):
            counts[BACKWARD]["gradient"] += 1
        elif isinstance(event, Op) and event.phase != LOSS and event.phase in counts and (name := issue_name(event)):
            counts[event.phase][name] += 1
    return counts
