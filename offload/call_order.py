"""CallOrder: which units are over in backward, told by those that were called before them in forward.

[Note: backward goes back]
Of the nodes that are ready autograd runs the one that was made last, so when it runs one, all that were made after it
have run. A unit whose first call began after another's call had ended is over once the backward of that other call
begins, whichever of its parameters got a gradient. What runs in a backward of its own inside of this one (reentrant
checkpoints) is called without gradients in forward, and nothing is said of it.
"""


class CallOrder:
    """Of one forward pass and the backward that follows."""

    def __init__(self) -> None:
        self._begun = self._before = 0
        """Calls since the start, and how many of them were before this pass."""
        self._first: dict[str, int] = {}
        """Of every unit of this pass that is not known to be over, in order."""

    def begin_pass(self) -> None:
        """A forward pass begins."""
        self._before = self._begun
        self._first.clear()

    def called(self, name: str) -> None:
        """The unit is called, and what it computes has a backward."""
        self._first.setdefault(name, self._begun)
        self._begun += 1

    def ended(self) -> int:
        """A call has ended; the number by which ``over`` knows it."""
        return self._begun

    def over(self, call: int) -> list[str]:
        """The backward of a call begins: the units that are over by that and were not before, the last called first."""
        found: list[str] = []
        if call > self._before:  # else it is a call of an earlier pass, whose units have other places in this one
            while self._first and next(reversed(self._first.values())) >= call:
                found.append(self._first.popitem()[0])
        return found
