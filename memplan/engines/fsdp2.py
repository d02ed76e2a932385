"""FSDP2 as an engine to plan for: sharded or not after forward, on the GPU or offloaded, flat or within each node."""

from collections.abc import Iterator

from memplan.engines.fsdp2_memory import FSDP2Setup, fsdp2_held, fsdp2_traffic
from memplan.engines.held import Held
from memplan.engines.traffic import Traffic
from memplan.engines.whole import Setup, families_of
from memplan.problem import Problem
from offload.plan import Buckets, Tier


class FSDP2:
    """``fully_shard`` by unit; ZeRO stage 3 stands for resharding after forward, 2 for keeping weights whole."""

    update_seconds = 0.69e-9
    """torch's fused AdamW on 16 cores: of a step of 3.28 s of 3.21e9 offloaded parameters 0.94 s compute and 0.12 s
    the first and last copies."""

    def setups(self, problem: Problem) -> Iterator[Setup]:
        """All of them."""
        for family in families_of(problem):
            # One GPU has nothing to shard: fully_shard then only offloads.
            if family.sharding.zero_stage < 2 and problem.gpus > 1:
                continue
            for tier in (Tier.GPU, Tier.HOST):
                yield Setup(family, Buckets(), tier, tier)

    def held(self, problem: Problem, setup: Setup) -> Held:
        """Bytes beside activations, whichever configuration is used.

        Lightning's shards the plan's units, and those that name classes (Accelerate's, Hugging Face's) the blocks only:
        embedding and head are then part of the root, which stays whole from its forward to its backward.
        """
        blocks = set(problem.profile.blocks)
        parameters, how = problem.profile.parameters, fsdp2_setup(problem, setup)
        by_class = [shape for shape in problem.shapes if not shape.name or shape.name in blocks]
        return fsdp2_held(problem.shapes, parameters, how).or_more(fsdp2_held(by_class, parameters, how))

    def traffic(self, problem: Problem, setup: Setup) -> Traffic:
        """Bytes of a step."""
        return fsdp2_traffic(problem.shapes, problem.profile.parameters, fsdp2_setup(problem, setup))


def fsdp2_setup(problem: Problem, setup: Setup) -> FSDP2Setup:
    """It in FSDP2's terms."""
    sharding = setup.family.sharding
    return FSDP2Setup(
        gpus=problem.gpus,
        nodes=problem.nodes,
        shard_gpus=sharding.shard_gpus,
        precision=problem.precision,
        offload=setup.parameters is not Tier.GPU,
        reshard_after_forward=sharding.zero_stage == 3 or problem.gpus == 1,
        micro_batches=setup.family.micro_batches,
    )
