"""A step drawn in the terminal."""

import re
from dataclasses import replace
from io import StringIO
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from memplan.formatting import format_seconds
from memplan.show_timeline import HEIGHTS, TICK_CELLS, lane_cells, tick_seconds, timeline_view
from memplan.spans import Span, Timeline
from memplan.step_words import (
    COLOURS,
    idle,
    kind_of,
    lane_name,
    overlap_seconds,
    phases,
    sentences,
    unit_of,
    within_step,
)
from offload.plan import Target
from tests.shown_steps import shown_step

GPU, GPUS, CPU = ("cuda", 1), ("cuda", 2), ("cpu", 1)
DEEPSPEED, FSDP2 = (("cuda", 2, target) for target in (Target.DEEPSPEED, Target.FSDP2))
STEPS = pytest.mark.parametrize(
    "which", [GPU, GPUS, CPU, DEEPSPEED, FSDP2], ids=["gpu", "gpus", "cpu", "deepspeed", "fsdp2"]
)


def printed(shown, width):
    console = Console(width=width, file=StringIO())
    console.print(timeline_view(shown, width), highlight=False)
    return console.file.getvalue().splitlines()


def row_of(lines, lane):
    return next(line for line in lines if line[2:].startswith(lane_name(lane)))


@st.composite
def lanes(draw):
    """Seconds of a step, and spans of one lane in it, one after the other."""
    pieces = draw(st.lists(st.tuples(st.floats(0, 5), st.floats(0.001, 5)), max_size=20))
    now, spans = 0.0, []
    for number, (pause, length) in enumerate(pieces):
        now += pause
        spans.append(
            Span("compute", f"layers.{number} {draw(st.sampled_from(['forward', 'backward']))}", now, now + length)
        )
        now += length
    return now + draw(st.floats(0.001, 5)), spans


@given(lanes(), st.integers(1, 150))
def test_every_span_is_in_its_cells_and_cells_add_up_to_the_busy_seconds(lane, count):
    seconds, spans = lane
    cells = lane_cells(spans, seconds, count)
    assert len(cells) == count
    assert sum(cell.busy for cell in cells) * seconds / count == pytest.approx(
        sum(span.end_seconds - span.start_seconds for span in spans), abs=1e-9
    )
    for span in spans:
        middle = (span.start_seconds + span.end_seconds) / 2
        assert cells[min(int(middle / seconds * count), count - 1)].kind


@given(lanes())
def test_a_lane_is_idle_or_busy_at_every_moment(lane):
    seconds, spans = lane
    waits = list(idle(spans, seconds))
    busy = sum(span.end_seconds - span.start_seconds for span in spans)
    assert sum(end - start for start, end in waits) + busy == pytest.approx(seconds)
    assert overlap_seconds(waits, spans) == pytest.approx(0, abs=1e-9)
    assert overlap_seconds([(0.0, seconds)], spans) == pytest.approx(busy)


@given(lanes(), lanes())
def test_an_overlap_is_what_every_pair_has_in_common(one, other):
    waits, (_, spans) = list(idle(one[1], one[0])), other
    pairs = (
        max(0.0, min(end, span.end_seconds) - max(start, span.start_seconds)) for span in spans for start, end in waits
    )
    assert overlap_seconds(waits, spans) == pytest.approx(sum(pairs), abs=1e-9)


@given(st.floats(1e-6, 1e5), st.integers(10, 200))
def test_ticks_are_round_and_have_room(seconds, count):
    step = tick_seconds(seconds, count)
    assert f"{step:.0e}"[0] in "125"
    assert TICK_CELLS * (1 - 1e-9) <= step / seconds * count <= 2.5 * TICK_CELLS * (1 + 1e-9)


@STEPS
@pytest.mark.parametrize("width", [20, 30, 47, 48, 60, 80, 100, 140, 250])
def test_no_line_is_wider_than_the_console(which, width):
    lines = printed(shown_step(*which), width)
    assert max(map(cell_len, lines)) <= width


@STEPS
def test_each_lane_that_does_something_has_a_row_with_its_share_and_seconds(which):
    shown = shown_step(*which)
    lines = printed(shown, 100)
    for lane, busy in shown.busy_seconds.items():
        assert row_of(lines, lane).endswith(f" {format_seconds(busy)}")
        assert f" {busy / shown.seconds:.0%} " in row_of(lines, lane)
    marked = [line for line in lines if line.startswith("▶")]
    assert marked == [row_of(lines, shown.busiest)]
    assert any(f"The bottleneck is {lane_name(shown.busiest)}: busy" in line for line in lines)


