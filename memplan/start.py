"""How a model comes to its tiers, and the host memory that takes: asked by the planner and by ``memplan train``.

[Note: the start]
Every process of a node has a model of its own, built in fp32. Either each is built whole, and leaves unit by unit while
the tiers fill: a unit's numbers are on the host once more meanwhile, and once more while they are rounded, so beside
the larger of model and tiers there is the largest unit, twice. (``offload.attach`` takes units that free memory first,
so nothing between the two ends is larger than both.) Or, where so many models have no room, each is built on meta: then
the host never holds one, but the tiers, the largest unit twice, and the root unit, which is made first and comes last.
Processes take the same unit at the same time, for they share its values, so all of it counts once a process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.plan import Budget
from offload.residency import UnitShape

BUILT_BYTES = 4
"""Of one parameter until the model is taken over: models are built in fp32."""


@dataclass(frozen=True)
class StartBytes:
    """Host bytes of one process at the start: [Note: the start]."""

    model_bytes: int
    """Of the model as it is built."""
    passing_bytes: int
    """Of the largest unit on its way, beside the model or the tiers."""
    made_bytes: int
    """Of units on their way that are made on meta, beside the tiers."""

    @classmethod
    def of(cls, parameter_elements: int, shapes: Sequence[UnitShape]) -> "StartBytes":
        """Of a model of these units."""
        root = sum(s.elements for s in shapes if not s.name) * BUILT_BYTES
        others = max((s.elements for s in shapes if s.name), default=0) * BUILT_BYTES
        return cls(parameter_elements * BUILT_BYTES, 2 * max(root, others), max(root + 2 * others, 2 * root))

    def beside_bytes(self, *, on_meta: bool) -> int:
        """The most beside the tiers when they are full, or nearly."""
        return self.made_bytes if on_meta else self.passing_bytes

    def most_bytes(self, tiers_bytes: int, *, on_meta: bool) -> int:
        """The most that is held until tiers of so many bytes are full."""
        full = tiers_bytes if on_meta else max(tiers_bytes, self.model_bytes)
        return full + self.beside_bytes(on_meta=on_meta)


def have_room(processes: int, model_bytes: int, passing_bytes: int, room_bytes: int) -> bool:
    """Whether each process of a node may build its model whole; otherwise all build it on meta."""
    return processes * (model_bytes + passing_bytes) <= room_bytes


def room_bytes(budget: Budget, device: str, processes: int) -> int:
    """A node's memory in which models may be built; where the CPU computes, the GPU tiers are part of it."""
    return budget.host_bytes + (processes * budget.gpu_bytes if device == "cpu" else 0)
