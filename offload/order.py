"""Pure: whether ranks entered the same collectives, unit by unit, which no collective tells by itself.

[Note: units in another order]
A gather has no name on the wire. Where ranks use units of one size in different orders, each gets the other unit's
weights, and everything goes on with wrong numbers. So every rank keeps a digest of the units whose collectives it has
submitted, by kind and in order, and the ranks that do them together compare these once a step, in what they exchange
before its update anyway. Only where digests differ do they tell each other the names: a rank that is merely ahead, by
a fetch that others have yet to begin, is right so far, and its rest is compared with the next step's.
"""

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

KEPT = 65536
"""Names that a rank keeps of a kind: between steps there may be evaluations of any length."""
DIGEST_BYTES = 4
_VERBS = {"gather": "gathers", "reduce": "reduces"}


@dataclass(frozen=True)
class Entered:
    """The collectives of one kind that one rank has submitted since ranks last compared them."""

    first: int
    """The number of the first whose name is kept."""
    names: list[str]


@dataclass(eq=False)
class Order:
    """What this rank has submitted since then. The lane of a kind does its collectives in the order of submission."""

    _names: dict[str, deque[str]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _digests: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, unit: str) -> None:
        """A collective of this kind was submitted for this unit."""
        if kind not in self._names:
            self._names[kind], self._counts[kind] = deque(maxlen=KEPT), 0
        self._names[kind].append(unit)
        self._counts[kind] += 1
        # With its end, as "h.1" and "1" would else be "h." and "11".
        self._digests[kind] = zlib.crc32(f"{unit}\n".encode(), self._digests.get(kind, 0))

    def digest(self) -> bytes:
        """Equal where ranks have submitted the same."""
        kinds = sorted(self._digests.items())
        return zlib.crc32(repr(kinds).encode()).to_bytes(DIGEST_BYTES, "big")

    def clear(self) -> None:
        """All ranks have submitted the same."""
        for held in (self._names, self._counts, self._digests):
            held.clear()

    def told(self) -> dict[str, Entered]:
        """For the other ranks, by kind."""
        return {kind: Entered(self._counts[kind] - len(names), list(names)) for kind, names in self._names.items()}

    def drop(self, counts: Mapping[str, int]) -> None:
        """All ranks have submitted the same, as far as these numbers of them by kind."""
        rest = {kind: list(islice(names, self._until(kind, counts), None)) for kind, names in self._names.items()}
        self.clear()
        for kind, names in rest.items():
            for name in names:
                self.add(kind, name)

    def _until(self, kind: str, counts: Mapping[str, int]) -> int:
        return max(0, counts.get(kind, 0) - (self._counts[kind] - len(self._names[kind])))


def encoded(digest: bytes, group: int, groups: int) -> list[int]:
    """The digest of one of several groups, so that the greatest of each number over all ranks tells who differs.

    A byte and what it lacks of 255 sum to 255 only where all of the group have the same one.
    """
    size = 2 * DIGEST_BYTES
    found = [0] * (size * groups)
    found[group * size : (group + 1) * size] = [*digest, *(255 - byte for byte in digest)]
    return found


def all_equal(greatest: Sequence[int]) -> bool:
    """Whether in every group all ranks have one digest."""
    size = 2 * DIGEST_BYTES
    starts = (s + i for s in range(0, len(greatest), size) for i in range(DIGEST_BYTES))
    return all(greatest[i] + greatest[i + DIGEST_BYTES] == 255 for i in starts)


def common(told: Sequence[Mapping[str, Entered]]) -> dict[str, int]:
    """How many collectives of each kind all of these ranks have submitted."""
    kinds = sorted({kind for said in told for kind in said})
    return {kind: min(s[kind].first + len(s[kind].names) if kind in s else 0 for s in told) for kind in kinds}


def difference(told: Mapping[int, Mapping[str, Entered]]) -> str | None:
    """The first one that differs between ranks, by rank, in words; None where some are only ahead of others."""
    ranks = sorted(told)
    for kind, count in common(list(told.values())).items():
        if not count:
            continue
        said = {rank: told[rank][kind] for rank in ranks}
        for i in range(max(entered.first for entered in said.values()), count):
            names = {rank: entered.names[i - entered.first] for rank, entered in said.items()}
            other = next((rank for rank in ranks if names[rank] != names[ranks[0]]), None)
            if other is not None:
                here, there = (names[rank] or "the root unit" for rank in (ranks[0], other))
                verb = _VERBS.get(kind, kind)
                return f"rank {ranks[0]} {verb} {here} where rank {other} {verb} {there}"
    return None
