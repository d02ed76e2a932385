"""Each part of the dashboard as text: pure functions of a view (or a piece of it) and a size.

Colours are named, not given: ``$gpu``, ``$host``, ``$nvme`` and the rest are variables of the application's theme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from textual.content import Content

from offload.events import LINKS
from tui.format import UNKNOWN, bytes_of, bytes_text, clock_text, count_text, number_text, rate_text, seconds_text
from tui.plot import braille, columns, tick_texts, ticks
from tui.view import TIERS, Curve, End, Note, RunView, StepRecord

Span = tuple[str, str]
"""Text and its style."""

LINK_LABELS = {
    "host_to_device": ("host→device", "$host", "→"),
    "device_to_host": ("device→host", "$gpu", "←"),
    "nvme_read": ("nvme read", "$nvme", "↑"),
    "nvme_write": ("nvme write", "$nvme", "↓"),
}
"""Label, colour and arrow of every link."""
_EIGHTHS_RIGHT = " ▏▎▍▌▋▊▉█"


def fit(width: int, *candidates: str) -> str:
    """The first candidate that fits, or the last one cut."""
    return next((c for c in candidates if len(c) <= width), candidates[-1][: max(width, 0)])


def spread(width: int, left: Sequence[Span], right: Sequence[Span]) -> Content:
    """One line with text at both ends; the right one gives way."""
    ends = sum(len(text) for text, _ in (*left, *right))
    if ends >= width:
        return Content.assemble(*left).truncate(width, ellipsis=True)
    return Content.assemble(*left, " " * (width - ends), *right)


def lines(rows: Sequence[Content]) -> Content:
    """Rows under each other."""
    return Content("\n").join(rows)


def title(view: RunView, state: Span, width: int) -> Content:
    """What is trained, on what, and how it is going."""
    run = view.run
    if run is None:
        return spread(width, [("memplan", "bold $accent")], [state])
    facts = [run.device, run.precision, f"{count_text(run.parameters)} parameters"]
    if run.micro_batch_size and run.gradient_accumulation_steps:
        facts.append(f"batch {run.micro_batch_size} x {run.gradient_accumulation_steps}")
    room = width - len(run.model) - len(state[0]) - 2
    while facts and len("   ".join(facts)) + 2 > room:
        facts.pop()
    return spread(width, [(run.model, "bold $accent"), ("  " + "   ".join(facts), "$text-muted")], [state])


def progress(view: RunView, width: int) -> Content:
    """Steps done, as numbers and as a bar, with the time spent and the time to come."""
    last = view.run.last_step if view.run else None
    done = view.step
    count = f"step {done:,}" + (f" of {last:,}" if last else "")
    elapsed, left = clock_text(view.elapsed_seconds), clock_text(view.remaining_seconds)
    times = (
        f"{elapsed} elapsed"
        if view.end
        else fit(width - len(count) - 12, f"{elapsed} elapsed   {left} left", f"{elapsed} + {left}", "")
    )
    share = min(done / last, 1.0) if last else 0.0
    percent = f" {share:4.0%}" if last else ""
    room = width - len(count) - len(times) - len(percent) - 4
    full = round(max(room, 0) * share)
    return Content.assemble(
        count, "  ", ("━" * full, "$accent"), ("━" * (room - full), "$rule"), percent, "  ", (times, "$text-muted")
    ).truncate(width)


@dataclass(frozen=True)
class _Held:
    """One tier's memory in bytes."""

    tier: str
    now: float | None
    peak: float | None
    predicted: float | None
    budget: float | None

    @property
    def over(self) -> bool:
        return self.budget is not None and self.peak is not None and self.peak > self.budget

    def sentences(self) -> tuple[str, ...]:
        """The same figures in fewer and fewer characters."""
        if self.over:
            long = f"peak {bytes_text(self.peak)}, over the budget of {bytes_text(self.budget)}"
            return (long, long, long, f"peak {bytes_text(self.peak)} over {bytes_text(self.budget)}", "over budget")
        now, peak, predicted = bytes_text(self.now), bytes_text(self.peak), bytes_text(self.predicted)
        return (
            f"{now} of {bytes_text(self.budget)}   peak {peak}   predicted {predicted}",
            f"{now} of {bytes_text(self.budget)}, predicted {predicted}",
            f"{bytes_of(self.now, self.budget)}, pred. {predicted}",
            bytes_of(self.now, self.budget),
            now,
        )


