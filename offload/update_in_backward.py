"""Updates that begin in backward, each when its unit's gradient is there and nobody uses its weights any more.

[Note: half a step]
From the first such update until ``step`` the model is half a step ahead of itself. Nobody may compute with it or save
it then; and if ``step`` never comes, because backward failed or its gradients were forgotten, only a checkpoint helps.

[Note: when a unit is over]
A gradient is complete when every parameter has its own; but a node of the graph that needs the weights for the gradient
of an input may still be to come. So a unit is over when the backward of each of its calls has passed, too. One of whose
calls that is never told (it had no part in the loss), like the root unit, is updated in ``step``.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from offload.errors import OffloadError
from offload.gradients import GradientCollector
from offload.plan import Plan, Precision
from offload.state import UnitState


def check_early_updates(plan: Plan, max_norm: float | None) -> None:
    """Raise OffloadError where updates can not begin in backward."""
    if plan.gpus > 1:
        raise OffloadError("with several ranks updates can not begin in backward yet: leave update_in_backward out")
    if max_norm is not None or plan.precision is Precision.FP16:
        why = "clipping" if max_norm is not None else "the loss scale of fp16"
        raise OffloadError(f"{why} needs all gradients before the first update: leave update_in_backward out")


class UpdateInBackward:
    """Begins updates as units are over; ``begin`` does it for a state."""

    def __init__(
        self, states: Sequence[UnitState], gradients: GradientCollector, begin: Callable[[UnitState], None]
    ) -> None:
        self._states = {s.unit.name: s for s in states}
        self._gradients, self._begin = gradients, begin
        self._begun: set[str] = set()
        self._calls: Counter[str] = Counter()
        """Calls of a unit whose backward has not passed."""
        self.failed = False
        """Whether the step that was begun can not be completed: [Note: half a step]."""

    def called(self, name: str) -> None:
        """A unit computes; ``passed`` will tell when the backward of this call is over."""
        self._calls[name] += 1

    def passed(self, name: str) -> None:
        """The backward of one call of a unit is over."""
        self._calls[name] -= 1
        self.complete(name)

    def complete(self, name: str) -> None:
        """Begin its update if all gradients of a unit are there and it is over."""
        if name and name not in self._begun and self._calls[name] <= 0 and self._gradients.taken(name):
            self._begun.add(name)
            self._begin(self._states[name])

    def rest(self) -> list[UnitState]:
        """The units whose update has not begun: the step takes them, and the next one begins."""
        rest = [state for name, state in self._states.items() if name not in self._begun]
        self._begun.clear()
        self._calls.clear()
        return rest

    def forget(self) -> None:
        """The gradients since the last step are forgotten."""
        self.failed |= bool(self._begun)
        self._calls.clear()

    def restored(self) -> None:
        """Whole numbers were put in the place of all units'."""
        self._begun.clear()
        self.failed = False

    def check(self) -> None:
        """Raise OffloadError while the model is half a step ahead ([Note: half a step])."""
        if self.failed:
            raise OffloadError(
                f"backward did not come to its end after the updates of {len(self._begun)} of {len(self._states)} "
                "units had begun in it (update_in_backward), so they are a step ahead of the others: load a checkpoint"
            )
        if self._begun:
            raise OffloadError(
                "updates have begun in backward (update_in_backward), so some units are a step ahead of the others: "
                "call step() first"
            )
