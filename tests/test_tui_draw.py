"""Numbers and pictures."""

import math

import pytest
<<<<<<< HEAD
from tests.fake_run import folded, make_events, make_plan, run_event, step_event
=======
from tests.fake_run import folded, make_events, make_plan, run_event, step_event
>>>>>>> tui
from hypothesis import given
from hypothesis import strategies as st

from tui import draw
from tui.format import bytes_of, bytes_text, clock_text, count_text, number_text, seconds_text
from tui.plot import braille, columns, tick_texts, ticks
from tui.strip import strip, strip_height
from tui.view import Now, RunView


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(None), "\N{EN DASH}"),
        (bytes_text(0), "0 B"),
        (bytes_text(1023), "1023 B"),
        (bytes_text(37.2 * 2**20), "37.2 MiB"),
        (bytes_text(2**30 - 1), "1.0 GiB"),
        (bytes_of(2**20, 3 * 2**20), "1.0 of 3.0 MiB"),
        (bytes_of(2**10, 3 * 2**20), "1.0 KiB of 3.0 MiB"),
        (count_text(10_812_416), "10.8 M"),
        (count_text(999_999), "1 M"),
        (seconds_text(0.4123), "412 ms"),
        (seconds_text(1.236), "1.24 s"),
        (seconds_text(84e-6), "84 µs"),
        (clock_text(83), "1:23"),
        (clock_text(7509), "2:05:09"),
        (clock_text(90_000), "1 d 01:00"),
        (number_text(2.3e-4), "2.30e-04"),
        (number_text(math.nan), "nan"),
    ],
)
def test_numbers_read_as_people_write_them(text, expected):
    assert text == expected


@given(st.floats(0, 2**59))
def test_bytes_never_need_more_than_eight_characters(count):
    assert len(bytes_text(count)) <= 8


@given(st.lists(st.none() | st.floats(), max_size=40), st.integers(0, 30), st.integers(1, 4))
def test_columns_fill_their_place_exactly(values, width, height):
    rows = columns(values, width, height)
    assert [len(row) for row in rows] == [width] * height


def test_columns_grow_with_their_values_and_none_above_zero_vanishes():
    assert columns([0, 0.001, 2, 4], 5) == ["  ▁▄▇"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 12))
def test_ticks_enclose_the_range_and_are_few(low, span, most):
    found = ticks(low, low + span, most)
    slack = span * 1e-6 + 1e-6
    assert 2 <= len(found) <= most
    assert found[0] <= low + slack and found[-1] >= low + span - slack
    assert len(tick_texts(found)) == len(found)


def test_a_falling_line_goes_from_the_upper_left_to_the_lower_right():
    assert braille([(0, 1.0), (1, 0.0)], 2, 1, 0.0, 1.0) == ["⠑⢄"]


def test_a_gap_in_the_values_is_a_gap_in_the_line():
    rows = braille([(float(i), math.nan if 3 <= i <= 6 else 0.5) for i in range(10)], 5, 1, 0.0, 1.0)
    assert rows[0][2] == " " and rows[0][0] != " " and rows[0][4] != " "


def test_memory_says_actual_budget_and_prediction():
    picture = draw.memory(folded(make_events()), 50).plain
    assert "37.2 MiB of 96.0 MiB, predicted 41.0 MiB" in picture
    assert "118 MiB of 512 MiB, predicted 118 MiB" in picture


def test_a_tier_over_its_budget_says_so_in_the_colour_of_danger():
    step = {**step_event(1, 0.0), "peak_bytes": {"gpu": 2**40}}
    picture = draw.memory(folded([run_event(make_plan(), 9), step]), 60)
    assert "peak 1.0 TiB, over the budget of 96.0 MiB" in picture.plain
    assert any("$danger" in str(span.style) for span in picture.spans)


def test_step_time_stands_beside_its_prediction():
    assert "predicted 380 ms" in draw.speed(folded(make_events()), 50).plain


def test_the_strip_marks_what_computes_and_what_flies():
    view = folded(make_events())
    now = view.now
    picture = strip(view.run.units, now, 90).plain
    assert f"▼ {now.unit}" in picture
    assert all(draw.LINK_LABELS[f.link][0] in picture for f in now.in_flight) and now.in_flight


@given(st.integers(1, 400), st.integers(2, 220))
def test_the_strip_needs_the_rows_that_it_says_and_no_more_columns_than_there_are(count, width):
    unit = folded([run_event(make_plan(), 9)]).run.units[0]
    rows = strip([unit] * count, Now(0), width).plain.split("\n")
    assert len(rows) == strip_height(count, width)
    assert max(len(row) for row in rows) <= max(width, 4)


@given(st.integers(1, 200), st.integers(0, 60), st.sampled_from(["empty", "started", "going", "nan"]))
def test_every_picture_fits_into_any_size(width, height, kind):
    events = {
        "empty": [],
        "started": [run_event(make_plan(), 9)],
        "going": make_events(done=3),
        "nan": [{**step_event(i, 0.0), "loss": math.nan if i % 2 else 1.0} for i in range(1, 5)],
    }[kind]
    view = folded(events) if events else RunView()
    draw.memory(view, width)
    for picture in (
        draw.title(view, ("state", ""), width),
        draw.progress(view, width),
        draw.loss(view.losses, width, height),
        draw.speed(view, width),
        draw.notes(view.notes, width, height),
    ):
        assert all(len(row) <= width for row in picture.plain.split("\n"))
    draw.traffic(view.steps, width, height)
