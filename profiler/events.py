"""What happens in a training step, as data: storages come and go, operations run."""

from enum import StrEnum
from typing import NamedTuple


class Category(StrEnum):
    """What a storage holds."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    """State, which stays."""
    UPDATE = "update"
    """What clipping and the optimizer's step hold for a moment."""
    WORKSPACE = "workspace"
    """What CUDA's libraries keep for themselves."""
    SCRATCH = "scratch"
    """What one of their kernels holds for a moment."""
    ACTIVATION = "activation"
    """Everything else: what autograd keeps, and what lives for a moment."""


OF_CUDA = frozenset({Category.WORKSPACE, Category.SCRATCH})
"""Not there where the CPU computes."""
MODEL_STATE = frozenset({Category.PARAMETER, Category.GRADIENT, Category.OPTIMIZER, Category.UPDATE})
"""What an engine that offloads keeps elsewhere, or does in its own way."""

SETUP = "setup"
"""Before the first step: parameters, buffers and the batch."""
FORWARD = "forward"
LOSS = "loss"
"""What comes after the model has returned and before backward; empty where the model computes its own loss."""
BACKWARD = "backward"
CLIP = "clip"
"""The gradients' global norm, and their scaling; with a gradient scaler, their unscaling before."""
STEP = "step"
"""The optimizer, and the gradients' release after it."""
PHASES = (FORWARD, LOSS, BACKWARD, CLIP, STEP)


class Alloc(NamedTuple):
    """A storage begins to live."""

    id: int
    bytes: int
    category: Category
    module: str
    """Path of the module in whose name it was made, "" for the model itself and for the loss."""
    phase: str
    most_bytes: int = 0
    """Of a kernel's scratch memory, where that is not more the larger the batch: the most in any smaller one."""


class Free(NamedTuple):
    """A storage ends."""

    id: int
    phase: str


class Op(NamedTuple):
    """An operation runs."""

    name: str
    flops: int | None
    """``None`` when there is no formula for it."""
    bytes: int
    """Read and written; 0 for a view."""
    dtype: str
    """Of its first floating-point tensor, "" where there is none: it decides the rate."""
    module: str
    phase: str
    recompute: bool = False
    """Whether it repeats a part of the forward pass during backward."""
    shape: tuple[int, ...] = ()
    """Sizes that decide its rate beside FLOPs and bytes (``profiler.shapes``)."""
    repeated_flops: int = 0
    """Of ``flops``, those that do once more what forward did, as the scores in a fused attention's backward."""


class Save(NamedTuple):
    """Autograd keeps a storage for backward."""

    id: int
    module: str
    checkpoint: bool = False
    """Whether it is kept as an input of a block, ``module``, that is recomputed from it."""


class Call(NamedTuple):
    """A module's forward begins, in the forward phase."""

    module: str


class Back(NamedTuple):
    """Backward reaches a block's output."""

    module: str


class Gradient(NamedTuple):
    """A parameter's gradient has arrived."""

    parameter: str


Event = Alloc | Free | Op | Save | Call | Back | Gradient
