"""The units strip: every unit of the model in forward order, where it lives, and what it is doing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from textual.content import Content

from tui.draw import LINK_LABELS, Span, lines
from tui.view import TIERS, Now, UnitInfo


@dataclass(frozen=True)
class Layout:
    """How units are laid out: in ``bands`` of ``per_band`` cells of ``cell`` characters, the gap counted in."""

    bands: int
    per_band: int
    cell: int


def layout(units: int, width: int) -> Layout:
    """The fewest bands with cells of two characters or more, as wide as fit up to twelve."""
    bands = max(math.ceil(units / max(width // 2, 1)), 1)
    per_band = max(math.ceil(units / bands), 1)
    return Layout(bands, per_band, min(max(width // per_band, 2), 12))


def strip_height(units: int, width: int) -> int:
    """Rows that ``strip`` needs: three a band, and one for what happens now."""
    return layout(units, width).bands * 3 + 1


def strip(units: Sequence[UnitInfo], now: Now, width: int) -> Content:
    """A band is three rows: what the unit does, its parameters' tier with its name, its optimizer state's tier."""
    if not units:
        return Content.styled("waiting for the run to start", "$text-muted")
    plan = layout(len(units), width)
    links = {flight.unit: flight.link for flight in now.in_flight}
    rows: list[Content] = []
    for start in range(0, len(units), plan.per_band):
        band = [_cell(unit, now.unit, links, plan.cell - 1) for unit in units[start : start + plan.per_band]]
        rows += [Content.assemble(*(part for span in row for part in (span, " "))) for row in zip(*band, strict=True)]
    return lines([*rows, _happening(now).truncate(width, ellipsis=True)])


def _cell(unit: UnitInfo, computing: str | None, links: Mapping[str, str], inner: int) -> tuple[Span, Span, Span]:
    """Mark, name on the parameters' colour, the optimizer's colour."""
    # In a row of blocks the last part of the dotted name is what differs.
    name = unit.name.rsplit(".", 1)[-1] or "root"
    label = (name if len(name) <= inner else "").center(inner)
    link = links.get(unit.name)
    _, colour, arrow = LINK_LABELS[link] if link else ("", "", " ")
    mark = arrow.center(inner), f"bold {colour}".strip()
    if unit.name == computing:
        mark = (f"▼{arrow}".strip().center(inner)[:inner], "bold $mark")
    ground = f"${unit.parameters}" if unit.parameters else "$track"
    below = f"${unit.optimizer}" if unit.optimizer else "$track"
    return mark, (label, "bold $ink on $mark" if unit.name == computing else f"$ink on {ground}"), ("▀" * inner, below)


def _happening(now: Now) -> Content:
    spans: list[Span] = [(f"{now.phase or 'idle':<9}", "$text-muted")]
    if now.unit is not None:
        spans += [("▼ ", "bold $mark"), (f"{now.unit or 'root'}  ", "bold")]
    for flight in now.in_flight:
        label, colour, arrow = LINK_LABELS[flight.link]
        spans += [(f"{arrow} ", f"bold {colour}"), (f"{flight.unit or 'root'} ", ""), (f"{label}  ", "$text-muted")]
    return Content.assemble(*spans)


def legend(width: int) -> Content:
    """What the colours and marks mean: the longest form that fits whole."""
    tiers: list[Span] = [part for tier in TIERS for part in (("■ ", f"${tier}"), (f"{tier}  ", "$text-muted"))]
    marks: list[Span] = [("▼ ", "$mark"), ("computing", "$text-muted")]
    for label, colour, arrow in LINK_LABELS.values():
        marks += [(f"  {arrow} ", colour), (label, "$text-muted")]
    rows: list[Span] = [("above parameters, below optimizer state  ", "$text-muted")]
    for spans in ([*rows, *tiers, *marks], [*tiers, *marks]):
        if sum(len(text) for text, _ in spans) <= width:
            return Content.assemble(*spans)
    return Content.assemble(*tiers).truncate(width)
