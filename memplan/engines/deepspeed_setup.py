"""What of a plan, or of a ds_config.json, decides DeepSpeed's memory and traffic.

The defaults are DeepSpeed's own (0.19), so that a setup can be made of a configuration that leaves keys out.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from memplan.errors import PlanningError
from memplan.sharding import Sharding
from offload.plan import Buckets, Plan, Precision, Target, Tier

ADAM_TENSORS = 4
"""What a sub-group brings through the swap buffers at once: the master, two moments, and the gradient."""
SWAPPABLE_BYTES = 1 << 20
"""Tensors below this stay in memory: DeepSpeed's smallest request to the disk, and its default ``aio.block_size``."""
SUB_GROUP_ELEMENTS = 100_000_000
"""Elements that are updated at a time, where a plan for memplan's engine is translated."""
PERSISTENCE_ELEMENTS = 100_000
LEAST_PARAM_BUFFERS = 5


@dataclass(frozen=True)
class DeepSpeedSetup:
    """One configuration of DeepSpeed on one kind of machine."""

    zero_stage: int
    gpus: int
    nodes: int
    precision: Precision
    parameters: Tier
    optimizer: Tier
    gpu_update_share: float = 0.0
    """Of the optimizer state that is offloaded, the share that stays on the GPU: 1 - ``offload_optimizer.ratio``."""
    reduce_elements: int = 500_000_000
    gather_elements: int = 50_000_000
    """``allgather_bucket_size`` in stages 1 and 2, ``stage3_prefetch_bucket_size`` in stage 3."""
    persistence_elements: int = PERSISTENCE_ELEMENTS
    live_elements: int = 1_000_000_000
    sub_group_elements: int = 1_000_000_000
    overlap_comm: bool = True
    contiguous_gradients: bool = True
    param_buffer_count: int = LEAST_PARAM_BUFFERS
    param_buffer_elements: int = 100_000_000
    max_in_cpu_elements: int = 1_000_000_000
    """Of one rank's parameters that are on NVMe, so many are given room in host memory (``max_in_cpu``)."""
    optimizer_buffer_count: int = ADAM_TENSORS
    pin_memory: bool = True
    hpz: int = 1
    """Ranks that hold one further copy of the weights between them (``zero_hpz_partition_size``); 1: none."""
    zero_init: bool = False
    """In stage 3: the model is built under ``deepspeed.zero.Init``, so that no rank ever holds all of it."""
    accumulated_bytes: int | None = None
    """Of an element of the gradients that are summed up (``grad_accum_dtype``); ``None``: as a weight."""
    communicated_bytes: int | None = None
    """Of an element of the gradients on their way between ranks (``communication_data_type``); ``None``: as a
    weight."""
    loss_scaled: bool = False
    """fp16, which has the bytes of bf16 and another optimizer in stage 1."""

    def __post_init__(self) -> None:
        """Refuse what DeepSpeed can not do; raises PlanningError."""
        if self.parameters is not Tier.GPU and self.zero_stage < 3:
            raise PlanningError(f"DeepSpeed offloads parameters in ZeRO stage 3 only, not in {self.zero_stage}")
        if self.optimizer is Tier.NVME and self.zero_stage < 3:
            raise PlanningError(
                f"DeepSpeed keeps optimizer state on NVMe in ZeRO stage 3 only, not in {self.zero_stage}"
            )
        if self.optimizer is Tier.HOST and self.zero_stage < 1:
            raise PlanningError("DeepSpeed offloads optimizer state in ZeRO stages 1 to 3 only, not in 0")
        if self.gpu_update_share and (self.zero_stage < 3 or self.optimizer is not Tier.HOST):
            raise PlanningError(
                "DeepSpeed splits the update (offload_optimizer.ratio) in ZeRO stage 3 on the host only"
            )
        if self.gpus % self.nodes or self.gpus % self.hpz:
            raise PlanningError(
                f"{self.gpus} GPUs can not be divided evenly over {self.nodes} nodes and groups of {self.hpz}"
            )

    @property
    def ranks_per_node(self) -> int:
        """GPUs, and processes, of one node."""
        return self.gpus // self.nodes

    @property
    def gradient_bytes(self) -> int:
        """Of an element of the gradients that are summed up."""
        return self.accumulated_bytes or self.precision.weight_bytes

    @property
    def reduced_bytes(self) -> int:
        """Of an element of a bucket; under autocast every layer reduces in its own type, whatever is written."""
        weight = self.precision.weight_bytes
        return weight if self.precision is Precision.AMP else self.communicated_bytes or weight

    @property
    def whole_gradients(self) -> bool:
        """Whether it is BF16_Optimizer that runs, which sums the gradients of the whole model in fp32."""
        narrow = self.precision is Precision.BF16 and not self.loss_scaled
        return self.zero_stage == 1 and self.optimizer is Tier.GPU and narrow and self.gradient_bytes == 4

    @property
    def pipeline_read(self) -> bool:
        """Whether the swap buffers suffice to read the next sub-group while this one is updated."""
        return self.optimizer is Tier.NVME and self.optimizer_buffer_count >= 2 * ADAM_TENSORS

    @property
    def pipeline_write(self) -> bool:
        """Whether they also suffice to write the one before."""
        return self.optimizer is Tier.NVME and self.optimizer_buffer_count >= 3 * ADAM_TENSORS


