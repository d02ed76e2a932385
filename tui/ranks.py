"""The ranks of a run beside each other: pure functions of the view of each.

A rank that was started with the first one has its session; what an earlier start, or one with more ranks, has left in
the run's directory does not count.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from textual.content import Content

from tui.draw import Span, lines
from tui.format import UNKNOWN, bytes_of, bytes_text, clock_text, seconds_text
from tui.view import TIERS, RunView

SILENT_SECONDS = 15.0
"""Without an event for this long a rank is said to be silent."""
STEPS_AVERAGED = 16
EVEN_SHARE = 0.1
"""Ranks are even where the waiting of none differs from another's by more than this share of a step."""
STATE_WIDTH = 22
"""Below which other columns give way to the state."""
SHOWN = 16
"""Ranks that are shown at a time."""
COLOURS = {"computing": "$good", "waiting": "$warn", "dead": "bold $danger", "silent": "bold $warn"}


@dataclass(frozen=True)
class RankRow:
    """One rank now."""

    rank: int
    host: str = ""
    state: str = "starting"
    """starting, computing, waiting, silent, dead, ended because another is dead, or why the run ended."""
    where: str = ""
    """The unit that it computes, or the collective that it waits in."""
    step: int = 0
    seconds: float | None = None
    waited_seconds: float | None = None
    """Both are means over the last steps."""
    held_bytes: tuple[tuple[str, float | None, float | None], ...] = ()
    """(tier, now, predicted) of the tiers that are used."""
    slowest: bool = False


def rank_rows(views: Mapping[int, RunView], clock: float) -> tuple[RankRow, ...]:
    """All ranks of the run; none where there is one alone. ``clock`` is the time of day."""
    first = views.get(0, RunView())
    if first.run is None or first.run.ranks < 2:
        return ()
    ranks, session = range(first.run.ranks), first.run.session
    here = {r: view for r in ranks if (view := views.get(r)) and view.run and view.run.session == session}
    dead = {view.end.rank for view in here.values() if view.end is not None}
    rows = [_row(r, here[r], clock, r in dead) if r in here else RankRow(r) for r in ranks]
    late = slowest(rows)
    return tuple(RankRow(**{**vars(row), "slowest": row.rank == late}) for row in rows)


def _row(rank: int, view: RunView, clock: float, dead: bool) -> RankRow:
    assert view.run is not None
    last, recent = view.steps[-1] if view.steps else None, view.steps[-STEPS_AVERAGED:]
    silent = clock - view.latest if view.latest is not None else 0.0
    if dead:
        state, where = "dead", ""
    elif view.end is not None:
        state, where = "ended" if view.end.rank is not None else view.end.reason, ""
    elif silent > SILENT_SECONDS:
        state, where = "silent", f"for {clock_text(silent)}"
    elif view.waiting:
        state, where = "waiting", re.sub(r" of step \d+$", "", view.waiting)
    else:
        state, where = "computing", "" if view.now.unit is None else view.now.unit or "root"
    held = [
        (tier, last.memory_bytes.get(tier) if last else None, view.run.predicted_bytes.get(tier))
        for tier in TIERS
        if view.run.predicted_bytes.get(tier) or (last and last.memory_bytes.get(tier))
    ]
    waits = [s.waited_seconds for s in recent if s.waited_seconds is not None]
    return RankRow(
        rank,
        view.run.host,
        state,
        where,
        view.step,
        _mean([s.seconds for s in recent if s.seconds is not None]),
        _mean(waits),
        tuple(held),
    )


def slowest(rows: Sequence[RankRow]) -> int | None:
    """The rank that the others wait for: the only one that does not wait now, or who waited least of late."""
    there = [row for row in rows if row.state in ("computing", "waiting", "silent")]
    busy = [row for row in there if row.state != "waiting"]
    if len(there) > 1 and len(busy) == 1:
        return busy[0].rank
    waited = sorted((row.waited_seconds, row.rank) for row in there if row.waited_seconds is not None)
    seconds = max((row.seconds or 0.0 for row in there), default=0.0)
    if len(waited) < 2 or waited[-1][0] - waited[0][0] <= EVEN_SHARE * seconds:
        return None
    return waited[0][1]


