"""What happens in a training step, as data: storages come and go, operations run."""

from dataclasses import dataclass
from enum import StrEnum


class Category(StrEnum):
    """What a storage holds."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    WORKSPACE = "workspace"
    ACTIVATION = "activation"
    """Everything else: what autograd keeps, and what lives for a moment."""


MODEL_STATE = frozenset({Category.PARAMETER, Category.GRADIENT, Category.OPTIMIZER})
"""What an engine that offloads keeps elsewhere."""

SETUP = "setup"
"""Before the first step: parameters, buffers and the batch."""
FORWARD = "forward"
"""The model and the loss."""
BACKWARD = "backward"
STEP = "step"
"""The optimizer, and the gradients' release after it."""


@dataclass(frozen=True, slots=True)
class Alloc:
    """A storage begins to live."""

    id: int
    bytes: int
    category: Category
    module: str
    """Path of the module in whose name it was made, "" for the model itself and for the loss."""
    phase: str


@dataclass(frozen=True, slots=True)
class Free:
    """A storage ends."""

    id: int
    phase: str


@dataclass(frozen=True, slots=True)
class Op:
    """An operation runs."""

    name: str
    flops: int | None
    """``None`` when there is no formula for it."""
    module: str
    phase: str
    recompute: bool = False
    """Whether it repeats a part of the forward pass during backward."""


Event = Alloc | Free | Op
