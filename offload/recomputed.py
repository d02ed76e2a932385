"""RecomputedCalls: how many calls of a unit have a backward to come that needs the weights where they are now.

[Note: weights of a recompute]
What a recompute saves goes through no hook of the engine, so it is the weights themselves, in their slot. A model's own
checkpoint may run a unit several times before the backward of any of these calls, and the end of the first says nothing
about the others: the unit must stay in use until all are over. A call that has begun its backward and runs again for it
(recompute by unit, or a checkpoint inside of another) is counted once.
"""

from collections import Counter


class RecomputedCalls:
    """Of one backward pass."""

    def __init__(self) -> None:
        self._to_come: Counter[str] = Counter()
        self._begun: dict[str, bool] = {}
        """Units in the backward of a call, and whether that call has run again for it."""

    def begin_pass(self) -> None:
        """A backward pass begins."""
        self._to_come.clear()
        self._begun.clear()

    def begin_backward(self, name: str) -> None:
        """The backward of a call of this unit begins."""
        if name not in self._begun:
            self._begun[name] = False
            self._to_come[name] = max(1, self._to_come[name])

    def called(self, name: str) -> None:
        """The unit is called in backward, and what it computes has a backward, too."""
        if self._begun.get(name) is False:
            self._begun[name] = True
        else:
            self._to_come[name] += 1

    def end_backward(self, name: str) -> bool:
        """The backward of one call is over. Whether that of all calls is."""
        self._begun.pop(name, None)
        self._to_come[name] -= 1
        if self._to_come[name] > 0:
            return False
        self.forget(name)
        return True

    def forget(self, name: str) -> None:
        """Nothing more comes of this unit."""
        self._begun.pop(name, None)
        self._to_come.pop(name, None)
