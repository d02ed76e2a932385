"""CallOrder: which units are over in backward, told by those that were called before them in forward.

[Note: backward goes back]
Of the nodes that are ready autograd runs the one that was made last, so when it runs one, all that were made after it
have run. A unit whose first call began after another's call had ended is over once the backward of that other call
begins, whichever of its parameters got a gradient; and so is a call of a unit whose first is still to come. What runs
in a backward of its own inside of this one (reentrant checkpoints) is called without gradients in forward. Its calls
have numbers as all others, but when a unit of them is over for good is not said.
"""

from typing import NamedTuple


class Call(NamedTuple):
    """One call of a unit."""

    before: int
    """Calls that had begun when it began."""
    by_its_end: int
    """Calls that had begun when it ended."""
    told: bool
    """Whether its inputs, or its unit's last gradient, tell the end of its backward."""


class CallOrder:
    """Of one forward pass and the backward that follows."""

    def __init__(self) -> None:
        self._begun = self._before = 0
        """Calls since the start, and how many of them were before this pass."""
        self._first: dict[str, int] = {}
        """Of every unit of this pass that is not known to be over, in order."""
        self._open: dict[int, str] = {}
        """Units of calls whose backward has begun and whose end nobody else tells, by ``Call.before``."""

    def begin_pass(self) -> None:
        """A forward pass begins."""
        self._before = self._begun
        self._first.clear()

    def begin_backward(self) -> None:
        """A backward begins."""
        self._open.clear()

    def called(self, name: str) -> int:
        """The unit is called, and what it computes has a backward. How many calls were before."""
        self._first.setdefault(name, self._begun)
        return self.called_again()

    def called_again(self) -> int:
        """A unit is called in backward. How many calls were before."""
        self._begun += 1
        return self._begun - 1

    def ended(self) -> int:
        """A call has ended; the number by which ``over`` knows it."""
        return self._begun

    def opened(self, name: str, call: Call) -> None:
        """The backward of this call begins."""
        if not call.told:
            self._open[call.before] = name

    def is_open(self, name: str) -> bool:
        """Whether ``passed`` will tell of a call of this unit."""
        return name in self._open.values()

    def passed(self, call: Call) -> list[str]:
        """The backward of a call begins: the units of open calls whose backward is over by that, the last first."""
        over = sorted((before for before in self._open if before >= call.by_its_end), reverse=True)
        return [self._open.pop(before) for before in over]

    def over(self, call: int) -> list[str]:
        """The backward of a call begins: the units that are over by that and were not before, the last called first."""
        found: list[str] = []
        if call > self._before:  # else it is a call of an earlier pass, whose units have other places in this one
            while self._first and next(reversed(self._first.values())) >= call:
                found.append(self._first.popitem()[0])
        return found
