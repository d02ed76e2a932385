"""A profile as text for a terminal: the layers at a depth, the totals, the peaks and what they are made of."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memplan import profile_words as words
from memplan.formatting import format_bytes
from memplan.rows import Row, fold
from profiler.profile import ModelProfile

CONTENTS_SHOWN = 8
LABEL_SHARE, LEAST_LABEL = 0.6, 12
"""Of the characters for labels and types, how many labels get that need them."""
LEAST_NAMES = 32
"""With less than that for both, another column of figures is left out."""


def profile_tables(profile: ModelProfile, depth: int | None = None) -> RenderableType:
    """Everything; ``depth`` levels of layers, by default as many as fit a screen."""
    root = fold(profile.layers)
    chosen = root.fitting_depth() if depth is None else depth
    parts: list[RenderableType] = [Text(words.headline(profile), style="bold"), _LayerTable(root, chosen)]
    if hidden := sum(1 for _ in root.walk()) - sum(1 for _ in root.walk(chosen)):
        rows = "row" if hidden == 1 else "rows"
        parts.append(Text(f" {hidden} more {rows} below: --depth {root.height} shows all", style="dim"))
    blocks = [_totals(profile), _peaks(profile), *_contents(profile)]
    for block in blocks:
        parts += [Text(), block]
    return Group(*parts, *_remarks(profile))


@dataclass(frozen=True)
class _LayerTable:
    """One row a layer. In a narrow terminal bytes moved, intensity and parts of the names give way, no other figure."""

    root: Row
    depth: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = list(self.root.walk(self.depth))
        columns = words.layer_columns(rows)
        names = _names(rows, indent=2)
        if _width(columns) + _width(names) > options.max_width:
            columns = [column for column in columns if column[0] != "moved"]
            if options.max_width - _width(columns) < LEAST_NAMES:
                columns = [column for column in columns if column[0] != "FLOP/\nbyte"]
            names = _fitted(rows, options.max_width - _width(columns))
        room = options.max_width - _width(names + columns)
        apart = int(room >= len(names + columns))  # beside the one character that rich puts between columns
        table = Table(box=SIMPLE_HEAD, padding=(0, apart, 0, 0), pad_edge=False, show_edge=False)
        for head, _ in names:
            table.add_column(head, no_wrap=True)
        for head, _ in columns:
            table.add_column(head, justify="right", no_wrap=True)
        for at, cells in enumerate(zip(*(cells for _, cells in names + columns), strict=True)):
            table.add_row(*cells, style="bold" if at == 0 else "")
        yield Text()
        yield table


def _width(columns: Iterable[tuple[str, list[str]]]) -> int:
    """Characters of the columns, with one between each."""
    return sum(1 + max(len(text) for text in (*head.split("\n"), *cells)) for head, cells in columns)


def _names(rows: words.Levels, indent: int) -> list[tuple[str, list[str]]]:
    labels = [" " * indent * level + row.label for level, row in rows]
    return [("layer", labels), ("type", [row.type + row.times for _, row in rows])]


def _fitted(rows: words.Levels, room: int) -> list[tuple[str, list[str]]]:
    """The names' columns in as many characters: closer together, and then shortened."""
    for indent in (2, 1):
        names = _names(rows, indent)
        if _width(names) <= room:
            return names
    wanted_label, wanted_type = (_width([column]) - 1 for column in names)
    label_width = min(wanted_label, max(room - 2 - wanted_type, int(room * LABEL_SHARE), LEAST_LABEL))
    type_width = room - 2 - label_width
    types = [_without_start(row.type, type_width - len(row.times)) + row.times for _, row in rows]
    labels = [" " * level + _without_end(row.label, label_width - level) for level, row in rows]
    return [("layer", labels), ("type", types)]


def _without_start(text: str, width: int) -> str:
    """A class's name ends in what it is: ``…DecoderLayer``, cut before a word where there is one."""
    if len(text) <= width:
        return text
    kept = text[len(text) - max(width, 2) + 1 :]
    word = re.search(r"[A-Z][a-z]", kept)
    return "…" + (kept[word.start() :] if word else kept)


def _without_end(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width, 2) - 1] + "…"


def _totals(profile: ModelProfile) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, figure in words.totals(profile):
        table.add_row(f" {name}", figure)
    return table


def _peaks(profile: ModelProfile) -> Table:
    """Peaks by phase, the largest marked; the first step beside the others where it differs."""
    steady, first = profile.peaks.by_phase, profile.first_peaks.by_phase
    both = first != steady
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(" peak memory of a step")
    for name in ("every step", "first step")[: 2 if both else 1]:
        table.add_column(name, justify="right")
    table.add_column()
    for phase, size in steady.items():
        highest = phase == profile.peaks.phase
        sizes = [format_bytes(size), *([format_bytes(first[phase]) if phase in first else ""] if both else [])]
        row = (f" {words.phase_name(profile, phase)}", *sizes, "◀ peak" if highest else "")
        table.add_row(*row, style="bold" if highest else "")
    table.add_section()
    for name, size in words.reserves(profile):
        table.add_row(f" {name}", format_bytes(size))
    return table


def _contents(profile: ModelProfile) -> Iterable[RenderableType]:
    found = words.contents(profile.peak_contents)
    if not found:
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for content in found[:CONTENTS_SHOWN]:
        table.add_row(f" {format_bytes(content.bytes)}", f"{content.share:.0%}", content.words)
    if rest := found[CONTENTS_SHOWN:]:
        size, share = sum(c.bytes for c in rest), sum(c.share for c in rest)
        table.add_row(f" {format_bytes(size)}", f"{share:.0%}", f"{len(rest)} smaller ones")
    yield Group(Text(f" what the peak in {profile.peaks.phase} is made of", style="bold"), table)


def _remarks(profile: ModelProfile) -> Iterable[RenderableType]:
    if sentence := words.uncounted(profile):
        yield Text()
        yield Padding(Text(sentence, style="dim"), (0, 0, 0, 1), expand=False)
    for warning in words.warnings(profile):
        yield Padding(Text(warning, style="yellow"), (0, 0, 0, 1), expand=False)
