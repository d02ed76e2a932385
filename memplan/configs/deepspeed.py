"""``ds_config.json`` from a plan: every key that matters written out, none left to a default.

Keys and meanings are those of DeepSpeed 0.19.
"""

from math import prod
from typing import Any

from offload.plan import Plan, Precision, Tier

GRADIENT_CLIPPING = 1.0
AIO_BLOCK_BYTES = 1 << 20
AIO_QUEUE_DEPTH = 32
AIO_THREADS = 4
PARAM_BUFFERS, OPTIMIZER_BUFFERS = 5, 4
SUB_GROUP_ELEMENTS = 100_000_000


def ds_config(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's configuration, and one sentence for everything it can not express or does otherwise.

    DeepSpeed moves whole tiers: where any unit of the plan keeps something off the GPU, all units do here. Stages
    follow from that: optimizer state on NVMe and any parameter off the GPU need stage 3.
    """
    parameters = _furthest([p.parameters for p in plan.placements])
    optimizer = _furthest([p.optimizer for p in plan.placements])
    stage = _stage(plan, parameters, optimizer)
    config: dict[str, Any] = {
        "train_batch_size": plan.micro_batch_size * plan.gradient_accumulation_steps * plan.gpus,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": GRADIENT_CLIPPING,
        "bf16": {"enabled": plan.precision is Precision.BF16},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": plan.precision is Precision.AMP, "dtype": "bfloat16"},
        "zero_optimization": _zero(plan, stage, parameters, optimizer),
        "activation_checkpointing": {
            "partition_activations": False,
            "cpu_checkpointing": False,
            "contiguous_memory_optimization": False,
            "synchronize_checkpoint_boundary": False,
        },
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": optimizer is not Tier.GPU,
        "wall_clock_breakdown": False,
        "steps_per_print": 10,
    }
    if Tier.NVME in (parameters, optimizer):
        config["aio"] = {
            "block_size": AIO_BLOCK_BYTES,
            "queue_depth": AIO_QUEUE_DEPTH,
            "intra_op_parallelism": AIO_THREADS,
            "single_submit": False,
            "overlap_events": True,
            "use_gds": False,
        }
    return config, _notes(plan, stage, parameters, optimizer)


def _furthest(tiers: list[Tier]) -> Tier:
    return max(tiers, key=lambda tier: tier.depth)


def _stage(plan: Plan, parameters: Tier, optimizer: Tier) -> int:
    if parameters is not Tier.GPU or optimizer is Tier.NVME:
        return 3
    return max(plan.zero_stage, 1 if optimizer is Tier.HOST else 0)


def _largest(plan: Plan) -> int:
    return max((prod(shape) for shape in plan.parameter_shapes.values()), default=1)


def _zero(plan: Plan, stage: int, parameters: Tier, optimizer: Tier) -> dict[str, Any]:
    total = sum(prod(shape) for shape in plan.parameter_shapes.values())
    bucket = max(plan.buckets.reduce_elements, 1)
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": stage > 0,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": stage in (1, 2) and optimizer is Tier.HOST,
    }
    if stage > 0:
        section["offload_optimizer"] = _offload(plan, optimizer)
        section["offload_optimizer"]["buffer_count"] = OPTIMIZER_BUFFERS
        section["offload_optimizer"] |= {"pipeline_read": optimizer is Tier.NVME, "pipeline_write": False}
        section["offload_optimizer"] |= {"ratio": 1.0, "fast_init": False}
    if stage == 3:
        # Each parameter staging buffer must hold the largest parameter, or swapping stops on "Not enough buffers".
        section["offload_param"] = _offload(plan, parameters) | {
            "buffer_count": PARAM_BUFFERS,
            "buffer_size": max(_largest(plan), min(total, 100_000_000)),
            "max_in_cpu": 0 if parameters is Tier.NVME else total,
        }
        prefetch = min(total, max(1, plan.buckets.prefetch_units) * (total // max(1, len(plan.placements))))
        section |= {
            "sub_group_size": min(total, max(SUB_GROUP_ELEMENTS, _largest(plan))),
            "stage3_prefetch_bucket_size": prefetch,
            "stage3_param_persistence_threshold": min(100_000, _largest(plan)),
            "stage3_max_live_parameters": total if parameters is Tier.GPU else 2 * max(prefetch, _largest(plan)),
            "stage3_max_reuse_distance": total if parameters is Tier.GPU else 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return section


def _offload(plan: Plan, tier: Tier) -> dict[str, Any]:
    section: dict[str, Any] = {"device": {Tier.GPU: "none", Tier.HOST: "cpu", Tier.NVME: "nvme"}[tier]}
    if tier is Tier.NVME:
        section["nvme_path"] = plan.nvme_dir
    return section | {"pin_memory": plan.device == "cuda"}


def _notes(plan: Plan, stage: int, parameters: Tier, optimizer: Tier) -> list[str]:
    notes = []
    for what, tiers, furthest in (
        ("Parameters", {p.parameters for p in plan.placements}, parameters),
        ("Optimizer state", {p.optimizer for p in plan.placements}, optimizer),
    ):
        if len(tiers) > 1:
            kept = ", ".join(sorted(tier.value for tier in tiers))
            notes.append(
                f"{what}: the plan keeps units on {kept}; DeepSpeed moves whole tiers, so all go to {furthest.value}."
            )
    if stage != plan.zero_stage:
        notes.append(f"ZeRO stage {stage} instead of {plan.zero_stage}: this offloading needs it in DeepSpeed.")
    if stage and optimizer is not Tier.GPU and Tier.GPU in {p.gradients for p in plan.placements}:
        notes.append("Gradients: the plan keeps some on the GPU; DeepSpeed moves them with the optimizer state.")
    if plan.recompute:
        notes.append(
            f"Recompute: no key turns it on. Wrap the {len(plan.recompute)} blocks ({plan.recompute[0]} ...) in "
            "torch.utils.checkpoint, or call model.gradient_checkpointing_enable()."
        )
    if plan.precision is Precision.BF16:
        notes.append("Memory: DeepSpeed keeps 16 bytes a parameter and more where the plan counts 12 to 14.")
    notes.append("Optimizer and learning rate are left to the training script.")
    return notes