def memory(view: RunView, width: int) -> Content:
    """Two lines a tier: a bar against the budget, and the same in numbers."""
    run, last = view.run, view.steps[-1] if view.steps else None
    tiers = [
        _Held(
            tier,
            last.memory_bytes.get(tier) if last else None,
            last.peak_bytes.get(tier) if last else None,
            run.predicted_bytes.get(tier) if run else None,
            run.budget_bytes.get(tier) if run else None,
        )
        for tier in TIERS
    ]
    used = [t for t in tiers if t.now or t.peak or t.predicted]
    # All tiers speak in the same form: the longest that fits for each of them.
    forms = list(zip(*(t.sentences() for t in used), strict=True))
    form = next((form for form in forms if max(map(len, form)) <= width - 6), forms[-1] if forms else ())
    texts = dict(zip(used, form, strict=True))
    rows: list[Content] = []
    for t in tiers:
        share = f" {t.now / t.budget:4.0%}" if t.now is not None and t.budget else ""
        alarm = "$danger" if t.over else ""
        bar = memory_bar(t.tier, t.now, t.peak, t.predicted, t.budget, width - 6 - len(share))
        rows.append(Content.assemble((f"{t.tier:<6}", f"bold ${t.tier}"), bar, (share, alarm)))
        quiet = "not used" if last else UNKNOWN
        rows.append(Content.assemble(" " * 6, (texts[t], alarm) if t in texts else (quiet, "$text-muted")))
    return lines(rows)


def memory_bar(
    tier: str, now: float | None, peak: float | None, predicted: float | None, budget: float | None, width: int
) -> Content:
    """Held now in full colour, up to the peak in a weak one, a mark at the prediction; full width is the budget."""
    scale = max(budget or 0, now or 0, peak or 0, predicted or 0)
    if width <= 0:
        return Content("")
    eighths = round((now or 0) / scale * width * 8) if scale else 0
    if now and not eighths:
        eighths = 1
    high = round((peak or 0) / scale * width) if scale else 0
    mark = min(int((predicted or 0) / scale * width), width - 1) if scale and predicted else None
    limit = int(budget / scale * width) if scale and budget else width
    spans: list[Span] = []
    for cell in range(width):
        colour = f"${tier}" if cell < limit else "$danger"
        ground = f"on {colour} 30%" if cell < high else "on $track"
        if cell == mark:
            full = cell * 8 + 8 <= eighths
            spans.append(("┃" if full else "│", f"bold $mark on {colour}" if full else f"bold $mark {ground}"))
        else:
            spans.append((_EIGHTHS_RIGHT[min(max(eighths - cell * 8, 0), 8)], f"{colour} {ground}"))
    return Content.assemble(*spans)


