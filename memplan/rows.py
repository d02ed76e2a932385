"""The layers of a profile as a tree to read: equal siblings are one row, and what costs nothing is left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from profiler.profile import LayerProfile

SUMS = (
    *("parameters", "parameter_bytes", "forward_flops", "backward_flops", "recompute_flops"),
    *("activation_bytes", "moved_bytes"),
)
"""Figures of a layer that add up, over equal ones and from children to parents."""
MODEL = "(model)"
SCREEN_ROWS = 30
RANGES_SHOWN = 2
LEAST_MOVED = 0.001
"""Share of the model's: a layer that does nothing but move less is left out."""


@dataclass(frozen=True)
class Row:
    """A layer, or several alike; the figures are of all of them together."""

    label: str
    """Its name below the row above, like ``attention`` or ``blocks.0-5``."""
    alike: tuple[LayerProfile, ...]
    below: tuple["Row", ...]

    @property
    def type(self) -> str:
        """Their class."""
        return self.alike[0].type

    @property
    def times(self) -> str:
        """`` x 6`` where it stands for several."""
        return f" x {len(self.alike)}" if len(self.alike) > 1 else ""

    def total(self, figure: str) -> int:
        """Sum of one of ``SUMS``."""
        return sum(getattr(layer, figure) for layer in self.alike)

    def own(self, figure: str) -> int:
        """What of it is not in the rows below."""
        return self.total(figure) - sum(row.total(figure) for row in self.below)

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.total("forward_flops") + self.total("backward_flops")

    @property
    def transient_bytes(self) -> int:
        """The most that one of them held for a moment: they run one after the other."""
        return max(layer.transient_bytes for layer in self.alike)

    @property
    def intensity(self) -> float | None:
        """FLOPs for each byte that is read or written."""
        moved = self.total("moved_bytes")
        return self.flops / moved if moved else None

    @property
    def seconds(self) -> float | None:
        """Forward and backward, where they are known."""
        known = [layer.seconds for layer in self.alike if layer.seconds is not None]
        return sum(known) if known else None

    @cached_property
    def height(self) -> int:
        """Levels below it."""
        return 1 + max(row.height for row in self.below) if self.below else 0

    def walk(self, depth: int | None = None, at: int = 0) -> Iterator[tuple[int, "Row"]]:
        """It and the rows below with their levels, down to ``depth``."""
        yield at, self
        if depth is None or at < depth:
            for row in self.below:
                yield from row.walk(depth, at + 1)

    def fitting_depth(self, rows: int = SCREEN_ROWS) -> int:
        """The deepest level that does not make more rows than that; at least 1."""
        depth = 1
        while depth < self.height and sum(1 for _ in self.walk(depth + 1)) <= rows:
            depth += 1
        return depth


def fold(layers: Sequence[LayerProfile]) -> Row:
    """The tree of the layers, the model's own row at its root."""
    return _Folding(layers).row((layers[0],), MODEL)


class _Folding:
    """The layers by parent, and what two must share to count as equal."""

    def __init__(self, layers: Sequence[LayerProfile]) -> None:
        self.children: dict[str, list[LayerProfile]] = {}
        for layer in layers[1:]:
            self.children.setdefault(layer.path.rpartition(".")[0], []).append(layer)
        self.moved_bytes = layers[0].moved_bytes
        self.shapes: dict[str, int] = {}
        known: dict[object, int] = {}
        for layer in sorted(layers, key=lambda each: -each.path.count(".")):
            # What they save is left out: the first of equal blocks also saves what it shares with the others.
            below = self.children.get(layer.path, ()) if layer.path else ()
            shape = (
                *(layer.type, layer.parameters, layer.forward_flops, layer.backward_flops),
                *((_name(child), self.shapes[child.path]) for child in below),
            )
            self.shapes[layer.path] = known.setdefault(shape, len(known))

    def row(self, alike: tuple[LayerProfile, ...], label: str) -> Row:
        """The row of equal layers, with all below it."""
        below = [self.children.get(layer.path, []) for layer in alike]
        rows: list[Row] = []
        for positions in self._groups(below[0]):
            members = tuple(each[i] for each in below for i in positions)
            row = self.row(members, _label([_name(below[0][i]) for i in positions]))
            if self._costs(row):
                rows += self._without_container(row)
        return Row(label, alike, tuple(rows))

    def _groups(self, siblings: list[LayerProfile]) -> list[list[int]]:
        """Positions of equal siblings: anywhere in a numbered list, so that alternating ones fold; else adjacent."""
        if all(_name(layer).isdigit() for layer in siblings):
            groups: dict[int, list[int]] = {}
            for position, layer in enumerate(siblings):
                groups.setdefault(self.shapes[layer.path], []).append(position)
            return list(groups.values())
        runs = groupby(range(len(siblings)), key=lambda position: self.shapes[siblings[position].path])
        return [list(run) for _, run in runs]

    def _costs(self, row: Row) -> bool:
        """Whether there is anything to say about it."""
        figures = (row.total("parameters"), row.flops, row.total("activation_bytes"), row.transient_bytes)
        return any(figures) or row.total("moved_bytes") > self.moved_bytes * LEAST_MOVED

    @staticmethod
    def _without_container(row: Row) -> list[Row]:
        """A ModuleList, which is never called and only holds others, gives its place to them."""
        if row.alike[0].order is not None or not row.below or any(row.own(figure) for figure in SUMS):
            return [row]
        return [replace(below, label=f"{row.label}.{below.label}") for below in row.below]


def _name(layer: LayerProfile) -> str:
    return layer.path.rpartition(".")[2]


def _label(names: Sequence[str]) -> str:
    """``0-5`` or ``0, 2 … 10`` for numbers, ``k_proj, v_proj`` or ``q_proj … v_proj`` for names."""
    numbered = all(name.isdigit() for name in names)
    if numbered:
        ranges = _ranges([int(name) for name in names])
        parts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    else:
        parts = list(names)
    if len(parts) <= RANGES_SHOWN:
        return ", ".join(parts)
    return f"{', '.join(parts[:RANGES_SHOWN]) if numbered else parts[0]} … {parts[-1]}"


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    runs = groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    found = [[number for _, number in run] for _, run in runs]
    return [(run[0], run[-1]) for run in found]