def verdict(rows: Sequence[RankRow]) -> str:
    """In a few words, for the border."""
    if dead := [row for row in rows if row.state == "dead"]:
        return f"rank {dead[0].rank} is dead"
    late = next((row for row in rows if row.slowest), None)
    return f"the others wait for rank {late.rank}" if late is not None else ""


def shown(rows: Sequence[RankRow]) -> list[RankRow]:
    """Those that there is room for: who is in trouble, who is slowest, then the first ones; in their order."""
    by_need = sorted(rows, key=lambda r: (r.state != "dead", not r.slowest, r.state not in ("silent", "starting")))
    return sorted(by_need[:SHOWN], key=lambda row: row.rank)


def height(rows: Sequence[RankRow]) -> int:
    """Lines that ``table`` needs."""
    return 1 + min(len(rows), SHOWN) + (len(rows) > SHOWN)


def table(rows: Sequence[RankRow], width: int) -> Content:
    """A line a rank: its state, seconds of a step, and what each tier holds beside what was predicted.

    What there is no room for is left out.
    """
    visible = shown(rows)
    for parts in (("host", "waited", "predicted"), ("waited", "predicted"), ("predicted",), ("waited",), ()):
        columns = _columns(visible, parts)
        room = width - sum(max(len(cell[0]) for cell in column) + 2 for column in columns)
        if room >= STATE_WIDTH:
            break
    states = _state_column(visible, max(room, 8))
    columns.insert(1, states)
    picture = [
        Content.assemble(
            *(part for cell, size in zip(line, sizes, strict=True) for part in (_padded(cell, size), "  "))
        )
        for sizes in [[max(len(cell[0]) for cell in column) for column in columns]]
        for line in zip(*columns, strict=True)
    ]
    if len(rows) > len(visible):
        picture.append(Content.styled(f"and {len(rows) - len(visible)} more", "$text-muted"))
    return lines([row.truncate(width) for row in picture])


def _columns(rows: Sequence[RankRow], parts: Sequence[str]) -> list[list[Span]]:
    """Each with its heading, the state left out."""
    muted = "$text-muted"
    columns: list[list[Span]] = [[("rank", muted), *((f"{row.rank:>4}", "bold") for row in rows)]]
    columns.append([("step", muted), *((f"{row.step:>4,}", "") for row in rows)])
    columns.append([("seconds", muted), *((f"{seconds_text(row.seconds):>7}", "") for row in rows)])
    if "waited" in parts:
        columns.append([(" waited", muted), *((f"{seconds_text(row.waited_seconds):>7}", muted) for row in rows)])
    for tier in dict.fromkeys(tier for row in rows for tier, *_ in row.held_bytes):
        held = [{t: (now, predicted) for t, now, predicted in row.held_bytes}.get(tier, (None, None)) for row in rows]
        whole = "predicted" in parts
        texts = [bytes_of(*pair) if whole and None not in pair else bytes_text(pair[0]) for pair in held]
        columns.append([(f"{tier} of predicted" if whole else tier, f"${tier}"), *((text, "") for text in texts)])
    if "host" in parts:
        columns.append([("host", muted), *((row.host or UNKNOWN, muted) for row in rows)])
    return columns


def _state_column(rows: Sequence[RankRow], width: int) -> list[Span]:
    column: list[Span] = [("state", "$text-muted")]
    for row in rows:
        mark = " ◀ slowest" if row.slowest else ""
        text = f"{row.state} {row.where}".rstrip()
        if len(text) + len(mark) > width:
            text = row.state if len(row.state) + len(mark) > width - 6 else f"{text[: width - len(mark) - 1].rstrip()}…"
        column.append(((text + mark)[:width], COLOURS.get(row.state, "$text-muted")))
    return column


def _padded(cell: Span, size: int) -> Span:
    return cell[0].ljust(size), cell[1]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
