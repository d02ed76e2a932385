"""Where events come from: a file that is read while the run is still writing it."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
"""Of the first rank; the others' are beside it."""
RANK_EVENTS = re.compile(r"events-(\d+)\.jsonl")
PLAN = "plan.json"


class Tail:
    """Reads the whole lines that were appended since the last time.

    The file may not exist yet; its last line may be half written (it is read when it is whole); when the file was
    cut short or replaced, reading starts over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode: int | None = None

    def poll(self) -> Iterator[dict[str, Any]]:
        """Yield the events that are new; lines that are not events are passed over. Raises OSError."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self._inode, self._offset = stat.st_ino, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                event = _parsed(line)
                if event is not None:
                    yield event


class RankTails:
    """The same of all ranks of a run; files may come later, and what is not the first rank's may be unreadable."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._tails: dict[int, Tail] = {0: Tail(run_dir / EVENTS)}

    def poll(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (rank, event) of what is new, rank by rank. Raises OSError where the first rank's can not be read."""
        for path in self._run_dir.glob("events-*.jsonl"):
            if found := RANK_EVENTS.fullmatch(path.name):
                self._tails.setdefault(int(found[1]), Tail(path))
        for rank, tail in sorted(self._tails.items()):
            try:
                for event in tail.poll():
                    yield rank, event
            except OSError:
                if rank == 0:
                    raise


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
