"""A plan of one family of candidates: what plans for every engine say alike."""

from memplan.described_disk import DESCRIBED_DIRECTORY
from memplan.machine import Machine
from memplan.problem import Family, Problem
from offload.plan import Buckets, Placement, Plan, Prediction, Tier


def family_plan(
    problem: Problem,
    family: Family,
    machine: Machine,
    *,
    placements: tuple[Placement, ...],
    buckets: Buckets,
    prediction: Prediction,
    gpu_update_share: float = 0.0,
    on_meta: bool = False,
) -> Plan:
    """The plan of a family with these placements; ``reasons`` and ``alternatives`` are left to whoever searched."""
    way, sharding = family.way, family.sharding
    on_disk = any(Tier.NVME in (p.optimizer, p.parameters) for p in placements)
    return Plan(
        model=problem.profile.model,
        parameter_shapes={p.name: p.shape for p in problem.profile.parameters},
        precision=problem.precision,
        device=problem.device,
        gpus=problem.gpus,
        zero_stage=sharding.zero_stage,
        placements=placements,
        buckets=buckets,
        micro_batch_size=way.micro_batch_size,
        gradient_accumulation_steps=family.micro_batches,
        recompute=problem.profile.blocks[: way.recomputed_blocks],
        budget=problem.budget,
        prediction=prediction,
        nvme_dir=str(machine.nvme_dir or DESCRIBED_DIRECTORY) if on_disk else None,
        target=problem.target,
        nodes=problem.nodes,
        shard_gpus=sharding.shard_gpus,
        checkpoints=way.checkpoints,
        loss_chunks=way.loss_chunks,
        gpu_update_share=gpu_update_share,
        optimizer=problem.form.optimizer,
        moments=problem.form.moments,
        on_meta=on_meta,
    )
