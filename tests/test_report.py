"""The report of a run as an HTML page."""

import re

import pytest

from memplan.report import write_report
from tests.browser import drawn_charts, drawn_values, needs_browser
from tests.fake_run import make_events, make_plan, run_event, step_event, write_run
from tui import RunError

CHARTS = 6


def report(run_dir, events):
    write_run(run_dir, events)
    write_report(run_dir, run_dir / "report.html")
    return (run_dir / "report.html").read_text()


def test_the_page_says_what_was_planned_and_what_happened(tmp_path):
    html = report(tmp_path, make_events(done=40, steps=40, end="finished"))
    plan = make_plan()
    for text in ("finished at step 40", "41.0 MiB", "96.0 MiB", "380 ms", *plan.reasons):
        assert text in html
    assert all(f"<td>{p.unit or '(root)'}</td>" in html for p in plan.placements)
    assert all(a.description in html and a.why_not in html for a in plan.alternatives)


def test_the_page_needs_no_other_file_and_holds_the_library_once(tmp_path):
    html = report(tmp_path, make_events(done=3))
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](?!data:)", html)
    assert len(re.findall(r"plotly\.js v\d", html)) == 1


def test_the_charts_hold_every_step(tmp_path):
    events = make_events(done=600, steps=600)
    loss, *others = drawn_values(report(tmp_path, events))
    assert len(others) == CHARTS - 1
    assert len(loss[0]["x"]["bdata"] if isinstance(loss[0]["x"], dict) else loss[0]["x"]) == 600
    assert loss[0]["y"][-1] == [e["loss"] for e in events if e["event"] == "step"][-1]


def test_steps_that_a_resumed_run_did_again_count_once(tmp_path):
    events = make_events(done=10, steps=12)
    events += [run_event(make_plan(), 12, first_step=6), {**step_event(6, 0.0), "loss": 1.5}]
    loss, *_ = drawn_values(report(tmp_path, events))
    assert loss[0]["x"] == [1, 2, 3, 4, 5, 6] and loss[0]["y"][-1] == 1.5


def test_what_the_run_said_is_never_markup(tmp_path):
    events = make_events(done=2, end="failed")
    events[-1]["message"] = "<script>alert(1)</script>"
    assert "<script>alert(1)" not in report(tmp_path, events)


@pytest.mark.parametrize("events", [[], make_events(done=0), [step_event(1, 0.0)], [{"event": "step", "step": 1}]])
def test_a_run_that_has_barely_begun_has_a_report(tmp_path, events):
    assert len(drawn_values(report(tmp_path, events))) == CHARTS


@pytest.mark.parametrize("missing", ["plan.json", "events.jsonl"])
def test_a_directory_that_is_no_run_is_refused_by_what_is_missing(tmp_path, missing):
    write_run(tmp_path, make_events(done=1))
    (tmp_path / missing).unlink()
    with pytest.raises(RunError, match=f"{missing} is missing"):
        write_report(tmp_path, tmp_path / "report.html")


def test_a_plan_that_can_not_be_read_is_refused(tmp_path):
    write_run(tmp_path, make_events(done=1))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(RunError, match="not a plan that this version can read"):
        write_report(tmp_path, tmp_path / "report.html")


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    write_run(tmp_path, make_events(done=1))
    with pytest.raises(RunError, match="can not be written to"):
        write_report(tmp_path, tmp_path / "nowhere" / "report.html")


@needs_browser
def test_a_browser_draws_every_chart_without_an_error(tmp_path):
    report(tmp_path, make_events(done=30, steps=30, end="finished"))
    charts = drawn_charts(tmp_path / "report.html")
    assert len(charts) == CHARTS
    for chart in charts:
        paths = re.findall(r'<path class="js-line" d="(M[^"]+)"|<g class="point"><path d="(M[^"]+)"', chart)
        assert paths, chart[:300]
