"""A plan's step as a page."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.formatting import format_bytes
from memplan.spans import Span, Timeline
from memplan.step_words import sentences
from memplan.timeline_page import FINEST, bars_of, timeline_page, write_timeline_page
from offload.plan import Target
from tests.browser import drawn_charts, drawn_values, needs_browser
from tests.shown_steps import shown_step
from tests.test_profile_page import Outline

WHICH = (("cuda", 1), ("cuda", 2, Target.DEEPSPEED), ("cpu", 1))


@pytest.fixture(scope="module")
def page():
    return timeline_page([shown_step()])


def test_the_page_is_well_formed_and_has_every_part(page):
    outline = Outline(page)
    assert outline.open == []
    headings = ["What would move it", "Lanes", "Memory by phase", "Why this plan", "Runners-up"]
    assert [text for text in outline.texts if text in headings] == headings
    for sentence in sentences(shown_step()):
        assert sentence in outline.texts


def test_the_page_needs_no_other_file_and_holds_the_library_once(page):
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](?!data:)", page)
    assert len(re.findall(r"plotly\.js v\d", page)) == 1


def test_the_bars_add_up_to_the_busy_seconds(page):
    shown = shown_step()
    lanes = list(shown.busy_seconds)
    drawn = dict.fromkeys(lanes, 0.0)
    (traces,) = drawn_values(page)
    for trace in traces:
        for lane, seconds in zip(trace["y"], trace["x"], strict=True):
            drawn[lanes[lane]] += seconds
    assert drawn == pytest.approx(shown.busy_seconds, rel=1e-3)


def test_levers_reasons_and_the_memory_of_each_phase_are_on_the_page(page):
    shown = shown_step()
    for text in (*(lever.sentence for lever in shown.levers), *shown.plan.reasons):
        assert f"<li>{text}</li>" in page
    for sizes in shown.plan.prediction.phases.values():
        for phase, size in sizes.items():
            assert re.search(f"<td>{phase}</td>.*?{re.escape(format_bytes(size))}", page)


def test_what_a_model_says_is_never_markup():
    shown = shown_step()
    spans = (Span("compute", "<img src=x> forward", 0.0, 1.0),)
    plan = replace(shown.plan, model="<script>alert(1)</script>")
    page = timeline_page([replace(shown, plan=plan, timeline=Timeline(1.0, spans))])
    assert "<script>alert" not in page
    assert "<img" not in page


@given(st.lists(st.tuples(st.floats(0, 1e-3), st.floats(1e-6, 2e-3)), min_size=1, max_size=200))
def test_short_spans_are_drawn_together_and_nothing_is_lost(pieces):
    now, spans = 0.0, []
    for number, (pause, length) in enumerate(pieces):
        spans.append(Span("nvme", f"{number} read", now + pause, now + pause + length))
        now += pause + length
    bars = bars_of(Timeline(1.0, tuple(spans)))
    assert [unit for bar in bars for unit in bar.units] == [str(n) for n in range(len(spans))]
    assert sum(bar.busy_seconds for bar in bars) == pytest.approx(sum(s.end_seconds - s.start_seconds for s in spans))
    assert all(b.end_seconds - a.start_seconds >= FINEST for a, b in pairwise(bars))


@needs_browser
@pytest.mark.parametrize(
    "which", [("cuda", 1), ("cuda", 2, Target.DEEPSPEED), ("cpu", 1)], ids=["gpu", "deepspeed", "cpu"]
)
def test_a_browser_draws_the_step_without_an_error(tmp_path, which):
    write_timeline_page([shown_step(*which)], tmp_path / "page.html")
    (chart,) = drawn_charts(tmp_path / "page.html")
    lanes = shown_step(*which).busy_seconds
    assert len(re.findall(r'<g class="point"><path d="M', chart)) >= len(lanes)
    for lane in lanes:
        assert lane.replace("_", " ") in chart
