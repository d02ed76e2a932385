"""Pure: where the ranks of a training are, and which of them keeps the others waiting.

[Note: who is to blame] in ``offload/watchdog.py``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

IN_A_STEP = ("gather", "reduce", "agreement", "loss")
"""Kinds in the order in which a step comes to them. While a device waits in a gather, its host goes on, and gives it
reductions that wait behind that: a rank is said to wait where it began to."""


@dataclass(frozen=True)
class Verdict:
    """Why the training ends."""

    rank: int | None
    """The one to blame; None where that is nobody."""
    sentence: str

    @classmethod
    def from_json(cls, text: str | bytes) -> "Verdict":
        """What was written."""
        data = json.loads(text)
        return cls(data["rank"], data["sentence"])


@dataclass(frozen=True)
class Entered:
    """How far a rank is with the collectives of one kind, which all ranks enter in one order."""

    count: int = 0
    what: str = ""
    """The last one."""
    waiting_seconds: float | None = None
    """Inside of it; None where it has left it."""


@dataclass(frozen=True)
class Standing:
    """What a rank says of itself."""

    host: str
    machine: str
    """Equal where processes see each other."""
    pid: int
    beat: int = 0
    left: bool = False
    """Whether it has ended well."""
    kinds: dict[str, Entered] = field(default_factory=dict)
    doing: str = ""
    """Where its main thread is, when it has entered nothing for long."""

    @classmethod
    def from_json(cls, text: bytes) -> "Standing":
        """What was written."""
        data = json.loads(text)
        return cls(**{**data, "kinds": {kind: Entered(**entered) for kind, entered in data["kinds"].items()}})


def name(rank: int, standing: Standing | None) -> str:
    """A rank, for people."""
    return f"rank {rank} ({standing.host})" if standing is not None else f"rank {rank}"


def blame(standings: Mapping[int, Standing], timeout_seconds: float) -> Verdict:
    """Of a training in which somebody waits too long: the rank that most others wait for, and where."""

    def waits(standing: Standing, kind: str) -> bool:
        seconds = standing.kinds.get(kind, Entered()).waiting_seconds
        return seconds is not None and seconds > timeout_seconds / 2

    kinds = sorted({kind for standing in standings.values() for kind in standing.kinds})
    found: list[tuple[int, int, int, str, list[int]]] = []
    for rank, standing in standings.items():
        if any(waits(standing, kind) for kind in kinds) and not standing.left:
            continue
        for kind in kinds:
            count = standing.kinds.get(kind, Entered()).count
            waiting = [r for r, s in standings.items() if waits(s, kind) and s.kinds[kind].count > count]
            place = IN_A_STEP.index(kind) if kind in IN_A_STEP else len(IN_A_STEP)
            found.append((len(waiting), -rank, -place, kind, waiting))
    many, negative, _, kind, waiting = max(found, default=(0, 0, 0, "", []))
    if not many:
        places = {e.what for s in standings.values() for k, e in s.kinds.items() if waits(s, k)}
        where = " and ".join(f"'{place}'" for place in sorted(places))
        return Verdict(
            None, f"all ranks wait in {where} for {timeout_seconds:.0f} s: nothing comes through between them"
        )
    rank = -negative
    seconds = max(standings[r].kinds[kind].waiting_seconds or 0.0 for r in waiting)
    # The first one that it has not entered is what somebody who is just one ahead is in.
    nearest = min(waiting, key=lambda r: standings[r].kinds[kind].count)
    what, said = standings[nearest].kinds[kind].what, name(rank, standings[rank])
    who = f"rank {waiting[0]} waits" if many == 1 else f"ranks {', '.join(map(str, waiting))} wait"
    if standings[rank].left:
        return Verdict(rank, f"{said} has ended its training, and {who} for it in '{what}'")
    doing = f"; it is at {standings[rank].doing}" if standings[rank].doing else ""
    return Verdict(rank, f"{said} has not entered '{what}' for {seconds:.0f} s, where {who}{doing}")
