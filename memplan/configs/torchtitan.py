"""torchtitan 0.3: its configurations are Python, so this is a module that ``--module`` finds."""

from memplan.configs.comments import commented
from memplan.configs.deepspeed import GRADIENT_CLIPPING
from memplan.configs.fsdp2 import fsdp2_terms, host_checkpoint_note, recompute_note
from offload.plan import Plan


def torchtitan_module(plan: Plan) -> str:
    """``torchtitan_config.py``: one of torchtitan's own configurations, changed where the plan decides."""
    terms = fsdp2_terms(plan)
    notes = [
        "torchrun ... -m torchtitan.train --module torchtitan_config --config planned",
        "torchtitan trains its own models: put the configuration of yours in place of llama3_8b.",
        *terms.notes,
        *recompute_note(plan),
        *host_checkpoint_note(plan),
    ]
    if terms.offload and terms.shard_gpus == 1:
        notes.append("Offloading: with one GPU torchtitan does not shard, and offloads nothing.")
    if plan.device == "cpu":
        notes.append("Device: torchtitan needs an accelerator.")
    batch = plan.micro_batch_size * plan.gradient_accumulation_steps * plan.gpus
    if plan.loss_chunks > 1:
        loss = [
            "    if not isinstance(config.loss, ChunkedLossWrapper.Config):",
            "        config.loss = ChunkedLossWrapper.Config(loss_fn=config.loss)",
            f"    config.loss.num_chunks = {plan.loss_chunks}",
        ]
    else:
        loss = [
            "    if isinstance(config.loss, ChunkedLossWrapper.Config):",
            "        config.loss = config.loss.loss_fn",
        ]
    settings = {
        "training.local_batch_size": plan.micro_batch_size,
        "training.global_batch_size": batch,
        "training.max_norm": GRADIENT_CLIPPING,
        "training.dtype": '"float32"',
        "training.mixed_precision_param": '"bfloat16"' if terms.mixed else '"float32"',
        "training.enable_cpu_offload": terms.offload,
        # A captured step can not wait for what the CPU does.
        "training.disable_cuda_graphs": terms.offload,
        "parallelism.data_parallel_replicate_degree": terms.replicas,
        "parallelism.data_parallel_shard_degree": terms.shard_gpus,
        "parallelism.fsdp_reshard_after_forward": '"always"' if terms.reshard_after_forward else '"never"',
    }
    lines = [
        "from torchtitan.components.loss import ChunkedLossWrapper",
        *(["from torchtitan.distributed.activation_checkpoint import FullAC"] if plan.recompute else []),
        "from torchtitan.models.llama3.config_registry import llama3_8b as base",
        "from torchtitan.trainer import Trainer",
        "",
        "",
        "def planned() -> Trainer.Config:",
        "    config = base()",
        *(f"    config.{name} = {value}" for name, value in settings.items()),
        f"    config.activation_checkpoint = {'FullAC.Config()' if plan.recompute else None}",
        *loss,
        "    return config",
    ]
    return commented(notes) + "\n" + "\n".join(lines) + "\n"
