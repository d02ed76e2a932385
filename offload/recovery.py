"""Recovery: what of an engine's work an exception cut short is begun anew, or refused where numbers are half changed.

[Note: work that was cut short]
An exception may come at any line: Ctrl-C, memory that runs out, a disk. What passes leave in between, slots and what is
on its way to them, says nothing true then. So whoever works says so before, and that it is over behind its last line,
in plain flags: whatever came between finds them set. Before the next work all lanes are waited for, every slot is
empty, and every parameter shows what its tiers hold. A forward pass costs no gradient: those of earlier micro-batches
stay. A backward pass may have been adding to them, so they are forgotten, as by ``zero_grad``.

[Note: half done]
An update changes the tiers themselves, unit by unit, and so does who loads numbers. Where that was cut short nobody can
say what was changed already, so all is refused until other numbers take the place of all of them.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from offload.errors import OffloadError, RankLost
from offload.memory import MemoryMeter
from offload.plan import Plan
from offload.shortage import HALF_DONE, shortage
from offload.store import Store
from offload.streams import Lane
from offload.update_in_backward import UpdateInBackward

WEIGHTS, GRADIENTS = 1, 2
"""What work may leave behind that is not true: of a forward pass, and of a backward pass beside it."""


class Part(Protocol):
    """Something that has a place in a pass."""

    def begin_anew(self) -> None:
        """Be as before the first pass, but for what was learned; nothing is under way on any lane."""


class Steps(Protocol):
    """What begins updates."""

    early: UpdateInBackward

    def forget(self) -> None:
        """What became of the last step does not matter any more."""


class _Work:
    """While it goes on, and after it was cut short, what it leaves behind is not true."""

    def __init__(self, recovery: "Recovery", leaves: int) -> None:
        self._recovery, self._leaves = recovery, leaves

    def __enter__(self) -> None:
        r = self._recovery
        self._before = r.cut_short, r.live
        r.cut_short, r.live = max(r.cut_short, self._leaves), True

    def __exit__(self, kind: object, *_: object) -> None:
        r, (cut_short, live) = self._recovery, self._before
        r.cut_short, r.live = cut_short if kind is None else r.cut_short, live
        r.told |= kind is not None and r.cause is not None


class _Change:
    """While it goes on, and after it was cut short, numbers are half changed."""

    def __init__(self, recovery: "Recovery", sentence: str, *, may_fail: bool) -> None:
        self._recovery, self._cause, self._may_fail = recovery, OffloadError(sentence), may_fail

    def __enter__(self) -> None:
        if self._recovery.cause is None:  # else a lane has found one
            self._recovery.cause = self._cause

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not (self._may_fail and issubclass(kind, Exception)):
            self._recovery.told = True
        elif self._recovery.cause is self._cause:
            self._recovery.cause = None


class Recovery:
    """Knows what was cut short, and what is wrong with numbers.

    ``lanes`` are those that move numbers. The first of the ``parts`` watches passes; ``gradients`` is the one that a
    forward pass leaves alone, and ``forget`` begins the micro-batches of a step anew.
    """

    def __init__(
        self,
        plan: Plan,
        meter: MemoryMeter,
        lanes: Sequence[Lane],
        store: Store | None,
        parts: Sequence[Part],
        gradients: Part,
        forget: Callable[[], None],
    ) -> None:
        self._plan, self._meter, self._lanes, self._store = plan, meter, tuple(lanes), store
        self._parts, self._gradients, self._forget = list(parts), [gradients], forget
        self.steps: Steps | None = None
        self.cut_short = 0
        self.live = False
        """Whether a pass of the engine's own goes on."""
        self.cause: OffloadError | None = None
        """Why numbers are half changed: [Note: half done]."""
        self.told = False
        """Whether somebody got that error."""

    def join(self, part: Part) -> None:
        """One part more."""
        self._parts.append(part)

    def close(self) -> None:
        """Lead to nothing with buffers in it any more."""
        self._parts.clear()
        self._gradients.clear()
        self.steps = None

    # Work that was cut short

    def work(self, leaves: int = WEIGHTS) -> _Work:
        """A context of what must come to its end; inside of a pass it is a part of that."""
        self.settle()
        return _Work(self, leaves)

    def passing(self, leaves: int = WEIGHTS) -> _Work:
        """A context of a pass of the engine's own, which is inside of no other. Raises OffloadError."""
        self.live = False
        self.check()
        return _Work(self, leaves)

    def alone(self) -> _Work:
        """A context of a use of weights outside of all passes. Raises OffloadError."""
        self.check_whole()
        return _Work(self, WEIGHTS)

    def settle(self) -> None:
        """Begin anew what was cut short."""
        if self.cut_short and not self.live:
            self._begin_anew()

    def stop_watching(self) -> None:
        """A pass has failed: operations are the engine's own now."""
        self._parts[0].begin_anew()

    def _begin_anew(self) -> None:
        for lane in self._lanes * 2:  # what jobs of one gave another in the first round is over after the second
            lane.settle()
        if self._store is not None:
            self._store.settle()
        for part in self._parts:
            part.begin_anew()
        if self.cut_short == GRADIENTS:
            for part in self._gradients:
                part.begin_anew()
            self._forget()
        self.cut_short = 0

    # Numbers that are half changed

    def check(self) -> None:
        """Raise OffloadError where numbers are of no step ([Note: half done]), or will be until ``step``."""
        self.check_whole()
        if self.steps is not None:
            self.steps.early.check()

    def check_whole(self) -> None:
        """Raise OffloadError where numbers are of no step: [Note: half done]."""
        self.settle()
        if self.cause is not None:
            self.told = True
            raise type(self.cause)(str(self.cause)) from self.cause.__cause__
        if self.steps is not None and self.steps.early.failed:
            self.steps.early.check()

    def telling(self, settle: Callable[[], None]) -> None:
        """Wait for updates; what went wrong in one is known to somebody then."""
        try:
            settle()
        except OffloadError:
            self.told = True
            raise

    @property
    def known(self) -> bool:
        """Whether somebody knows that numbers are half changed."""
        return self.half_done and (self.told or self.cause is None)

    def behind(self, error: BaseException) -> OffloadError | None:
        """The error for a person, where a pass waited for an update that failed."""
        told = self.cause is None or not isinstance(error, OffloadError) or str(error) == str(self.cause)
        return None if told else self.cause

    @property
    def half_done(self) -> bool:
        """Whether they are known to be."""
        return self.cause is not None or (self.steps is not None and self.steps.early.failed)

    def changing(self, sentence: str, *, may_fail: bool = False) -> _Change:
        """A context in which numbers are changed that belong together; the sentence is for who goes on with half.

        Where it ``may_fail``, an error is one of code that is not the engine's, and only an interrupt cuts it short.
        """
        return _Change(self, sentence, may_fail=may_fail)

    def failed(self, error: BaseException, unit: str | None = None) -> BaseException:
        """An update failed, of this unit where that is known: the error for a person. From any thread."""
        if isinstance(error, RankLost):
            return error
        if isinstance(error, OffloadError) and HALF_DONE in str(error):
            self.cause = error
            return error
        where = (
            "the update" if unit is None else f"the update of unit {unit}" if unit else "the update of the root unit"
        )
        made: OffloadError
        if isinstance(error, torch.OutOfMemoryError):
            made = shortage(error, self._plan, where, self._meter.now_bytes()["gpu"], half_done=True)
        else:
            said = str(error) if isinstance(error, OffloadError) else f"{type(error).__name__}: {error}"
            kind = type(error) if isinstance(error, OffloadError) else OffloadError
            made = kind(f"{where} failed: {said}. {HALF_DONE}")
        # [Note: memory of a failed pass]
        error.add_note("".join(["It was raised here:\n", *traceback.format_tb(error.__traceback__)]))
        made.__cause__ = error.with_traceback(None)
        self.cause = made
        return made

    @contextmanager
    def loading(self, finish: Callable[[], None], *, everything: bool = True) -> Iterator[bool]:
        """Other numbers are put in the place of these, inside; ``finish`` waits for what is under way.

        Where they take the place of ``everything`` it does not matter what became of the last update. Gives whether
        it was half done.
        """
        if not (everything and self.half_done):
            try:
                finish()
            except OffloadError:
                if not (everything and self.half_done):
                    raise
        if half_done := self.half_done:
            self.live = False
            self._begin_anew()
        self.cause = OffloadError("other numbers were not loaded to the end: load a checkpoint")
        yield half_done
        if everything and self.steps is not None:
            self.steps.forget()
            self.steps.early.restored()
        self.cause, self.told = None, False
