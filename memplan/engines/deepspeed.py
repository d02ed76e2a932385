"""DeepSpeed as an engine to plan for: stages, whole tiers of parameters and optimizer state, three sizes of buffers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from memplan.engines.deepspeed_memory import deepspeed_held
from memplan.engines.deepspeed_setup import DeepSpeedSetup, param_buffers, planned_setup
from memplan.engines.deepspeed_traffic import deepspeed_traffic
from memplan.engines.held import Held
from memplan.engines.traffic import Traffic
from memplan.engines.whole import Setup, families_of
from memplan.problem import Problem
from offload.plan import Buckets, Tier

OFFLOADS = {
    0: ((Tier.GPU, Tier.GPU),),
    1: ((Tier.GPU, Tier.GPU), (Tier.GPU, Tier.HOST)),
    2: ((Tier.GPU, Tier.GPU), (Tier.GPU, Tier.HOST)),
    3: tuple((p, o) for p in Tier for o in Tier if o.depth >= p.depth),
}
"""(parameters, optimizer state) that DeepSpeed accepts, by stage."""
SIZES = (
    Buckets(reduce_elements=500_000_000, gather_elements=50_000_000, update_elements=1_000_000_000,
            persistence_elements=100_000, live_elements=1_000_000_000),
    Buckets(reduce_elements=100_000_000, gather_elements=50_000_000, update_elements=100_000_000,
            persistence_elements=100_000, live_elements=200_000_000),
    Buckets(reduce_elements=20_000_000, gather_elements=10_000_000, update_elements=20_000_000,
            persistence_elements=10_000, live_elements=20_000_000),
)  # fmt: skip
"""DeepSpeed's own defaults, and two that take less memory."""
SPLIT_UPDATES = (0.0, 0.25, 0.5)
"""Shares of offloaded state that may stay on the GPU and be updated there (Twin-Flow)."""


@dataclass(frozen=True)
class DeepSpeed:
    """Stages 0 to 3, with and without offloading, for gradients in these types."""

    accumulated_bytes: int | None = None
    communicated_bytes: int | None = None
    loss_scaled: bool = False
    """All three as in ``DeepSpeedSetup``."""

    update_seconds: ClassVar[float] = 0.42e-9
    """CPU Adam with its copies on 16 cores: of a step of 2.42 s of 3.21e9 parameters in stage 2 0.94 s compute and
    0.12 s the copy of the weights."""

    def setups(self, problem: Problem) -> Iterator[Setup]:
        """All of them; on one GPU a stage only matters for what it can offload."""
        for family in families_of(problem):
            for stage in (0, 1, 3) if problem.gpus == 1 else (family.sharding.zero_stage,):
                staged = replace(family, sharding=replace(family.sharding, zero_stage=stage))
                if staged.sharding.shard_gpus and stage != 3:
                    continue  # hierarchical sharding is that of stage 3 (hpZ)
                if stage == 0 and self.accumulated_bytes not in (None, problem.precision.weight_bytes):
                    continue  # DeepSpeed stops: only ZeRO sums gradients in another type
                for parameters, optimizer in OFFLOADS[stage]:
                    splits = SPLIT_UPDATES if stage == 3 and optimizer is Tier.HOST else (0.0,)
                    for buckets in SIZES:
                        for share in splits:
                            yield Setup(staged, buckets, parameters, optimizer, share)

    def held(self, problem: Problem, setup: Setup) -> Held:
        """Bytes beside activations."""
        return deepspeed_held(problem.profile.parameters, self.setup_of(problem, setup), setup.family.micro_batches)

    def traffic(self, problem: Problem, setup: Setup) -> Traffic:
        """Bytes of a step."""
        trainable, total = problem.profile.trainable_elements, problem.profile.parameter_elements
        return deepspeed_traffic(self.setup_of(problem, setup), trainable, total, setup.family.micro_batches)

    def setup_of(self, problem: Problem, setup: Setup) -> DeepSpeedSetup:
        """As ``deepspeed_setup.setup_of`` reads it from the plan that is made of this setup."""
        planned = planned_setup(
            setup.family.sharding,
            setup.buckets,
            setup.parameters,
            setup.optimizer,
            setup.gpu_update_share,
            precision=problem.precision,
            device=problem.device,
            largest_elements=max(p.elements for p in problem.profile.parameters),
            param_buffer_count=problem.once("param_buffers", lambda: _param_buffers(problem)),
        )
        return replace(
            planned,
            accumulated_bytes=self.accumulated_bytes,
            communicated_bytes=self.communicated_bytes,
            loss_scaled=self.loss_scaled,
        )


def _param_buffers(problem: Problem) -> int:
    shapes = {p.name: p.shape for p in problem.profile.parameters}
    return param_buffers([s.name for s in problem.shapes], shapes, problem.precision)
