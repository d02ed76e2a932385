"""Plan: the order that the runtime carries out. Frozen, JSON, standard library only.

A plan says where each unit's parameters, gradients and optimizer state live, how they travel, and which
batch is trained. The planner writes plans; others may too, by hand or from another engine's configuration.
"""

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from offload.errors import PlanError
from offload.plan_file import built, parsed, without_schema
from offload.plan_rules import first_wrong

SCHEMA = "memplan.plan/2"


class Tier(StrEnum):
    """A kind of memory, from the fastest to the largest."""

    GPU = "gpu"
    HOST = "host"
    NVME = "nvme"

    @property
    def depth(self) -> int:
        """0 for the fastest tier, larger the further from the compute device."""
        return ("gpu", "host", "nvme").index(self.value)


class Precision(StrEnum):
    """How numbers are stored: see ``offload.residency`` for the bytes."""

    FP32 = "fp32"
    AMP = "amp"
    """fp32 parameters, forward under autocast to bf16."""
    BF16 = "bf16"
    """bf16 weights with an exact fp32 master, split into the weight and a 16-bit remainder."""
    FP16 = "fp16"
    """fp16 weights beside whole fp32 masters, with a loss scale that follows the gradients."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight (and of one gradient)."""
        return 2 if self in (Precision.BF16, Precision.FP16) else 4


class OptimizerKind(StrEnum):
    """The rule of the update, which decides what is kept beside a weight."""

    ADAMW = "adamw"
    ADAM = "adam"
    LION = "lion"
    SGD = "sgd"
    """Without momentum."""
    SGD_MOMENTUM = "sgd-momentum"
    ADAGRAD = "adagrad"

    @property
    def moments(self) -> tuple[str, ...]:
        """What is kept of every element, by the names that torch gives it."""
        if self in (OptimizerKind.ADAMW, OptimizerKind.ADAM):
            return ("exp_avg", "exp_avg_sq")
        one = {"lion": "exp_avg", "sgd-momentum": "momentum_buffer", "adagrad": "sum"}
        return (one[self.value],) if self.value in one else ()

    @property
    def squares(self) -> tuple[str, ...]:
        """Those of its moments that are made of squares, and so never negative."""
        return tuple(name for name in self.moments if name in ("exp_avg_sq", "sum"))


class MomentFormat(StrEnum):
    """How the optimizer's moments are stored: all but fp32 change the numbers, so they are asked for by name."""

    FP32 = "fp32"
    BF16 = "bf16"
    EIGHT_BIT = "8bit"
    """A byte an element, and an fp32 scale for every ``MOMENT_BLOCK_ELEMENTS``."""


MOMENT_BLOCK_ELEMENTS = 64
"""Elements of moments in 8 bits that share a scale. Parameters and the ranks' parts begin at multiples of it in any
case, and chunks must be multiples of it: so a block is always the same elements of one parameter."""


@dataclass(frozen=True)
class StateFormat:
    """How a trained element is stored, its weight and what the optimizer keeps beside it: what its bytes follow from.

    The bytes are in ``offload.residency``.
    """

    precision: Precision
    optimizer: OptimizerKind = OptimizerKind.ADAMW
    moments: MomentFormat = MomentFormat.FP32


class Target(StrEnum):
    """The engine that carries a plan out."""

    MEMPLAN = "memplan"
    DEEPSPEED = "deepspeed"
    FSDP2 = "fsdp2"


@dataclass(frozen=True)
class Placement:
    """Where one unit lives between its uses.

    ``unit`` is the dotted path of a module, whose parameters move together; "" is the root unit, which owns every
    parameter that no other unit owns and those that several units share.
    """

    unit: str
    parameters: Tier
    gradients: Tier
    optimizer: Tier


@dataclass(frozen=True)
class Buckets:
    """How the bytes are cut for their journeys."""

    prefetch_units: int = 1
    """Units fetched ahead of the one that computes."""
    update_elements: int = 1 << 22
    """Elements of optimizer state that are read, updated and written at a time."""
    io_bytes: int = 8 << 20
    """Largest single request to the NVMe tier."""
    reduce_elements: int = 1 << 26
    """Gradient elements reduced over the ranks at a time, by DeepSpeed; memplan's engine reduces a unit at a time."""
    gather_elements: int = 1 << 26
    """Weight elements gathered from the ranks at a time, and ahead of their use in stage 3, by DeepSpeed; memplan's
    engine gathers a unit at a time, and ``prefetch_units`` ahead."""
    persistence_elements: int = 0
    """Parameters of no more elements than this stay whole on every rank in stage 3 (DeepSpeed)."""
    live_elements: int = 0
    """Gathered elements that may stay on a GPU before one is let go, in stage 3 (DeepSpeed); 0: as few as it can."""
    update_slots: int = 3
    """Slots on the device, of ``update_elements`` each, for the GPU's share in the update of state that lives on the
    host. State beyond three of them is there before the gradients' norm is known: it comes while backward runs."""


