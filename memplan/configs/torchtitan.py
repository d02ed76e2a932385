"""torchtitan 0.3: its configurations are Python, so this is a module that ``--module`` finds."""

from memplan.configs.comments import commented
from memplan.configs.deepspeed import GRADIENT_CLIPPING
from memplan.configs.fsdp2 import FSDP2Terms, fsdp2_terms, host_checkpoint_note, recompute_note
from offload.plan import Plan

MODULE = '''
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.llama3.config_registry import llama3_8b as base
from torchtitan.trainer import Trainer


def planned() -> Trainer.Config:
    """The plan, over torchtitan's own configuration of the model."""
    config = base()
    config.training.local_batch_size = {local_batch}
    config.training.global_batch_size = {global_batch}
    config.training.max_norm = {clipping}
    config.training.dtype = "float32"
    config.training.mixed_precision_param = "{computed}"
    config.training.enable_cpu_offload = {offload}
    config.training.disable_cuda_graphs = {offload}  # a captured step can not wait for the CPU
    config.parallelism.data_parallel_replicate_degree = {replicas}
    config.parallelism.data_parallel_shard_degree = {shard}
    config.parallelism.fsdp_reshard_after_forward = "{reshard}"
    config.activation_checkpoint = {recompute}
    chunked = isinstance(config.loss, ChunkedLossWrapper.Config)
    loss = config.loss.loss_fn if chunked else config.loss
    config.loss = {loss}
    return config
'''


def torchtitan_module(plan: Plan) -> str:
    """``torchtitan_config.py``: one of torchtitan's own configurations, changed where the plan decides."""
    terms, chunks = fsdp2_terms(plan), plan.loss_chunks
    return commented(_notes(plan, terms)) + MODULE.format(
        local_batch=plan.micro_batch_size,
        global_batch=plan.micro_batch_size * plan.gradient_accumulation_steps * plan.gpus,
        clipping=GRADIENT_CLIPPING,
        computed="bfloat16" if terms.mixed else "float32",
        offload=terms.offload,
        replicas=terms.replicas,
        shard=terms.shard_gpus,
        reshard="always" if terms.reshard_after_forward else "never",
        recompute="FullAC.Config()" if plan.recompute else None,
        loss=f"ChunkedLossWrapper.Config(loss_fn=loss, num_chunks={chunks})" if chunks > 1 else "loss",
    )


def _notes(plan: Plan, terms: FSDP2Terms) -> list[str]:
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
    return notes
