"""What a model costs, as data: frozen, JSON, standard library only.

A profile is what the planner reads; it can be made on one machine and planned with on another.
Unknown is ``None``, never 0.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from profiler.errors import ProfileError

SCHEMA = "memplan.profile/1"
PHASES = ("forward", "backward", "step")


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
    reserved_bytes: int
    executed_flops: int
    """Forward, recompute and backward of one micro-batch."""


@dataclass(frozen=True)
class PhasePeaks:
    """Peak bytes of a plain training step on a device, in the steady state (optimizer state exists)."""

    forward_bytes: int
    backward_bytes: int
    step_bytes: int
    overall_bytes: int
    reserved_bytes: int


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
    activations: tuple[ActivationPoint, ...]
    blocks: tuple[str, ...]
    """Paths of the repeated blocks (the layers of a transformer), in forward order."""
    uncounted_ops: dict[str, int] = field(default_factory=dict)
    """Operations without a FLOP formula, with their number of calls in one step."""
    workspace_bytes: int = 0
    """Of the peaks and the activations, what CUDA's libraries keep for themselves: not there where the CPU computes."""
    assumptions: tuple[str, ...] = ()
    """What was assumed where a value depends on data, one sentence each."""

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
        data = asdict(self)
        peaks = data.pop("peaks")
        return {
            "schema": SCHEMA,
            **data,
            "totals": {
                "parameters": self.parameter_elements,
                "trainable_parameters": self.trainable_elements,
                "forward_flops": self.forward_flops,
                "backward_flops": self.backward_flops,
                "activation_bytes": self.layers[0].activation_bytes,
            },
            "peaks": {
                "forward": {"allocated_bytes": peaks["forward_bytes"]},
                "backward": {"allocated_bytes": peaks["backward_bytes"]},
                "step": {"allocated_bytes": peaks["step_bytes"]},
                "overall": {"allocated_bytes": peaks["overall_bytes"], "reserved_bytes": peaks["reserved_bytes"]},
            },
        }

    def save(self, path: Path) -> None:
        """Write ``profile.json``."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "ModelProfile":
        """Read ``profile.json``; raises ProfileError when the file is not one."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProfileError(f"{path} is not a profile that this version can read: {error}") from error

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelProfile":
        """The inverse of ``to_dict``."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema is {data.get('schema')!r}, expected {SCHEMA!r}")
        peaks = data["peaks"]
        return cls(
            model=data["model"],
            precision=data["precision"],
            optimizer=data["optimizer"],
            batch_size=data["batch_size"],
            layers=tuple(LayerProfile(**layer) for layer in data["layers"]),
            parameters=tuple(
                ParameterProfile(**{**p, "shape": tuple(p["shape"]), "aliases": tuple(p["aliases"])})
                for p in data["parameters"]
            ),
            buffer_bytes=data["buffer_bytes"],
            peaks=PhasePeaks(
                **{f"{phase}_bytes": peaks[phase]["allocated_bytes"] for phase in (*PHASES, "overall")},
                reserved_bytes=peaks["overall"]["reserved_bytes"],
            ),
            activations=tuple(ActivationPoint(**point) for point in data["activations"]),
            blocks=tuple(data["blocks"]),
            uncounted_ops=dict(data["uncounted_ops"]),
            workspace_bytes=data["workspace_bytes"],
            assumptions=tuple(data["assumptions"]),
        )