@dataclass(frozen=True)
class MadeFor:
    """What a prediction was made for, and what that holds beside the model's state.

    Model state can be counted again from the placements, activations can not: with other values of these they are
    others, so a plan whose own differ is refused where it is audited.
    """

    device: str
    precision: Precision
    micro_batch_size: int
    recompute: tuple[str, ...]
    checkpoints: Tier
    loss_chunks: int
    activation_bytes: int
    """Of ``gpu_peak_bytes``."""
    activation_upper_bytes: int
    """Of ``gpu_upper_bytes``."""
    checkpoint_bytes: int
    """Inputs of recomputed modules in host memory, of one rank."""
    batch_elements: int = 0
    """Of all tensors of a micro-batch; 0 where nobody knows."""


@dataclass(frozen=True)
class Prediction:
    """What the planner expects of the plan. Unknown is ``None``."""

    gpu_peak_bytes: int
    """Allocated on the fullest GPU."""
    host_bytes: int
    """Held in one node's memory through all steps."""
    pinned_bytes: int
    nvme_bytes: int
    """Of one node's disk."""
    step_seconds: float | None
    bottleneck: str | None
    """The lane that bounds the step, of ``memplan.spans.LANES``."""
    lane_seconds: dict[str, float] = field(default_factory=dict)
    """Busy seconds of every lane in one optimizer step."""
    gpu_upper_bytes: int = 0
    """The most to expect of the GPU's memory: what decided that the plan fits."""
    host_upper_bytes: int = 0
    """The most to expect of one node's memory, the taking over of the model included."""
    step_seconds_range: tuple[float, float] | None = None
    """Between which the seconds of a step are expected."""
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    """Peak bytes by tier and phase: {"gpu": {"forward": ...}, "host": {...}}."""
    made_for: MadeFor | None = None
    """``None`` in plans of before it was kept, in those written by hand, and in other engines'."""


@dataclass(frozen=True)
class Alternative:
    """A plan that was considered and not taken."""

    description: str
    step_seconds: float | None
    gpu_peak_bytes: int
    host_bytes: int
    nvme_bytes: int
    why_not: str


@dataclass(frozen=True)
class Budget:
    """The bytes that the plan was allowed in each tier."""

    gpu_bytes: int
    host_bytes: int
    nvme_bytes: int


