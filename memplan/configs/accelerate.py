"""Accelerate: the YAML files that ``accelerate launch --config_file`` reads. Keys are those of Accelerate 1.15."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from memplan.configs.comments import commented
from memplan.configs.fsdp2 import fsdp2_terms, loss_note, recompute_note
from offload.plan import Plan, Tier

CPU_THREADS = (
    "The CPU updates offloaded state, and Accelerate gives each rank one thread unless told otherwise: start it with"
    " OMP_NUM_THREADS set to the cores of a node divided by its ranks."
)


def accelerate_deepspeed(plan: Plan, ds_config: Mapping[str, Any]) -> str:
    """For DeepSpeed: everything but the launch is in ``ds_config.json``, which must lie where the job starts."""
    deepspeed: dict[str, Any] = {
        "deepspeed_config_file": "ds_config.json",
        "zero3_init_flag": _stage(ds_config) == 3,
    }
    if plan.nodes > 1:
        deepspeed["deepspeed_multinode_launcher"] = "standard"
    notes = ["Precision, batch and clipping are in ds_config.json; Accelerate refuses them here too."]
    if _offloads(plan):
        notes.append(CPU_THREADS)
    return _file(
        plan, "accelerate-deepspeed.yaml", notes, {"distributed_type": "DEEPSPEED"}, deepspeed_config=deepspeed
    )


def accelerate_fsdp2(plan: Plan, block_classes: Sequence[str] = ()) -> str:
    """For FSDP2. ``block_classes`` are the class names of the model's blocks; transformers' models know their own."""
    terms = fsdp2_terms(plan)
    host = bool(plan.recompute) and plan.checkpoints is Tier.HOST
    fsdp: dict[str, Any] = {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": terms.reshard_after_forward,
        "fsdp_offload_params": terms.offload,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": plan.gpus > 1,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_activation_checkpointing": bool(plan.recompute),
        "fsdp_activation_checkpointing_offload": host,
    }
    notes = [*terms.notes, *recompute_note(plan), *loss_note(plan)]
    if block_classes:
        fsdp["fsdp_transformer_layer_cls_to_wrap"] = ",".join(block_classes)
    else:
        notes.append(
            "Units: a model that is not of transformers must name the class of its blocks in"
            " fsdp_transformer_layer_cls_to_wrap."
        )
    if terms.mixed:
        notes.append("Gradients: Accelerate reduces them in bf16 under mixed_precision bf16.")
    notes += [_batch(plan), "The largest norm of the gradients is your script's: accelerator.clip_grad_norm_."]
    if terms.offload:
        notes.append(CPU_THREADS)
    sections: dict[str, dict[str, Any]] = {"fsdp_config": fsdp}
    if terms.replicas > 1:
        sections["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": terms.replicas,
            "parallelism_config_dp_shard_size": terms.shard_gpus,
        }
    top = {"distributed_type": "FSDP", "mixed_precision": "bf16" if terms.mixed else "no"}
    return _file(plan, "accelerate-fsdp2.yaml", notes, top, **sections)


def _stage(ds_config: Mapping[str, Any]) -> Any:
    section = ds_config.get("zero_optimization")
    return section.get("stage") if isinstance(section, dict) else None


def _offloads(plan: Plan) -> bool:
    return plan.uses(Tier.HOST) or plan.uses(Tier.NVME)


def _batch(plan: Plan) -> str:
    accumulation = plan.gradient_accumulation_steps
    text = f"Batch: give your data loader {plan.micro_batch_size} samples"
    if accumulation == 1:
        return f"{text}."
    return (
        f"{text} and Accelerator a GradientAccumulationPlugin(num_steps={accumulation}, sync_each_batch=True): without"
        " the latter every GPU holds whole gradients between the micro-batches."
    )


def _file(plan: Plan, name: str, notes: list[str], top: dict[str, Any], **sections: dict[str, Any]) -> str:
    head = [f"accelerate launch --config_file {name} train.py"]
    if plan.nodes > 1:
        head.append("On each node add --machine_rank, from 0, and --main_process_ip, the address of the first node.")
    content = {
        "compute_environment": "LOCAL_MACHINE",
        **top,
        "num_machines": plan.nodes,
        "num_processes": plan.gpus,
        "machine_rank": 0,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": plan.device == "cpu",
        "debug": False,
        **sections,
    }
    return commented(head + notes) + yaml.safe_dump(content, sort_keys=False)
