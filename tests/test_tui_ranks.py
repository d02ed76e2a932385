"""Several ranks in the dashboard and the report: who computes, waits, is dead, and whom the others wait for."""

import json
from pathlib import Path
from typing import Any

import pytest

from memplan.report import write_report
from tests.fake_run import folded, rank_events, write_ranks, write_run
from tests.test_tui_app import settled
from tui.app import Dashboard
from tui.ranks import RankRow, height, rank_rows, shown, table, verdict
from tui.source import RankTails
from tui.view import RunView, fold
from tui.widgets import Ranks

RANKS, LATE = 4, 2


def each(done: int = 40) -> list[list[dict[str, Any]]]:
    return [rank_events(rank, RANKS, LATE, done) for rank in range(RANKS)]


def rows_of(events: list[list[dict[str, Any]]], later: float = 1.0) -> tuple[RankRow, ...]:
    return rank_rows({rank: folded(own) for rank, own in enumerate(events)}, events[LATE][-1]["time"] + later)


def end_event(rank: int | None, time: float, reason: str = "failed") -> dict[str, Any]:
    return {"event": "end", "time": time, "reason": reason, "step": 40, "message": "it", "rank": rank}


def test_a_run_of_one_process_has_no_rows() -> None:
    assert rank_rows({0: RunView()}, 0.0) == ()
    assert rank_rows({0: folded(rank_events(0, 1, 0))}, 0.0) == ()


def test_who_waits_and_who_is_waited_for() -> None:
    rows = rows_of(each())
    assert [row.state for row in rows] == ["waiting", "waiting", "computing", "waiting"]
    assert rows[0].where == "gather of blocks.4"
    assert [row.slowest for row in rows] == [False, False, True, False]
    assert verdict(rows) == "the others wait for rank 2"


def test_the_slowest_is_who_waited_least_of_late_while_all_compute() -> None:
    rows = rows_of([own[:-1] if rank != LATE else own for rank, own in enumerate(each())])
    assert {row.state for row in rows} == {"computing"}
    assert [row.rank for row in rows if row.slowest] == [LATE]


def test_ranks_that_wait_alike_are_even() -> None:
    rows = rows_of([rank_events(rank, RANKS, late=-1) for rank in range(RANKS)])
    assert not any(row.slowest for row in rows)
    assert verdict(rows) == ""


def test_the_rank_to_blame_is_dead_though_it_said_nothing_itself() -> None:
    events = each()
    for rank in (0, 1, 3):
        events[rank].append(end_event(LATE, events[rank][-1]["time"] + 9))
    rows = rows_of(events)
    assert [row.state for row in rows] == ["ended", "ended", "dead", "ended"]
    assert verdict(rows) == "rank 2 is dead"


def test_a_rank_without_events_for_long_is_silent_and_one_without_a_file_has_not_started() -> None:
    events = each()
    rows = rank_rows({0: folded(events[0]), 2: folded(events[2])}, events[0][-1]["time"] + 20)
    assert [row.state for row in rows] == ["silent", "starting", "silent", "starting"]


def test_what_an_earlier_start_has_left_does_not_count() -> None:
    events = each()
    for event in events[1]:
        if event["event"] == "run":
            event["session"] = "before"
    assert rows_of(events)[1] == RankRow(1)


def test_of_many_ranks_those_in_trouble_are_shown() -> None:
    rows = [RankRow(r, state="dead" if r == 70 else "computing", slowest=r == 90) for r in range(128)]
    seen = [row.rank for row in shown(rows)]
    assert len(seen) == 16
    assert seen[-2:] == [70, 90]
    assert height(rows) == len(table(rows, 80).plain.splitlines()) == 18
    assert "and 112 more" in table(rows, 80).plain


@pytest.mark.parametrize("width", [30, 80, 110, 200])
def test_a_row_is_as_wide_as_there_is_room(width: int) -> None:
    lines = table(rows_of(each()), width).plain.splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) <= width
    assert ("node1" in lines[3]) == (width > 130)
    assert ("39.4 of 41.0 MiB" in lines[4]) == (width > 100)
    if width > 60:
        assert "computing" in lines[3]
        assert "◀ slowest" in lines[3]


def test_the_picture_of_four_ranks_is_the_one_that_people_approved(snap_compare: Any, tmp_path: Path) -> None:
    events = each()
    write_ranks(tmp_path, events)
    app = Dashboard(tmp_path, clock=lambda: events[0][-1]["time"])

    async def all_there(pilot: Any) -> None:
        for _ in range(200):
            if len(app._views) == RANKS and all(view.steps for view in app._views.values()):
                break
            await pilot.pause(0.02)
        await settled(app, pilot, events[0])

    assert snap_compare(app, terminal_size=(110, 44), run_before=all_there)


async def test_ranks_that_come_later_and_half_lines_are_followed(tmp_path: Path) -> None:
    events = each(done=4)
    write_run(tmp_path, events[0])
    app = Dashboard(tmp_path, clock=lambda: events[0][-1]["time"])
    async with app.run_test(size=(100, 40)) as pilot:
        await settled(app, pilot, events[0])
        panel = app.query_one(Ranks)
        assert [line.split()[1] for line in panel.render().plain.splitlines()[2:]] == ["starting"] * 3
        text = "".join(json.dumps(event) + "\n" for event in events[1])
        (tmp_path / "events-1.jsonl").write_text(text[:-20])
        (tmp_path / "events-2.jsonl").mkdir()
        (tmp_path / "events-x.jsonl").write_text("not a rank's")
        for _ in range(200):
            if 1 in app._views:
                break
            await pilot.pause(0.02)
        await pilot.pause(0.1)
        assert "computing" in panel.render().plain.splitlines()[2], "its last line, that it waits, is not whole yet"
        with (tmp_path / "events-1.jsonl").open("a") as file:
            file.write(text[-20:])
        for _ in range(200):
            if app._views[1].waiting:
                break
            await pilot.pause(0.02)
        await pilot.pause(0.1)
        assert "waiting" in panel.render().plain.splitlines()[2]


def test_the_first_ranks_events_must_be_readable_and_the_others_need_not(tmp_path: Path) -> None:
    (tmp_path / "events-1.jsonl").mkdir()
    assert list(RankTails(tmp_path).poll()) == []
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(OSError, match=r"events\.jsonl"):
        list(RankTails(tmp_path).poll())


def test_the_report_has_a_table_of_ranks_where_there_are_several(tmp_path: Path) -> None:
    write_ranks(tmp_path, each())
    write_report(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Ranks</h2>" in page
    assert "computing blocks.5, slowest" in page
    assert "39.4 of 41.0 MiB" in page


def test_waiting_ends_with_what_is_computed_next() -> None:
    view = fold(RunView(), {"event": "waiting", "time": 1.0, "inside": "gather of h.1 of step 3"})
    assert view.waiting == "gather of h.1 of step 3"
    assert fold(view, {"event": "now", "time": 2.0, "step": 3, "unit": "h.1"}).waiting == ""
