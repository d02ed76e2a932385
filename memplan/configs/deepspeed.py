"""``ds_config.json`` from a plan: every key that matters written out, none left to a default.

Keys and meanings are those of DeepSpeed 0.19. What it ignores, wholly or at this stage, or will drop is left out: such
a key decides nothing, and ``memplan lint`` says so of it.
"""

import sys
from collections.abc import Mapping
from typing import Any

from memplan.engines.deepspeed_setup import DeepSpeedSetup, setup_of
from offload.plan import Plan, Precision, Target, Tier

GRADIENT_CLIPPING = 1.0
AIO = {
    "block_size": 1 << 20,
    "queue_depth": 32,
    # The documentation names it thread_count, which the code does not read.
    "intra_op_parallelism": 4,
    "single_submit": False,
    "overlap_events": True,
    "use_gds": False,
}
LOWER_PRECISION_MODULES = [
    f"torch.nn.modules.{name}" for name in ("linear.Linear", "conv.Conv1d", "conv.Conv2d", "conv.Conv3d")
]
DEVICES = {Tier.GPU: "none", Tier.HOST: "cpu", Tier.NVME: "nvme"}


def ds_config(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's configuration, and one sentence for everything it can not express or does otherwise.

    DeepSpeed moves whole tiers: where any unit of the plan keeps something off the GPU, all units do here. Stages
    follow from that: optimizer state on NVMe and any parameter off the GPU need stage 3. A plan whose target is
    DeepSpeed is written as it is.
    """
    setup = setup_of(plan)
    weights = "bf16" if plan.precision is Precision.BF16 else "fp32"
    config: dict[str, Any] = {
        "train_batch_size": plan.micro_batch_size * plan.gradient_accumulation_steps * plan.gpus,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": GRADIENT_CLIPPING,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": weights,
        "data_types": {"grad_accum_dtype": weights},
        "bf16": {
            "enabled": plan.precision is Precision.BF16,
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        "torch_autocast": {
            "enabled": plan.precision is Precision.AMP,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": LOWER_PRECISION_MODULES,
        },
        "zero_optimization": _zero(plan, setup),
        "activation_checkpointing": {
            "partition_activations": False,
            "cpu_checkpointing": _host_checkpoints(plan),
            "contiguous_memory_optimization": False,
            # Asked for with contiguous_memory_optimization only.
            "number_checkpoints": None,
            "synchronize_checkpoint_boundary": False,
            "profile": False,
        },
        "zero_allow_untested_optimizer": False,
        # Any other optimizer would update offloaded state several times as slowly, and in silence.
        "zero_force_ds_cpu_optimizer": setup.optimizer is not Tier.GPU,
        "dataloader_drop_last": False,
        "dump_state": False,
        "memory_breakdown": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 10,
    }
    if Tier.NVME in (setup.parameters, setup.optimizer):
        config["aio"] = dict(AIO)
    return config, ds_notes(plan, config)


def _zero(plan: Plan, setup: DeepSpeedSetup) -> dict[str, Any]:
    stage = setup.zero_stage
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": setup.contiguous_gradients,
        "overlap_comm": setup.overlap_comm,
        "reduce_scatter": True,
        "reduce_bucket_size": setup.reduce_elements,
        "use_multi_rank_bucket_allreduce": True,
        "round_robin_gradients": stage in (1, 2) and setup.optimizer is Tier.HOST,
        "load_from_fp32_weights": True,
        "ignore_unused_parameters": True,
        "parameter_alignment": False,
    }
    if stage in (1, 2):
        section["allgather_bucket_size"] = setup.gather_elements
    if stage > 0:
        section["offload_optimizer"] = _offload(plan, setup.optimizer, setup) | {
            "buffer_count": setup.optimizer_buffer_count,
            "pipeline_read": setup.pipeline_read,
            "pipeline_write": setup.pipeline_write,
            "ratio": 1.0 - setup.gpu_update_share,
            "fast_init": False,
            "super_offload": False,
        }
    if stage == 3:
        nvme = setup.parameters is Tier.NVME
        # Each staging buffer must hold the largest parameter, or swapping stops on "Not enough buffers".
        section["offload_param"] = _offload(plan, setup.parameters, setup) | {
            "buffer_count": setup.param_buffer_count,
            "buffer_size": setup.param_buffer_elements,
            "max_in_cpu": 0,
        }
        section |= {
            "sub_group_size": setup.sub_group_elements,
            "stage3_prefetch_bucket_size": setup.gather_elements,
            "stage3_param_persistence_threshold": setup.persistence_elements,
            "stage3_model_persistence_threshold": sys.maxsize,
            "stage3_max_live_parameters": setup.live_elements,
            # A parameter that stays on the GPU for its next use keeps its buffer for what comes from NVMe.
            "stage3_max_reuse_distance": 0 if nvme else setup.live_elements,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_module_granularity_threshold": 0,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_allgather_sequential": False,
            "zero_hpz_partition_size": setup.hpz,
            "zero_quantized_weights": False,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": False,
            "memory_efficient_linear": True,
            "override_module_apply": True,
            "pipeline_loading_checkpoint": False,
        }
    return section


def _offload(plan: Plan, tier: Tier, setup: DeepSpeedSetup) -> dict[str, Any]:
    section: dict[str, Any] = {"device": DEVICES[tier]}
    if tier is Tier.NVME:
        section["nvme_path"] = plan.nvme_dir
    return section | {"pin_memory": setup.pin_memory}


def _host_checkpoints(plan: Plan) -> bool:
    return bool(plan.recompute) and plan.checkpoints is Tier.HOST


def ds_notes(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """One sentence for everything of the plan that this configuration can not express or does otherwise."""
    setup = setup_of(plan)
    return [*_placement_notes(plan, setup), *_script_notes(plan, setup, "optimizer" in config)]


def _placement_notes(plan: Plan, setup: DeepSpeedSetup) -> list[str]:
    """What DeepSpeed places otherwise than the plan."""
    notes = []
    stage, optimizer = setup.zero_stage, setup.optimizer
    for what, tiers, furthest in (
        ("Parameters", {p.parameters for p in plan.placements}, setup.parameters),
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
    if plan.gpu_update_share and not setup.gpu_update_share and optimizer is not Tier.GPU:
        notes.append(
            f"Update: the plan gives {plan.gpu_update_share:.0%} of it to the GPU; here the CPU does all of it, because"
            " DeepSpeed splits it only in stage 3 with the state in host memory, and then keeps that share on the GPU."
        )
    if plan.shard_gpus not in (0, plan.gpus):
        if setup.hpz > 1:
            notes.append(
                f"Hierarchical sharding: optimizer state is divided over all {plan.gpus} GPUs; each group of"
                f" {setup.hpz} holds one more copy of the weights (zero_hpz_partition_size), for backward's gathers."
            )
        else:
            notes.append(
                f"Hierarchical sharding over {plan.shard_gpus} GPUs: DeepSpeed has it in stage 3 only, so all"
                f" {plan.gpus} share one copy here."
            )
    if plan.target is not Target.DEEPSPEED and plan.precision is Precision.BF16:
        notes.append(
            "Memory: the plan counts 12 to 14 bytes a parameter as memplan's engine needs; DeepSpeed keeps 16 and"
            " more. Make the plan with --engine deepspeed to have that counted."
        )
    return notes


def _script_notes(plan: Plan, setup: DeepSpeedSetup, makes_optimizer: bool) -> list[str]:
    """What the training script has to do."""
    notes = []
    if setup.zero_init:
        notes.append(
            "Model: build it inside of deepspeed.zero.Init(config_dict_or_path=...), or each GPU holds all of it while"
            " DeepSpeed starts."
        )
    if plan.precision is not Precision.BF16:
        notes.append("Model: keep its parameters in float32; DeepSpeed refuses others in this precision.")
    if plan.recompute:
        blocks = f"the {len(plan.recompute)} blocks ({plan.recompute[0]} ...)"
        if _host_checkpoints(plan):
            notes.append(
                f"Recompute with inputs kept on the host: run {blocks} through deepspeed.checkpointing.checkpoint after"
                " deepspeed.checkpointing.configure(None, deepspeed_config=...); only those obey cpu_checkpointing."
            )
        else:
            notes.append(
                f"Recompute: no key turns it on. Wrap {blocks} in torch.utils.checkpoint, or call"
                " model.gradient_checkpointing_enable()."
            )
    if plan.loss_chunks > 1:
        notes.append(
            f"Loss: no key cuts it; compute head and loss in {plan.loss_chunks} pieces in the script, each under"
            " torch.utils.checkpoint."
        )
    if makes_optimizer:
        return notes
    optimizer = "deepspeed.ops.adam.FusedAdam, or torch.optim.AdamW with fused=True"
    if setup.optimizer is not Tier.GPU:
        optimizer = "deepspeed.ops.adam.DeepSpeedCPUAdam; DeepSpeed refuses others for offloaded state"
    notes.append(f"Optimizer and learning rate are left to the training script: use {optimizer}.")
    return notes