@dataclass(frozen=True)
class Plan:
    """One way to train one model on one machine.

    The global batch of one optimizer step is ``micro_batch_size * gradient_accumulation_steps * gpus``.
    """

    model: str
    parameter_shapes: dict[str, tuple[int, ...]]
    """Name and shape of every parameter, shared ones once: the plan fits no other model."""
    precision: Precision
    device: str
    """Kind of the compute device: ``cuda`` or ``cpu`` (the GPU tier is then a budget of ordinary memory)."""
    gpus: int
    """Of all nodes together."""
    zero_stage: int
    placements: tuple[Placement, ...]
    """One for each unit, in the order in which the forward pass uses them."""
    buckets: Buckets
    micro_batch_size: int
    gradient_accumulation_steps: int
    recompute: tuple[str, ...]
    """Paths of the modules whose activations are computed again in backward: all blocks, or some of them."""
    budget: Budget
    prediction: Prediction
    nvme_dir: str | None = None
    """Directory of the NVMe tier's file; ``None`` when no unit uses the tier."""
    target: Target = Target.MEMPLAN
    nodes: int = 1
    shard_gpus: int = 0
    """Ranks that share one copy of the model in ZeRO's stages: all of them, or those of a node while nodes hold
    replicas; 0 stands for all."""
    checkpoints: Tier = Tier.GPU
    """Where the inputs of recomputed modules wait for backward: ``gpu`` or ``host``."""
    loss_chunks: int = 1
    """Pieces in which the head and the loss of a causal language model are computed; 1: whole."""
    gpu_update_share: float = 0.0
    """Of the optimizer state that is off the GPU, the share that the GPU updates: streamed through it by memplan, kept
    on it by DeepSpeed."""
    optimizer: OptimizerKind = OptimizerKind.ADAMW
    """What trains: its state is what the placements and the prediction count."""
    moments: MomentFormat = MomentFormat.FP32
    """How its moments are stored."""
    on_meta: bool = False
    """Whether the model is built without memory and made unit by unit: those of a node's processes have no room."""
    reasons: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what can not be carried out; raises PlanError."""
        _check(self)

    @property
    def state_format(self) -> StateFormat:
        """How its elements are stored."""
        return StateFormat(self.precision, self.optimizer, self.moments)

    def bytes_of_one_rank(self, gpu_bytes: int, node_host_bytes: int, node_nvme_bytes: int) -> dict[str, int]:
        """Bytes by tier, where the host's and the disk's are a node's, as in the prediction and the budget."""
        ranks = self.gpus // self.nodes
        return {"gpu": gpu_bytes, "host": node_host_bytes // ranks, "nvme": node_nvme_bytes // ranks}

    @property
    def predicted_bytes(self) -> dict[str, int]:
        """What one rank is expected to hold in each tier."""
        p = self.prediction
        return self.bytes_of_one_rank(p.gpu_peak_bytes, p.host_bytes, p.nvme_bytes)

    @property
    def budget_bytes(self) -> dict[str, int]:
        """One rank's part of what training may take of each tier."""
        b = self.budget
        return self.bytes_of_one_rank(b.gpu_bytes, b.host_bytes, b.nvme_bytes)

    def uses(self, tier: Tier) -> bool:
        """Whether any unit keeps something in this tier."""
        return any(tier in (p.parameters, p.gradients, p.optimizer) for p in self.placements)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write ``plan.json``."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read ``plan.json``; raises PlanError when the file is not a valid plan."""
        data = parsed(path)
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> "Plan":
        """The inverse of ``to_dict``; raises PlanError, naming the place, for anything else."""
        return built(cls, without_schema(data, SCHEMA))


def _check(plan: Plan) -> None:
    if said := first_wrong(plan):
        raise PlanError(said)
    names = [p.unit for p in plan.placements]
    if len(set(names)) != len(names):
        raise PlanError(f"a unit is placed twice: {sorted(n for n in set(names) if names.count(n) > 1)}")
    for outer in names:
        inner = next((n for n in names if outer and n.startswith(outer + ".")), None)
        if inner is not None:
            raise PlanError(f"unit {inner!r} lies inside unit {outer!r}; only the root unit '' may contain others")
    for p in plan.placements:
        name = p.unit or "(root)"
        if p.gradients is Tier.NVME:
            raise PlanError(f"unit {name}: gradients can not live on nvme; use host")
        # DeepSpeed brings weights that are off the GPU up to state that is on it, and their new values down.
        if p.optimizer.depth < p.parameters.depth and plan.target is not Target.DEEPSPEED:
            raise PlanError(
                f"unit {name}: optimizer state on {p.optimizer} with parameters on {p.parameters}; "
                "the state must live where the parameters do, or in a larger tier"
            )
        if p.optimizer is Tier.GPU and p.gradients is not Tier.GPU:
            raise PlanError(f"unit {name}: gradients on {p.gradients} but the update is on gpu; put them there too")
    if plan.uses(Tier.NVME) and not plan.nvme_dir:
        raise PlanError("a unit lives on nvme but the plan names no nvme_dir")
    if plan.moments is MomentFormat.EIGHT_BIT and plan.buckets.update_elements % MOMENT_BLOCK_ELEMENTS:
        raise PlanError(
            f"buckets.update_elements is {plan.buckets.update_elements}; with moments in 8 bits it must be a multiple "
            f"of {MOMENT_BLOCK_ELEMENTS}, so that no block of them is cut"
        )
    if plan.gpus % plan.nodes:
        raise PlanError(f"{plan.gpus} gpus can not be divided evenly over {plan.nodes} nodes")
    # DeepSpeed's groups may be of any size that divides all GPUs.
    groups = plan.target is Target.DEEPSPEED and plan.shard_gpus > 0 and plan.gpus % plan.shard_gpus == 0
    if plan.shard_gpus not in (0, plan.gpus, plan.gpus // plan.nodes) and not groups:
        raise PlanError(f"shard_gpus is {plan.shard_gpus}; it must be all {plan.gpus}, or those of a node")
    if plan.checkpoints is Tier.NVME:
        raise PlanError("checkpoints can not live on nvme; use gpu or host")