@STEPS
def test_levers_stand_below(which):
    shown = shown_step(*which)
    lines = printed(shown, 140)
    assert shown.levers
    assert [line for line in lines if line.startswith("- ")] == [f"- {lever.sentence}" for lever in shown.levers]
    bare = printed(replace(shown, levers=()), 140)
    assert any("Nothing that was tried gains 3 %" in line for line in bare)


def test_phases_are_marked_above_the_lanes_and_ticks_below():
    lines = printed(shown_step(*GPU), 140)
    at = lines.index(row_of(lines, "compute"))
    assert "forward" in lines[at - 1]
    assert lines[at - 1].count("╭") >= 3
    below = next(line for line in lines if "╵0 s" in line)
    assert len(re.findall(r"╵[\d.]+ s", below)) >= 4


def test_phases_follow_each_other_through_the_whole_step():
    timeline = shown_step(*GPU).timeline
    found = phases(timeline)
    assert [phase.kind for phase in found] == ["forward", "backward"] * 2 + ["update"]
    assert found[0].start_seconds == 0
    assert found[-1].end_seconds == timeline.seconds
    assert all(a.end_seconds == b.start_seconds for a, b in pairwise(found))


@pytest.mark.parametrize("which", [DEEPSPEED, FSDP2], ids=["deepspeed", "fsdp2"])
def test_other_engines_have_their_own_step_and_its_phases(which):
    shown = shown_step(*which)
    assert shown.seconds == pytest.approx(shown.plan.prediction.step_seconds)
    assert shown.busy_seconds == pytest.approx(shown.plan.prediction.lane_seconds)
    assert [phase.kind for phase in phases(shown.timeline)] == ["forward", "backward", "update"]


@pytest.mark.parametrize("which", [GPU, GPUS], ids=["gpu", "gpus"])
def test_what_overhangs_the_step_is_moved_to_its_other_end_and_nothing_is_lost(which):
    timeline = shown_step(*which).timeline
    assert which == GPUS or min(span.start_seconds for span in timeline.spans) < 0
    spans = within_step(timeline)
    assert all(0 <= span.start_seconds < span.end_seconds <= timeline.seconds for span in spans)
    for lane, busy in timeline.busy_seconds.items():
        assert sum(s.end_seconds - s.start_seconds for s in spans if s.lane == lane) == pytest.approx(busy)


@pytest.mark.parametrize("which", [GPU, GPUS], ids=["gpu", "gpus"])
def test_every_span_has_a_kind_with_a_colour_and_the_name_of_its_unit(which):
    shown = shown_step(*which)
    units = {placement.unit or "(root)" for placement in shown.plan.placements} | {"rest", ""}
    for span in shown.timeline.spans:
        assert kind_of(span) in COLOURS
        assert unit_of(span) in units


def test_the_gpu_s_waits_are_counted_and_blamed_on_the_lane_beside_them():
    spans = (
        Span("cpu_update", "a update", 0.0, 3.0),
        Span("nvme", "a read", 1.0, 2.0),
        Span("compute", "a forward", 3.0, 4.0),
        Span("compute", "a backward", 4.0, 5.0),
    )
    shown = replace(shown_step(*GPU), timeline=Timeline(5.0, spans))
    assert sentences(shown) == [
        "The bottleneck is cpu update: busy for 3.00 s of the step's 5.00 s (60%).",
        "The GPU waits for 3.00 s (60%); during 3.00 s of that, cpu update is at work.",
    ]


def test_where_the_cpu_computes_rows_are_as_long_as_their_lane_is_busy():
    shown = shown_step(*CPU)
    lines = printed(shown, 120)
    assert any("share its cores and add up" in line for line in lines)
    lengths = {lane: len(re.findall("[█-▏]", row_of(lines, lane))) for lane in shown.busy_seconds}
    by_seconds = sorted(shown.busy_seconds, key=shown.busy_seconds.__getitem__)
    assert [lengths[lane] for lane in by_seconds] == sorted(lengths.values())
    assert not any("forward" in line for line in lines)


def test_a_lane_that_is_hardly_busy_is_seen():
    cells = lane_cells([Span("nvme", "a read", 5.0, 5.001)], 10.0, 10)
    assert [cell.kind for cell in cells].count("weights read") == 1
    shown = replace(shown_step(*GPU), timeline=Timeline(10.0, (Span("nvme", "a read", 5.0, 5.001),)))
    assert HEIGHTS[1] in row_of(printed(shown, 80), "nvme")
