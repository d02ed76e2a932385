"""Folding events into a view."""

import math
from statistics import fmean

import pytest
<<<<<<< HEAD
from tests.fake_run import MIB, START, folded, make_events, make_plan, run_event, step_event
=======
from tests.fake_run import MIB, START, folded, make_events, make_plan, run_event, step_event
>>>>>>> tui
from hypothesis import given
from hypothesis import strategies as st

from tui.view import CURVE_POINTS, HISTORY, NOTES, Curve, RunView, fold


def test_the_view_says_what_the_run_event_said():
    view = folded([run_event(make_plan(), 400)])
    assert view.run.model == "gpt.py"
    assert view.run.budget_bytes == {"gpu": 96 * MIB, "host": 64 * MIB, "nvme": 512 * MIB}
    assert [u.name for u in view.run.units] == [p.unit for p in make_plan().placements]
    assert view.step == 0 and view.end is None and view.remaining_seconds is None


def test_the_last_step_event_is_the_state_of_the_run():
    events = make_events(done=30, steps=40)
    view = folded(events)
    last = [e for e in events if e["event"] == "step"][-1]
    record = view.steps[-1]
    assert (view.step, record.loss, record.memory_bytes) == (30, last["loss"], last["memory_bytes"])
    assert record.tokens_per_second == last["tokens"] / last["seconds"]
    assert record.bytes_per_second("nvme_read") == last["traffic_bytes"]["nvme_read"] / last["seconds"]


def test_time_left_is_steps_left_at_the_pace_of_the_last_sixteen():
    events = make_events(done=30, steps=40)
    pace = fmean([e["seconds"] for e in events if e["event"] == "step"][-16:])
    assert folded(events).remaining_seconds == pytest.approx(10 * pace)


def test_elapsed_time_is_told_by_the_events_alone():
    events = [run_event(make_plan(), 9), {"event": "note", "time": START + 12.5, "message": "x"}]
    assert folded(events).elapsed_seconds == 12.5


def test_a_resumed_run_forgets_the_steps_that_it_does_again():
    events = [*make_events(done=30, steps=40), run_event(make_plan(), 40, first_step=21), step_event(21, START)]
    view = folded(events)
    assert [s.step for s in view.steps] == list(range(1, 22))
    assert [step for step, _ in view.losses.points] == list(range(1, 22))


def test_a_new_run_in_the_same_file_starts_empty():
    view = folded([*make_events(done=5), run_event(make_plan(), 400)])
    assert view.steps == () and view.losses.points == () and view.step == 0


def test_a_run_that_goes_on_is_no_longer_ended():
    events = make_events(done=3, end="interrupted")
    assert folded(events).end.reason == "interrupted"
    assert folded([*events, run_event(make_plan(), 9, first_step=4)]).end is None


def test_after_the_end_nothing_computes_or_flies():
    now = folded(make_events(done=3, end="finished")).now
    assert now.unit is None and now.in_flight == ()


def test_a_loss_that_is_not_a_number_is_kept_as_such():
    view = folded([{**step_event(1, START), "loss": math.nan}])
    assert math.isnan(view.steps[-1].loss)


def test_histories_are_bounded():
    view = RunView()
    for step in range(1, 3000):
        view = fold(view, step_event(step, START))
        view = fold(view, {"event": "note", "time": START, "message": f"{step}"})
    assert len(view.steps) == HISTORY and len(view.notes) == NOTES and len(view.losses.points) < CURVE_POINTS
    assert view.steps[-1].step == 2999


@pytest.mark.parametrize("event", [{}, {"event": 3}, {"event": "later kind", "time": 1.0}, {"event": "step"}])
def test_an_event_that_says_nothing_leaves_the_very_same_view(event):
    view = folded(make_events(done=2))
    assert fold(view, event) is view


@given(st.lists(st.floats(-10, 10), max_size=3 * CURVE_POINTS))
def test_a_curve_keeps_the_mean_of_all_values_that_it_stands_for(values):
    curve = Curve()
    for step, value in enumerate(values):
        curve = curve.add(step, value)
    kept = len(values) - len(curve.pending)
    assert len(curve.points) * curve.stride == kept
    if kept:
        assert fmean(v for _, v in curve.points) == pytest.approx(fmean(values[:kept]), abs=1e-6)
        assert curve.points[-1][0] == kept - 1


@given(st.permutations(make_events(done=4)))
def test_events_in_any_order_make_a_view(events):
    view = folded(events)
    assert view.run is not None
    assert [s.step for s in view.steps] == sorted({s.step for s in view.steps})


junk = st.sampled_from(
    [None, True, -1, 0, 3, 10**400, 0.5, math.nan, -math.inf, "", "gpu", [], [1], [{}], [{"unit": 3}], {}, {"gpu": "x"}]
)
KEYS = sorted({key for event in make_events(done=1, end="failed") for key in event} - {"event"})


@given(
    st.lists(
        st.builds(
            lambda kind, fields: {**fields, "event": kind},
            st.sampled_from(["run", "now", "step", "checkpoint", "note", "end"]),
            st.dictionaries(st.sampled_from(KEYS), junk, max_size=8),
        ),
        max_size=12,
    )
)
def test_no_event_can_break_the_view(events):
    view = folded(events)
    assert isinstance(view.step, int)
