"""The dashboard as a whole, without a terminal."""

import asyncio
import json

import pytest

from tests.fake_run import make_events, write_run
from tui import RunError, watch
from tui.app import Dashboard
from tui.widgets import Panel


async def settled(app, pilot, events):
    """Wait until the dashboard shows the last of the events."""
    for _ in range(200):
        if app.view.latest == events[-1]["time"]:
            break
        await pilot.pause(0.02)
    await pilot.pause()


def shown(app, panel):
    return app.query_one(panel).render().plain


def dashboard(run_dir, events, **arguments):
    write_run(run_dir, events)
    return Dashboard(run_dir, clock=lambda: events[-1]["time"], **arguments)


@pytest.mark.parametrize(("kind", "end"), [("training", None), ("finished", "finished")])
def test_the_picture_of_a_run_is_the_one_that_people_approved(snap_compare, tmp_path, kind, end):
    events = make_events(end=end)
    app = dashboard(tmp_path, events)
    assert snap_compare(app, terminal_size=(100, 30), run_before=lambda pilot: settled(app, pilot, events))


@pytest.mark.parametrize("size", [(200, 60), (80, 24), (71, 30), (40, 10), (20, 5), (3, 2)])
async def test_any_terminal_size_will_do(tmp_path, size):
    events = make_events(done=8)
    app = dashboard(tmp_path, events)
    async with app.run_test(size=size) as pilot:
        await settled(app, pilot, events)
        assert app.view.step == 8


async def test_everything_is_visible_without_scrolling_in_80_by_24(tmp_path):
    events = make_events(done=8)
    app = dashboard(tmp_path, events)
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(app, pilot, events)
        assert app.query_one("#body").max_scroll_y == 0
        for panel in app.query(Panel).exclude("#ending"):
            assert panel.content_size.height >= 1, panel.id


async def test_a_run_that_grows_is_followed(tmp_path):
    events = make_events(done=7)
    events, more = events[:20], events[20:]
    app = dashboard(tmp_path, events)
    async with app.run_test(size=(100, 30)) as pilot:
        await settled(app, pilot, events)
        with (tmp_path / "events.jsonl").open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in more)
        await settled(app, pilot, more)
        assert "step 7 of 400" in shown(app, "#progress")


async def test_a_run_that_has_not_started_is_waited_for(tmp_path):
    app = Dashboard(tmp_path)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause(0.3)
        assert "waiting for the run to start" in shown(app, "Title")
        events = make_events(done=2)
        write_run(tmp_path, events)
        await settled(app, pilot, events)
        assert "gpt.py" in shown(app, "Title")


async def test_a_run_that_says_nothing_for_long_is_called_silent(tmp_path):
    events = make_events(done=2)
    write_run(tmp_path, events)
    app = Dashboard(tmp_path, clock=lambda: events[-1]["time"] + 65)
    async with app.run_test(size=(100, 30)) as pilot:
        await settled(app, pilot, events)
        assert "silent for 1:05" in shown(app, "Title")


@pytest.mark.parametrize("reason", ["finished", "interrupted", "failed"])
async def test_the_end_is_said_with_its_reason_and_message(tmp_path, reason):
    events = make_events(done=2, end=reason)
    events[-1]["message"] = "[disk] full"
    app = dashboard(tmp_path, events)
    async with app.run_test(size=(100, 30)) as pilot:
        await settled(app, pilot, events)
        assert app.query_one("#ending").display
        assert f"{reason} at step 2: [disk] full" in shown(app, "#ending")
        assert app.is_running


async def test_a_dashboard_that_shall_leave_at_the_end_leaves_with_0(tmp_path, monkeypatch):
    monkeypatch.setattr("tui.app.LEAVE_SECONDS", 0.05)
    app = dashboard(tmp_path, make_events(done=2, end="finished"), leave_at_end=True)
    assert await asyncio.wait_for(app.run_async(headless=True), 20) == 0


@pytest.mark.parametrize(("key", "code"), [("q", 0), ("ctrl+c", 130)])
async def test_q_leaves_with_0_and_ctrl_c_with_130(tmp_path, key, code):
    app = dashboard(tmp_path, make_events(done=2))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press(key)
    assert app.return_value == code


async def test_a_panel_is_drawn_again_only_when_its_part_has_changed(tmp_path, monkeypatch):
    events = make_events(done=3)
    app = dashboard(tmp_path, events)
    async with app.run_test(size=(100, 30)) as pilot:
        await settled(app, pilot, events)
        drawn = []
        monkeypatch.setattr(Panel, "refresh", lambda self, *_, **__: drawn.append(self.id) or self)
        more = {**events[-1], "unit": "head", "time": events[-1]["time"] + 0.001}
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write(json.dumps(more) + "\n")
        await settled(app, pilot, [more])
    assert set(drawn) <= {"units"} and drawn


def test_a_directory_that_is_not_there_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(RunError, match="is not a directory; give the directory"):
        watch(tmp_path / "nowhere")


async def test_events_that_can_not_be_read_end_the_dashboard_with_the_reason(tmp_path):
    (tmp_path / "events.jsonl").mkdir()
    app = Dashboard(tmp_path)
    await asyncio.wait_for(app.run_async(headless=True), 20)
    assert isinstance(app.failure, RunError) and "events.jsonl can not be read" in str(app.failure)