def planned_setup(
    sharding: Sharding,
    buckets: Buckets,
    parameters: Tier,
    optimizer: Tier,
    gpu_update_share: float,
    *,
    precision: Precision,
    device: str,
    largest_elements: int,
    param_buffer_count: int,
) -> DeepSpeedSetup:
    """The setup that plans are made for: these sizes, ``Buckets.update_elements`` being the sub-group.

    ``largest_elements`` are those of the model's largest parameter, ``param_buffer_count`` is from ``param_buffers``.
    """
    return DeepSpeedSetup(
        zero_stage=sharding.zero_stage,
        gpus=sharding.gpus,
        nodes=sharding.nodes,
        precision=precision,
        parameters=parameters,
        optimizer=optimizer,
        gpu_update_share=gpu_update_share,
        reduce_elements=buckets.reduce_elements,
        gather_elements=buckets.gather_elements,
        persistence_elements=buckets.persistence_elements,
        live_elements=buckets.live_elements,
        sub_group_elements=buckets.update_elements,
        overlap_comm=sharding.zero_stage > 0,
        param_buffer_count=param_buffer_count,
        param_buffer_elements=largest_elements,
        max_in_cpu_elements=0,
        optimizer_buffer_count=2 * ADAM_TENSORS,
        pin_memory=device == "cuda",
        hpz=sharding.group if sharding.shard_gpus else 1,
        zero_init=sharding.zero_stage == 3,
    )


def setup_of(plan: Plan) -> DeepSpeedSetup:
    """The setup that carries the plan out, as ``ds_config`` writes it.

    DeepSpeed moves whole tiers, so the furthest tier of any unit counts for all. A plan made for DeepSpeed has its
    stage and buckets taken over exactly; of one made for another engine the stage is raised to what this offloading
    needs, and the sizes are translated.
    """
    parameters = furthest(p.parameters for p in plan.placements)
    optimizer = furthest(p.optimizer for p in plan.placements)
    stage = _stage(plan, parameters, optimizer)
    hierarchical = plan.shard_gpus not in (0, plan.gpus) and stage == 3
    splits = plan.target is Target.DEEPSPEED and stage == 3 and optimizer is Tier.HOST
    return planned_setup(
        Sharding(stage, plan.gpus, plan.nodes, plan.shard_gpus if hierarchical else 0),
        _buckets(plan, parameters),
        parameters,
        optimizer,
        plan.gpu_update_share if splits else 0.0,
        precision=plan.precision,
        device=plan.device,
        largest_elements=largest_parameter(plan),
        param_buffer_count=param_buffers([p.unit for p in plan.placements], plan.parameter_shapes, plan.precision),
    )


def furthest(tiers: Iterable[Tier]) -> Tier:
    """The tier that is the furthest from the GPU."""
    return max(tiers, key=lambda tier: tier.depth)


def largest_parameter(plan: Plan) -> int:
    """Elements of the largest parameter."""
    return max((prod(shape) for shape in plan.parameter_shapes.values()), default=1)


def _stage(plan: Plan, parameters: Tier, optimizer: Tier) -> int:
    if parameters is not Tier.GPU or optimizer is Tier.NVME:
        return 3
    return max(plan.zero_stage, 1 if optimizer is Tier.HOST else 0)


def _buckets(plan: Plan, parameters: Tier) -> Buckets:
    """Its own where it was made for DeepSpeed, else translated; of sizes that DeepSpeed takes."""
    own, largest = plan.buckets, largest_parameter(plan)
    if plan.target is Target.DEEPSPEED:
        sizes = replace(own, live_elements=own.live_elements or own.gather_elements + largest)
    else:
        total = sum(prod(shape) for shape in plan.parameter_shapes.values())
        gather = min(total, max(1, own.prefetch_units) * (total // max(1, len(plan.placements))))
        sizes = replace(
            own,
            gather_elements=gather,
            update_elements=max(1, min(total, max(SUB_GROUP_ELEMENTS, largest))),
            persistence_elements=min(PERSISTENCE_ELEMENTS, largest),
            live_elements=total if parameters is Tier.GPU else 2 * max(gather, largest),
        )
    # NCCL's buffers begin at multiples of two elements: DeepSpeed refuses odd buckets in stages 1 and 2.
    return replace(sizes, reduce_elements=_even(sizes.reduce_elements), gather_elements=_even(sizes.gather_elements))


def _even(elements: int) -> int:
    return max(2, elements + elements % 2)


def param_buffers(units: Collection[str], shapes: Mapping[str, tuple[int, ...]], precision: Precision) -> int:
    """Buffers for parameters on their way from NVMe, with parameters of these shapes in these units.

    A parameter occupies one from being read until it is let go on the GPU. The parameters of a block that is computed
    again are all in use at once, and those of the next one are being read.
    """
    members: Counter[str] = Counter()
    for name, shape in shapes.items():
        if prod(shape) * precision.weight_bytes >= SWAPPABLE_BYTES:
            members[max((u for u in units if name.startswith(u + ".")), key=len, default="")] += 1
    return max(LEAST_PARAM_BUFFERS, 2 * max(members.values(), default=0) + 2)
