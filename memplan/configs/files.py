"""All configuration files of a plan: {filename: text}."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from memplan.configs.accelerate import accelerate_deepspeed, accelerate_fsdp2
from memplan.configs.deepspeed import ds_config, ds_notes
from memplan.configs.huggingface import huggingface_deepspeed, huggingface_fsdp2
from memplan.configs.lightning import lightning_deepspeed, lightning_fsdp2
from memplan.configs.torchrun import EXPANDABLE, SETTINGS, launch_script
from memplan.configs.torchtitan import torchtitan_module
from offload.errors import PlanError
from offload.plan import MomentFormat, OptimizerKind, Plan, Precision, Target
from profiler.profile import ModelProfile

NOTES = "NOTES.md"
NAMES = (
    "launch.sh",
    "ds_config.json",
    "accelerate-deepspeed.yaml",
    "huggingface-deepspeed.json",
    "lightning_deepspeed.py",
    "accelerate-fsdp2.yaml",
    "huggingface-fsdp2.json",
    "lightning_fsdp2.py",
    "torchtitan_config.py",
    NOTES,
)
"""Every file that there may be."""
ALLOCATOR = f"""
Memory: train with {SETTINGS}={EXPANDABLE} in the environment. launch.sh sets it where it
starts your script. With segments of fixed sizes PyTorch's allocator keeps pieces that fit nobody, and a plan near its
budget can run out of memory: one of five did on an H200, with 12 GiB of such pieces.
"""
HEAD = "What these files can not say of the plan, or say otherwise. Other files have it in comments of their own.\n"


def configurations(
    plan: Plan, block_classes: Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """For a plan of memplan's own engine everything, translated; for another engine's plan the files of that engine.

    What a target can not express stands in a comment in its file, or where JSON has none in ``NOTES.md``.
    ``block_classes`` are the class names of the model's blocks (``block_classes_of``), which FSDP2 asks for; a model of
    transformers is known without. ``given`` is DeepSpeed's configuration where there is one that is to be written as it
    is. Raises PlanError for a plan in fp16.
    """
    if plan.precision is Precision.FP16:
        raise PlanError("plans in fp16 are for memplan's own engine only: there are no configurations of others for it")
    files, notes = {"launch.sh": launch_script(plan)}, {}
    if plan.target is not Target.FSDP2:
        config, notes["ds_config.json"] = (given, ds_notes(plan, given)) if given is not None else ds_config(plan)
        files["ds_config.json"] = json.dumps(config, indent=2) + "\n"
        files["accelerate-deepspeed.yaml"] = accelerate_deepspeed(plan, config)
        name = "huggingface-deepspeed.json"
        files[name], notes[name] = huggingface_deepspeed(plan, config)
        files["lightning_deepspeed.py"] = lightning_deepspeed(plan, config)
    if plan.target is not Target.DEEPSPEED:
        files["accelerate-fsdp2.yaml"] = accelerate_fsdp2(plan, block_classes)
        name = "huggingface-fsdp2.json"
        files[name], notes[name] = huggingface_fsdp2(plan, block_classes)
        files["lightning_fsdp2.py"] = lightning_fsdp2(plan)
        files["torchtitan_config.py"] = torchtitan_module(plan)
    sections = (f"\n## {name}\n\n" + "".join(f"- {n}\n" for n in said) for name, said in notes.items() if said)
    return files | {NOTES: HEAD + ALLOCATOR + _optimizer_notes(plan) + "".join(sections)}


def _optimizer_notes(plan: Plan) -> str:
    """Of what concerns every file."""
    said = ""
    if plan.optimizer not in (OptimizerKind.ADAMW, OptimizerKind.ADAM):
        said += (
            f"\nOptimizer: the plan is for {plan.optimizer}, and these files train with AdamW, which keeps 8 bytes a "
            f"parameter beside the weight. To train with {plan.optimizer} make it in your script, where the engine "
            "takes it; what is predicted is for that.\n"
        )
    if plan.moments is not MomentFormat.FP32:
        said += (
            f"\nMoments: the plan stores them in {plan.moments}, which these engines do not do by these files: their "
            "optimizer's state takes more than the plan says.\n"
        )
    return said


def block_classes_of(profile: ModelProfile) -> tuple[str, ...]:
    """Class names of the profile's blocks, each once."""
    types = {layer.path: layer.type for layer in profile.layers}
    return tuple(dict.fromkeys(types[path] for path in profile.blocks if path in types))
