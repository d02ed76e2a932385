"""Events: what a run tells the world, as JSON lines in ``RUN/events.jsonl``; further ranks in ``events-RANK.jsonl``.

The run appends and never waits for a reader; dashboards and reports tail the file. Every line has ``event`` (its
kind) and ``time`` (seconds since the epoch). The kinds, in the order in which they appear:

``run``         once at the start, and again when a run is resumed:
                model, device, precision, parameters, pid, host, rank, ranks, session, first_step, last_step,
                micro_batch_size, gradient_accumulation_steps, budget_bytes{gpu,host,nvme},
                predicted_bytes{gpu,host,nvme}, predicted_step_seconds (or null), bottleneck (or null),
                units[{name, elements, parameters, gradients, optimizer}] in forward order (the last three are
                tiers)
``now``         at most ten times a second: step, phase (forward, backward, update), unit (the one that computes, or
                null), in_flight[{unit, link}] where link is host_to_device, device_to_host, nvme_read or nvme_write
``step``        after every optimizer step: step (from 1), loss, gradient_norm (or null), nonfinite_steps (of
                this run so far, with NaN or infinite gradients), skipped_steps (those of them that fp16's loss
                scale skipped), learning_rate, seconds, tokens,
                memory_bytes{gpu,host,nvme} held now, peak_bytes{gpu,host,nvme} so far,
                traffic_bytes{host_to_device, device_to_host, nvme_read, nvme_write} of this step, and of several
                ranks waited_seconds
``waiting``     of several ranks, once a second while this one waits: step, inside (a collective), seconds
``checkpoint``  step, path, seconds, bytes
``note``        message: something a person should know
``warning``     step, message: something went wrong, and training goes on
``end``         reason (finished, interrupted, failed), step, message, and of several ranks the rank to blame
"""

import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

NOW_SECONDS = 0.1
"""Shortest time between two ``now`` events."""
LINKS = ("host_to_device", "device_to_host", "nvme_read", "nvme_write")


class EventLog:
    """Appends events to a file, one whole line a write, from any thread.

    Where it can not, as on a full disk, that is a warning and training goes on: some later lines are written when
    there is room again, the others are lost.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+", buffering=1, encoding="utf-8")
        _end_broken_line(self._file)
        self._lock = threading.Lock()
        self._warned = False

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; a log that is closed ignores it, so late threads do no harm."""
        line = json.dumps({"event": event, "time": time.time(), **fields}, allow_nan=True) + "\n"
        with self._lock:
            if not self._file.closed:
                with self._surviving():
                    self._file.write(line)

    def close(self) -> None:
        """Close the file."""
        with self._lock, self._surviving():
            self._file.close()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                sentence = f"{self._file.name} lacks events from here on: {error.strerror}; training goes on"
                warnings.warn(sentence, RuntimeWarning, stacklevel=4)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _end_broken_line(file: TextIO) -> None:
    """A run that was killed may have left half a line; what comes must not continue it."""
    if (end := file.seek(0, 2)) > 0:
        file.seek(end - 1)
        if file.read(1) != "\n":
            file.write("\n")


class Pulse:
    """Tells what a run is doing, never more often than NOW_SECONDS."""

    def __init__(self, log: EventLog | None) -> None:
        self._log = log
        self._last = 0.0

    def tell(self, step: int, phase: str | None, unit: str, flights: Callable[[], list[dict[str, str]]]) -> None:
        """A unit begins to compute; ``flights`` are asked for only where they are told."""
        now = time.monotonic()
        if self._log is not None and now - self._last >= NOW_SECONDS:
            self._last = now
            self._log.write("now", step=step, phase=phase, unit=unit, in_flight=flights())