def traffic(steps: Sequence[StepRecord], width: int, height: int) -> Content:
    """Each link: its history, bytes in the last step, bytes a second; the history takes the rows that are left."""
    rows: list[Content] = []
    share = max(height // len(LINKS), 1)
    tall = share - 1 if share > 2 else share
    for link in LINKS:
        label, colour, _ = LINK_LABELS[link]
        moved = steps[-1].traffic_bytes.get(link) if steps else None
        rate = steps[-1].bytes_per_second(link) if steps else None
        idle = not any(s.traffic_bytes.get(link) for s in steps)
        figures = (
            f"{UNKNOWN if moved is None else 'idle':>8}" if idle else f"{bytes_text(moved):>8} {rate_text(rate):>10}"
        )
        text = f"{label:<11} {figures} "
        first, *more = columns([s.traffic_bytes.get(link) for s in steps], width - len(text), tall)
        rows.append(Content.assemble((text, "$text-muted" if idle else ""), (first, f"{colour} 70%")))
        rows += [Content.assemble(" " * len(text), (row, f"{colour} 70%")) for row in more]
        rows += [Content("")] * (share - tall)
    return lines(rows)


def loss(curve: Curve, width: int, height: int) -> Content:
    """The loss of the whole run as a line, with a scale at the left and the steps below."""
    points = [(float(step), value) for step, value in curve.points]
    finite = [value for _, value in points if math.isfinite(value)]
    if not finite or height < 2 or width < 16:
        return Content.styled("waiting for the first step" if not points else "", "$text-muted").truncate(width)
    marks = ticks(min(finite), max(finite), max((height - 1) // 3 + 1, 3))
    texts = tick_texts(marks)
    margin = max(len(t) for t in texts)
    plot_height = height - 1
    picture = braille(points, width - margin - 2, plot_height, marks[0], marks[-1])
    labels: dict[int, str] = {}
    for value, text in zip(marks, texts, strict=True):
        labels[round((1 - (value - marks[0]) / (marks[-1] - marks[0])) * (plot_height - 1))] = text
    rows = [
        Content.assemble(
            (f"{labels.get(i, ''):>{margin}} ", "$text-muted"), ("┤" if i in labels else "│", "$rule"), (row, "$accent")
        )
        for i, row in enumerate(picture)
    ]
    first, last = f"{curve.points[0][0]:,}", f"{curve.points[-1][0]:,}"
    axis = spread(width - margin - 2, [(first, "$text-muted")], [(f"step {last}", "$text-muted")])
    return lines([*rows, Content.assemble(" " * (margin + 2), axis)])


def speed(view: RunView, width: int) -> Content:
    """Step time beside its prediction, tokens a second, gradient norm and learning rate, each with its history."""
    steps, last = view.steps, view.steps[-1] if view.steps else None
    predicted = view.run.predicted_step_seconds if view.run else None
    versus = ""
    if predicted:
        versus = fit(width - 24, f"predicted {seconds_text(predicted)}", f"({seconds_text(predicted)})")
    table: list[tuple[str, str, str, list[float | None]]] = [
        ("step time", seconds_text(last.seconds if last else None), versus, [s.seconds for s in steps]),
        (
            "tokens/s",
            f"{last.tokens_per_second:,.0f}" if last and last.tokens_per_second is not None else UNKNOWN,
            "",
            [s.tokens_per_second for s in steps],
        ),
        ("gradient norm", number_text(last.gradient_norm if last else None), "", [s.gradient_norm for s in steps]),
        ("learning rate", number_text(last.learning_rate if last else None), "", [s.learning_rate for s in steps]),
    ]
    rows = []
    # Graphs stand under each other; where there is no room beside the prediction, the first row has none.
    aside = width - 25 - len(versus) - 2 >= 8
    for label, value, beside, history in table:
        taken = len(versus) + 2 if versus and (aside or beside) else 0
        graph = columns(history, min(width - 25 - taken, 48))[0]
        wrong = value in ("nan", "inf", "-inf")
        row = Content.assemble(
            (f"{label:<13} ", "$text-muted"),
            (f"{value:>9}  ", "bold $danger" if wrong else "bold"),
            (f"{beside:<{taken}}" if taken else "", "$text-muted"),
            (graph if not beside or aside else "", "$accent 70%"),
        )
        rows.append(row.truncate(width))
    return lines(rows)


def notes(sentences: Sequence[Note], width: int, height: int) -> Content:
    """The last notes, newest below."""
    rows = [
        Content.assemble((f"{clock_text(n.seconds):>7}  ", "$text-muted"), n.message).truncate(width, ellipsis=True)
        for n in sentences[-height:]
    ]
    return lines(rows or [Content.styled("no notes", "$text-muted").truncate(width)])


def ending(end: End | None, leaving: bool) -> Content:
    """One line that says how the run ended."""
    if end is None:
        return Content("")
    sign, name = {"finished": ("✓", "good"), "failed": ("✗", "danger")}.get(end.reason, ("■", "warn"))
    where = f" at step {end.step:,}" if end.step is not None else ""
    words = f" {sign} {end.reason}{where}" + (f": {end.message}" if end.message else "")
    return Content.assemble((words, f"bold ${name}"), ("   leaving" if leaving else "   q leaves", "$text-muted"))
