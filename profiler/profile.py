"""What a model costs, as data: frozen, JSON, standard library only.

A profile is what the planner reads; it can be made on one machine and planned with on another.
Unknown is ``None``, never 0.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from profiler.errors import ProfileError, ProfilerError
from profiler.events import PHASES
from profiler.typed import parsed, typed, without_schema

SCHEMA = "memplan.profile/5"


@dataclass(frozen=True)
class ParameterProfile:
    """One parameter tensor, listed once even when several modules share it."""

    name: str
    """Its first dotted name in ``model.named_parameters()``."""
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    aliases: tuple[str, ...] = ()
    """Further dotted names of the same tensor (tied weights)."""
    used_outside: bool = False
    """An operation read it while none of its modules was running: it can not come and go with their forward."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Of the tensor: a dtype's name has its bits, but for ``bool``."""
        bits = re.search(r"\d+", self.dtype)
        return self.elements * (int(bits[0]) // 8 if bits else 1)


@dataclass(frozen=True)
class LayerProfile:
    """One module with everything below it; the figures of a parent include those of its children."""

    path: str
    """Dotted module path, "" for the model itself."""
    type: str
    order: int | None
    """Position of its first forward call among all modules' first calls; ``None`` when it was never called."""
    calls: int
    parameters: int
    """Elements of the parameters below it, a shared one counted once (where it first appears)."""
    parameter_bytes: int
    forward_flops: int
    backward_flops: int
    activation_bytes: int
    """Bytes that its operations made autograd keep for backward, parameters left out, each storage counted once."""
    transient_bytes: int = 0
    """The most that its operations held at once, in forward or in backward, beside what is kept and gradients."""
    moved_bytes: int = 0
    """Read and written by its operations in forward and backward, recompute left out."""
    recompute_flops: int = 0
    """What of the forward pass is computed again in backward."""
    seconds: float | None = None
    """Of its operations in forward and backward on ``ModelProfile.device``."""


@dataclass(frozen=True)
class ModuleSeconds:
    """What a block, or a module outside of the blocks without those below it, takes of one micro-batch."""

    path: str
    forward_seconds: float
    """Of its kernels on ``ModelProfile.device``, the loss included where it is computed."""
    forward_issue_seconds: float
    """Of the CPU, to issue them."""
    backward_seconds: float
    """Recompute included."""
    backward_issue_seconds: float


@dataclass(frozen=True)
class ActivationPoint:
    """The peak of a step's memory beside the model's own state, at one batch size.

    Parameters, gradients and optimizer state are left out: what remains is what an engine that moves
    those elsewhere still has to keep on the device.
    """

    batch_size: int
    recompute: bool
    """Whether every block of ``ModelProfile.blocks`` was recomputed in backward."""
    allocated_bytes: int
    """In blocks that are cut to size, as those of an allocator that grows its segments."""
    executed_flops: int
    """Forward, recompute and backward of one micro-batch."""
    on_cpu_bytes: int
    """``allocated_bytes`` where the CPU computes: without what CUDA's libraries and kernels hold beside tensors."""
    loss_chunks: int = 1
    """Pieces in which a causal language model's head and loss are computed; 1: whole."""
    input_bytes: tuple[int, ...] = ()
    """Of the inputs that each recomputed block keeps, in the order of the blocks."""
    device_input_bytes: tuple[int, ...] = ()
    """Of these, what is on the device while the others wait on the host."""
    checkpoints_on_host: bool = False
    """Whether they wait there: two at most are then on the device, the one in use and one on its way."""
    phase_bytes: dict[str, int] = field(default_factory=dict)
    """``allocated_bytes`` by phase: the most in forward, loss and backward."""
    held_bytes: int = 0
    """When backward begins: what forward has kept for it."""
    freed_bytes: tuple[int, ...] = ()
    """Of these, what only the first block keeps, only the first two, and so on; where none is recomputed."""
    scratch_moments: tuple[tuple[int, int], ...] = ()
    """What kernels hold for a moment, which does not grow with the batch as all else does, and what all else holds
    then: (scratch, beside) bytes of the moments that have more of one than all others with as much of the other."""
    given_bytes: int = 0
    """Of a batch that was cast for the model, as it was given: whoever keeps it on the device holds it twice."""
    modules: tuple[ModuleSeconds, ...] = ()
    """In order of their first operation; empty where no device is known."""

    @property
    def checkpoint_bytes(self) -> int:
        """Of the inputs that all recomputed blocks keep."""
        return sum(self.input_bytes)


@dataclass(frozen=True)
class PhasePeaks:
    """Peak bytes of a plain training step on a CUDA device; a phase that the step does not have is ``None``."""

    forward_bytes: int
    loss_bytes: int | None
    backward_bytes: int
    clip_bytes: int | None
    step_bytes: int
    reserved_bytes: int
    """Held by the caching allocator at the end of the step."""
    reserved_expandable_bytes: int
    """The same with ``expandable_segments:True``."""

    @property
    def by_phase(self) -> dict[str, int]:
        """The phases that there are, in order."""
        found = {phase: getattr(self, f"{phase}_bytes") for phase in PHASES}
        return {phase: size for phase, size in found.items() if size is not None}

    @property
    def overall_bytes(self) -> int:
        """The largest of the phases."""
        return max(self.by_phase.values())

    @property
    def phase(self) -> str:
        """The phase with the largest peak, the first of equal ones."""
        return max(self.by_phase, key=self.by_phase.__getitem__)


@dataclass(frozen=True)
class OperationProfile:
    """All calls of one operation in one step, recompute included."""

    name: str
    calls: int
    flops: int | None
    """``None`` when there is no formula for it."""
    moved_bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class MemoryPoint:
    """What is allocated at one moment of a steady step."""

    phase: str
    module: str
    """Of the operation that is running."""
    bytes: dict[str, int]
    """By category (``profiler.events.Category``)."""


@dataclass(frozen=True)
class Holding:
    """Storages of one kind that are allocated at the moment of the peak."""

    module: str
    category: str
    operation: str
    """What made them, "" for what was there before the step."""
    count: int
    bytes: int


@dataclass(frozen=True)
class ModelProfile:
    """Everything that was learnt from one fake training step of a model."""

    model: str
    precision: str
    optimizer: str
    batch_size: int
    layers: tuple[LayerProfile, ...]
    parameters: tuple[ParameterProfile, ...]
    buffer_bytes: int
    peaks: PhasePeaks
    """In the steady state: optimizer state and workspaces exist."""
    first_peaks: PhasePeaks
    """Of the first step, in which they are made."""
    activations: tuple[ActivationPoint, ...]
    blocks: tuple[str, ...]
    """Paths of the repeated blocks (the layers of a transformer), in forward order."""
    operations: tuple[OperationProfile, ...] = ()
    """By name, those that move the most bytes first."""
    timeline: tuple[MemoryPoint, ...] = ()
    """Of a steady step, its peaks included, thinned out to a few hundred moments."""
    peak_contents: tuple[Holding, ...] = ()
    """The largest first."""
    context_bytes: int | None = None
    """What NVML shows beside the allocator's reserve on ``device``: the CUDA context and its libraries' code."""
    device: str | None = None
    """The device whose rates the seconds are for."""
    step_seconds: float | None = None
    """Of one step on it, the optimizer included."""
    assumptions: tuple[str, ...] = ()
    """What was assumed where a value depends on data, one sentence each."""
    sample_elements: int = 0
    """Of all tensors of a batch, a sample; 0 where nobody knows."""
    again: Callable[[int | None, int | None], "ModelProfile"] | None = field(default=None, repr=False, compare=False)
    """Profiles the same model on another batch; only where the profile was made, never in a file."""

    def scaled(self, batch: int | None = None, seq: int | None = None) -> "ModelProfile":
        """The profile of the same step with ``batch`` samples, or ``seq`` tokens a sample.

        It is traced anew, so it is no estimate. Its only activation point is that of its own batch. Raises
        ProfileError where the profile was read from a file.
        """
        if self.again is None:
            raise ProfileError(
                f"this profile of {self.model} was read from a file and has no model any more: profile the model again"
                " with the batch that you want"
            )
        return self.again(batch, seq)

    @property
    def uncounted_ops(self) -> dict[str, int]:
        """Operations without a FLOP formula, with their number of calls in one step, the most frequent first."""
        found = {o.name: o.calls for o in self.operations if o.flops is None}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def uncounted_share(self) -> float:
        """Their share of all bytes moved, between 0 and 1."""
        moved = sum(o.moved_bytes for o in self.operations)
        return sum(o.moved_bytes for o in self.operations if o.flops is None) / moved if moved else 0.0

    @property
    def executed_flops(self) -> int:
        """FLOPs of one step without the optimizer, recompute included."""
        return sum(o.flops or 0 for o in self.operations)

    @property
    def forward_flops(self) -> int:
        """FLOPs of one forward pass of the profiled batch."""
        return self.layers[0].forward_flops

    @property
    def backward_flops(self) -> int:
        """FLOPs of one backward pass of the profiled batch, recompute left out."""
        return self.layers[0].backward_flops

    @property
    def parameter_elements(self) -> int:
        """Elements of all parameters, shared ones once."""
        return sum(p.elements for p in self.parameters)

    @property
    def trainable_elements(self) -> int:
        """Elements of the parameters that are trained, shared ones once."""
        return sum(p.elements for p in self.parameters if p.trainable)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the totals spelled out for programs that read only those."""
        return {
            "schema": SCHEMA,
            **{name: value for name, value in asdict(replace(self, again=None)).items() if name != "again"},
            "totals": {
                "parameters": self.parameter_elements,
                "trainable_parameters": self.trainable_elements,
                "forward_flops": self.forward_flops,
                "backward_flops": self.backward_flops,
                "executed_flops": self.executed_flops,
                "activation_bytes": self.layers[0].activation_bytes,
                "peak_bytes": self.peaks.overall_bytes,
                "peak_phase": self.peaks.phase,
                "device_bytes": self.device_bytes,
                "uncounted_share": self.uncounted_share,
            },
            "uncounted_ops": self.uncounted_ops,
        }

    @property
    def device_bytes(self) -> int | None:
        """What NVML will show for the process in the steady state."""
        return None if self.context_bytes is None else self.peaks.reserved_bytes + self.context_bytes

    def save(self, path: Path) -> None:
        """Write ``profile.json``."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "ModelProfile":
        """Read ``profile.json``; raises ProfileError when the file is not one."""
        again = "make it again: memplan profile --json"
        try:
            return cls.from_dict(parsed(path))
        except FileNotFoundError as error:
            raise ProfileError(f"{path} does not exist; memplan profile --json writes one") from error
        except (OSError, ProfilerError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise ProfileError(f"{path} is not a profile that this version can read ({said}); {again}") from error

    @classmethod
    def from_dict(cls, data: Any) -> "ModelProfile":
        """The inverse of ``to_dict``; raises ProfilerError, naming the place, for anything else."""
        read = typed(cls, without_schema(data, SCHEMA, "totals", "uncounted_ops"))
        if said := _incomplete(read):
            raise ProfilerError(said)
        return read


def _incomplete(profile: ModelProfile) -> str | None:
    """What is wrong with lists that must have entries, or one for each block, and with counts that must be above 0."""
    for name in ("layers", "parameters", "activations"):
        if not getattr(profile, name):
            return f"{name} is empty; it must have entries"
    if profile.layers[0].path:
        return f"layers[0].path is {profile.layers[0].path!r}; the first layer must be the model itself, ''"
    if profile.batch_size < 1:
        return "batch_size is 0; it must be at least 1"
    for i, point in enumerate(profile.activations):
        for name in ("batch_size", "loss_chunks"):
            if getattr(point, name) < 1:
                return f"activations[{i}].{name} is 0; it must be at least 1"
        wanted = {
            "input_bytes": point.recompute,
            "device_input_bytes": point.recompute,
            "freed_bytes": not point.recompute,
        }
        for name, there in wanted.items():
            listed, count = getattr(point, name), len(profile.blocks) if there else 0
            if len(listed) != count:
                return f"activations[{i}].{name} has {len(listed)} entries; it must have {count}, one for each block"
    return None
