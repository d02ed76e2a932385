"""What a step's timeline says, for the terminal and the page: kinds of work, phases, who waits for whom, sentences."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby, islice, pairwise
from typing import NamedTuple

from memplan.explanation import Explanation
from memplan.formatting import format_seconds
from memplan.spans import Span, Timeline
from offload.plan import MomentFormat, Plan

COLOURS = {
    "forward": "#4a7fc9",
    "backward": "#c8763f",
    "update": "#8f6fd0",
    "weights to the GPU": "#2f9a9e",
    "gradient": "#b79a2c",
    "input": "#7a9bb5",
    "state read": "#3f9f7d",
    "state written": "#86b84f",
    "weights read": "#6f8f9f",
    "weights written": "#a58a6a",
    "gather": "#b0608a",
    "reduce": "#d98ba9",
}
"""By kind of work."""
BUSIEST_COLOUR = "#d0524a"
ENDINGS = {
    " forward": "forward",
    " backward": "backward",
    " update": "update",
    "update on the GPU": "update",
    " gradient": "gradient",
    " input": "input",
    " state read": "state read",
    " state written": "state written",
    " weights written": "weights written",
    " read": "weights read",
    " gather": "gather",
    " reduce": "reduce",
}
"""The kind of a span by how its label ends, longer endings first.

A label that is only a unit's name is its weights, one that is only a kind is of no unit.
"""
SHARED_CORES = "Where the CPU computes, the lanes share its cores and add up; only the disk works beside them."
Interval = tuple[float, float]
"""Start and end, in seconds."""


class Phase(NamedTuple):
    """A stretch of the step in which one thing is computed, or waited for."""

    kind: str
    start_seconds: float
    end_seconds: float


def training_words(plan: Plan) -> str:
    """Precision, optimizer, stage, batch and recompute of a plan."""
    batch = f"micro-batch {plan.micro_batch_size} x {plan.gradient_accumulation_steps} accumulated"
    recompute = f"recompute {len(plan.recompute)} blocks" if plan.recompute else "no recompute"
    moments = f" with moments in {plan.moments}" if plan.moments is not MomentFormat.FP32 else ""
    return f"{plan.precision}, {plan.optimizer}{moments}, ZeRO stage {plan.zero_stage}, {batch}, {recompute}"


def lane_name(lane: str) -> str:
    """As people read it."""
    return lane.replace("_", " ")


def kind_of(span: Span) -> str:
    """What kind of work it is."""
    return _parts(span.label)[1]


def unit_of(span: Span) -> str:
    """The unit that it is done for; "" where there is none."""
    return _parts(span.label)[0]


@cache
def _parts(label: str) -> tuple[str, str]:
    """Unit and kind."""
    if label in COLOURS:
        return "", label
    ending = next((ending for ending in ENDINGS if label.endswith(ending)), "")
    return label.removesuffix(ending), ENDINGS.get(ending, "weights to the GPU")


def within_step(timeline: Timeline) -> list[Span]:
    """The spans between 0 and the step's end.

    What begins before the step, or ends after it, belongs to the step before or after. As every step is like the
    other, that part is seen at the other end of this one too, and is moved there.
    """
    whole = timeline.seconds
    found = []
    for span in timeline.spans:
        for shift in (0.0, whole, -whole):
            start, end = max(0.0, span.start_seconds + shift), min(whole, span.end_seconds + shift)
            if end > start:
                found.append(span._replace(start_seconds=start, end_seconds=end))
    return sorted(found, key=lambda span: span.start_seconds)


def phases(timeline: Timeline) -> list[Phase]:
    """Forward, backward and update as the GPU begins with each of them; an update made elsewhere after that too."""
    computed = [span for span in timeline.spans if span.lane == "compute"]
    begun = [(kind, next(run).start_seconds) for kind, run in groupby(computed, key=kind_of)]
    if begun and begun[-1][0] != "update":
        done = computed[-1].end_seconds
        after = (s.start_seconds for s in timeline.spans if kind_of(s) == "update" and s.start_seconds >= done)
        begun += [("update", start) for start in islice(after, 1)]
    turns = [0.0, *(start for _, start in begun[1:]), timeline.seconds]
    return [Phase(kind, *interval) for (kind, _), interval in zip(begun, pairwise(turns), strict=False)]


def idle(spans: Iterable[Span], seconds: float) -> Iterator[Interval]:
    """When a lane rests; ``spans`` are those of one lane, in order."""
    reached = 0.0
    for span in spans:
        if span.start_seconds > reached:
            yield reached, span.start_seconds
        reached = max(reached, span.end_seconds)
    if reached < seconds:
        yield reached, seconds


def overlap_seconds(intervals: Sequence[Interval], spans: Iterable[Span]) -> float:
    """Seconds of ``spans`` that fall into ``intervals``; both in order, each without overlaps of its own."""
    found, at = 0.0, 0
    for span in spans:
        while at < len(intervals) and intervals[at][1] <= span.start_seconds:
            at += 1
        for start, end in intervals[at:]:
            if start >= span.end_seconds:
                break
            found += min(end, span.end_seconds) - max(start, span.start_seconds)
    return found


def sentences(shown: Explanation) -> list[str]:
    """What bounds the step, and how long the GPU waits for whom."""
    lane, whole = shown.busiest, shown.seconds
    busy = shown.busy_seconds[lane]
    said = [
        f"The bottleneck is {lane_name(lane)}: busy for {format_seconds(busy)} of the step's {format_seconds(whole)} "
        f"({busy / whole:.0%})."
    ]
    if shown.timeline is None:
        return [*said, SHARED_CORES]
    by_lane: dict[str, list[Span]] = {}
    for span in within_step(shown.timeline):
        by_lane.setdefault(span.lane, []).append(span)
    waits = list(idle(by_lane.pop("compute", []), whole))
    waited = sum(end - start for start, end in waits)
    text = f"The GPU waits for {format_seconds(waited)} ({waited / whole:.0%})"
    beside = {name: overlap_seconds(waits, spans) for name, spans in by_lane.items()}
    if waited >= 0.01 * whole and beside:
        longest = max(beside, key=beside.__getitem__)
        text += f"; during {format_seconds(beside[longest])} of that, {lane_name(longest)} is at work"
    return [*said, f"{text}."]


def lever_lines(shown: Explanation) -> list[str]:
    """What would move the step; none where nothing was tried."""
    if shown.levers is None:
        return []
    if not shown.levers:
        return ["Nothing that was tried gains 3 %: more memory, more GPUs, a larger batch, each part twice as fast."]
    return [lever.sentence for lever in shown.levers]
