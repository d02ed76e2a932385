"""Hugging Face: TrainingArguments as JSON, for ``HfArgumentParser.parse_json_file``. Keys of transformers 5."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from memplan.configs.carried import half_of, number
from memplan.configs.deepspeed import GRADIENT_CLIPPING
from memplan.configs.fsdp2 import fsdp2_terms, host_checkpoint_note, loss_note, recompute_note
from offload.plan import Plan

OPTIMIZER = "adamw_torch_fused"


def huggingface_deepspeed(plan: Plan, ds_config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The file for DeepSpeed, which reads ``ds_config.json`` where the job starts, and what is to say about it.

    Where both have a number the Trainer stops unless they agree.
    """
    half = half_of(plan, ds_config)
    arguments = _common(plan, half == "bf16") | ({"fp16": True} if half == "fp16" else {})
    arguments |= number("max_grad_norm", ds_config.get("gradient_clipping"))
    arguments |= _trained(ds_config)
    if plan.recompute:
        arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    notes = [*recompute_note(plan), *host_checkpoint_note(plan), *loss_note(plan)]
    if plan.recompute:
        notes.append("transformers 5.23 calls gradient_checkpointing activation_checkpointing; both work before 6.")
    return _text(arguments | {"deepspeed": "ds_config.json"}), notes


def huggingface_fsdp2(plan: Plan, block_classes: Sequence[str] = ()) -> tuple[str, list[str]]:
    """The file for FSDP2, and what is to say about it."""
    terms = fsdp2_terms(plan)
    fsdp: dict[str, Any] = {
        "version": 2,
        "reshard_after_forward": terms.reshard_after_forward,
        "cpu_offload": terms.offload,
        "activation_checkpointing": bool(plan.recompute),
        "cpu_ram_efficient_loading": plan.gpus > 1,
        "state_dict_type": "SHARDED_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    }
    if block_classes:
        fsdp["transformer_layer_cls_to_wrap"] = list(block_classes)
    arguments = _common(plan, terms.mixed) | {"max_grad_norm": GRADIENT_CLIPPING, "optim": OPTIMIZER}
    arguments |= {"fsdp": True, "fsdp_config": fsdp}
    if plan.gradient_accumulation_steps > 1:
        # Otherwise every GPU holds whole gradients between the micro-batches.
        arguments["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    notes = [*terms.notes, *recompute_note(plan), *host_checkpoint_note(plan), *loss_note(plan)]
    if terms.replicas > 1:
        notes.append(
            f"Sharding: {terms.replicas} copies over {terms.shard_gpus} GPUs each can not be said here; start the job"
            " with accelerate launch and accelerate-fsdp2.yaml, which says it."
        )
    if terms.mixed:
        notes.append("Gradients: they are reduced in bf16.")
    return _text(arguments), notes


def _trained(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says of optimizer and schedule, which the Trainer makes by its sections where they are."""
    found: dict[str, Any] = {} if "optimizer" in ds_config else {"optim": OPTIMIZER}
    of = {name: (ds_config.get(name) or {}).get("params") or {} for name in ("optimizer", "scheduler")}
    betas = of["optimizer"].get("betas")
    first, second = betas if isinstance(betas, list) and len(betas) == 2 else (None, None)
    rate = of["optimizer"].get("lr", of["scheduler"].get("warmup_max_lr"))
    for argument, value in (
        ("learning_rate", rate),
        ("weight_decay", of["optimizer"].get("weight_decay")),
        ("adam_beta1", first),
        ("adam_beta2", second),
        ("adam_epsilon", of["optimizer"].get("eps")),
        ("warmup_steps", of["scheduler"].get("warmup_num_steps")),
    ):
        found |= number(argument, value)
    return found


def _common(plan: Plan, bf16: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "bf16": bf16,
    }
    return arguments | ({"use_cpu": True} if plan.device == "cpu" else {})


def _text(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, indent=2) + "\n"
