"""A plan in FSDP2's terms: what its configurations, in whatever format, have in common."""

from dataclasses import dataclass

from offload.plan import Placement, Plan, Precision, Target, Tier


@dataclass(frozen=True)
class FSDP2Terms:
    """What can be said to FSDP2, and one sentence for everything in the plan that can not."""

    offload: bool
    """Parameters, gradients and optimizer state of all units wait in host memory."""
    reshard_after_forward: bool
    shard_gpus: int
    """Ranks that share one copy of the model."""
    replicas: int
    """Copies of the model."""
    mixed: bool
    """Units are gathered and computed in bf16, over fp32 shards."""
    units: tuple[str, ...]
    """Paths of the modules that are sharded apart; the rest of the model is the root."""
    notes: tuple[str, ...]


def fsdp2_terms(plan: Plan) -> FSDP2Terms:
    """The plan as FSDP2 can carry it out: it offloads every unit or none, to host memory only."""
    shard = plan.shard_gpus if plan.shard_gpus > 1 else plan.gpus
    offload = any(offloaded(p) for p in plan.placements)
    return FSDP2Terms(
        offload=offload,
        reshard_after_forward=plan.zero_stage == 3 or plan.gpus == 1 or offload,
        shard_gpus=shard,
        replicas=plan.gpus // shard,
        mixed=plan.precision is not Precision.FP32,
        units=tuple(p.unit for p in plan.placements if p.unit),
        notes=tuple(_notes(plan, offload)),
    )


def offloaded(placement: Placement) -> bool:
    """Whether any of it is off the GPU."""
    return any(t is not Tier.GPU for t in (placement.parameters, placement.gradients, placement.optimizer))


def _notes(plan: Plan, offload: bool) -> list[str]:
    notes = []
    if plan.target is not Target.FSDP2:
        notes.append(f"The plan was made for {plan.target.value}: its predictions do not hold for FSDP2.")
    if offload and len({(p.parameters, p.gradients, p.optimizer) for p in plan.placements}) > 1:
        notes.append("Placement: the plan places its units differently; FSDP2 offloads all of them or none, here all.")
    if any(offloaded(p) and p.parameters is Tier.GPU for p in plan.placements):
        notes.append("Placement: the plan keeps weights on the GPU; FSDP2 offloads them with their optimizer state.")
    if plan.uses(Tier.NVME):
        notes.append("NVMe: FSDP2 has no such tier; what the plan keeps there needs room in host memory.")
    if plan.gpus > 1 and plan.zero_stage < 2:
        notes.append(f"ZeRO stage {plan.zero_stage}: FSDP2 shards parameters, gradients and state, always (stage 2).")
    if plan.shard_gpus == 1 and plan.gpus > 1:
        notes.append("Sharding: copies on single GPUs are no sharding; all GPUs share one copy instead.")
    if plan.precision is Precision.BF16:
        notes.append("Precision: FSDP2 keeps fp32 shards, 16 bytes a parameter, where split bf16 masters take 14.")
    if plan.precision is Precision.AMP:
        notes.append("Precision: units are cast to bf16 as they are gathered, in place of autocast alone.")
    if offload and plan.gpu_update_share:
        notes.append("Update: FSDP2 updates offloaded state on the CPU alone; the GPU takes no share.")
    if plan.buckets.prefetch_units > 1:
        notes.append("Prefetch: one unit ahead; more by set_modules_to_forward_prefetch in your script.")
    return notes


def loss_note(plan: Plan) -> list[str]:
    """For targets that leave the loss to the model."""
    if plan.loss_chunks == 1:
        return []
    return [f"Loss: the plan computes head and loss in {plan.loss_chunks} chunks; your model has to do that itself."]


def recompute_note(plan: Plan) -> list[str]:
    """For targets that recompute all blocks or none, and can not tell blocks apart."""
    if not plan.recompute:
        return []
    first, last = plan.recompute[0], plan.recompute[-1]
    return [f"Recompute: all blocks or none, here all; the plan names {len(plan.recompute)}, from {first} to {last}."]


def host_checkpoint_note(plan: Plan) -> list[str]:
    """For targets that keep the inputs of recomputed blocks on the GPU."""
    if plan.checkpoints is Tier.GPU or not plan.recompute:
        return []
    return ["Checkpoints: the plan keeps the inputs of recomputed blocks in host memory; here they stay on the GPU."]
