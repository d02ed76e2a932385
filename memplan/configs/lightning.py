"""Lightning 2.6: a Python file with the strategy and the Trainer.

Lightning's strategy for FSDP2, ModelParallelStrategy, moves the sharded model to the GPU before training, which FSDP2
with offloading refuses. Offloaded plans are therefore written for FSDPStrategy, the first FSDP.
"""

import json
from collections.abc import Mapping
from pprint import pformat
from typing import Any

from memplan.configs.carried import half_of, number
from memplan.configs.comments import commented
from memplan.configs.deepspeed import GRADIENT_CLIPPING
from memplan.configs.fsdp2 import FSDP2Terms, fsdp2_terms, host_checkpoint_note, loss_note
from offload.plan import Plan

TRAINER = '''

def trainer(strategy: Strategy, **more) -> Trainer:
    """The Trainer of the plan with the strategy from above; ``more`` goes on top."""
    planned = {settings}
    return Trainer(strategy=strategy, **planned | more)
'''

DEEPSPEED = '''
import json
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy


def strategy() -> DeepSpeedStrategy:
    """DeepSpeed, as ds_config.json beside this file says."""
    config = json.loads(Path(__file__).with_name("ds_config.json").read_text())
    config.pop("gradient_accumulation_steps", None)  # Lightning sets it from the Trainer
    return DeepSpeedStrategy(config=config)
'''

FSDP2 = '''
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

UNITS = {units}
RECOMPUTED = {recomputed}


def shard(model: nn.Module) -> None:
    """Call it in your LightningModule's configure_model, with the model that was planned for."""
    options = {{
        "mesh": init_device_mesh("{device}", {mesh}, mesh_dim_names={names}),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.{computed}, reduce_dtype=torch.float32),
    }}
    for path in RECOMPUTED:
        checkpoint(model.get_submodule(path))
    for path in UNITS:
        fully_shard(model.get_submodule(path), reshard_after_forward={reshard}, **options)
    fully_shard(model, **options)


def strategy() -> ModelParallelStrategy:
    """FSDP2."""
    return ModelParallelStrategy(data_parallel_size={gpus}, tensor_parallel_size=1)
'''

FSDP1 = '''
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn

UNITS = {units}
RECOMPUTED = {recomputed}


def among(modules: set[nn.Module]):
    """The policy that picks these modules."""
    return lambda module, recurse, nonwrapped_numel: recurse or module in modules


def strategy(model: nn.Module) -> FSDPStrategy:
    """FSDP for the model that was planned for."""
    return FSDPStrategy(
        cpu_offload=True,
        sharding_strategy="{sharding}",
        auto_wrap_policy=among({{model.get_submodule(path) for path in UNITS}}),
        activation_checkpointing_policy=among({{model.get_submodule(path) for path in RECOMPUTED}}),
        device_mesh={mesh},
    )
'''


def lightning_deepspeed(plan: Plan, ds_config: Mapping[str, Any]) -> str:
    """``lightning_deepspeed.py``, which reads ``ds_config.json`` beside it."""
    notes = ["Optimizer: with optimizer state off the GPU use deepspeed.ops.adam.DeepSpeedCPUAdam.", *loss_note(plan)]
    if plan.recompute:
        notes.append(f"Recompute: wrap the plan's {len(plan.recompute)} blocks in torch.utils.checkpoint yourself.")
    notes += host_checkpoint_note(plan)
    if '"auto"' in json.dumps(ds_config):
        notes.append('ds_config.json says "auto", which Lightning does not fill in: write numbers in its place.')
    precision = {"bf16": "bf16-true", "fp16": "16-true"}.get(half_of(plan, ds_config), "32-true")
    return _file(plan, notes, DEEPSPEED, precision, **number("gradient_clip_val", ds_config.get("gradient_clipping")))


def lightning_fsdp2(plan: Plan) -> str:
    """``lightning_fsdp2.py``: FSDP2, or the first FSDP for a plan that offloads."""
    terms = fsdp2_terms(plan)
    notes = [*terms.notes, *loss_note(plan), *host_checkpoint_note(plan)]
    if terms.offload:
        return _offloaded(plan, terms, notes)
    text = FSDP2.format(
        units=_paths(terms.units),
        recomputed=_paths(plan.recompute),
        device=plan.device,
        mesh=(terms.replicas, terms.shard_gpus) if terms.replicas > 1 else (terms.shard_gpus,),
        names='("replicate", "shard")' if terms.replicas > 1 else '("shard",)',
        reshard=terms.reshard_after_forward,
        computed="bfloat16" if terms.mixed else "float32",
        gpus=plan.gpus,
    )
    # The policy of fully_shard casts; a precision of Lightning's own would cast the shards as well.
    return _file(plan, notes, text, "32-true", gradient_clip_val=GRADIENT_CLIPPING)


def _offloaded(plan: Plan, terms: FSDP2Terms, notes: list[str]) -> str:
    notes = [
        "This is the first FSDP: Lightning's strategy for FSDP2 moves the model to the GPU and can not offload.",
        "Clipping: Lightning does not clip by norm with FSDP; in configure_gradient_clipping call"
        f" self.trainer.model.clip_grad_norm_({GRADIENT_CLIPPING}).",
        *notes,
    ]
    text = FSDP1.format(
        units=_paths(terms.units),
        recomputed=_paths(plan.recompute),
        sharding="HYBRID_SHARD" if terms.replicas > 1 else "FULL_SHARD",
        mesh=(terms.replicas, terms.shard_gpus) if terms.replicas > 1 else None,
    )
    return _file(plan, notes, text, "bf16-mixed" if terms.mixed else "32-true")


def _paths(paths: tuple[str, ...]) -> str:
    return pformat(list(paths), width=100, compact=True).replace("'", '"')


def _file(plan: Plan, notes: list[str], text: str, precision: str, **settings: float) -> str:
    everything = {
        "precision": precision,
        "accelerator": "cpu" if plan.device == "cpu" else "gpu",
        "devices": plan.gpus // plan.nodes,
        "num_nodes": plan.nodes,
        "accumulate_grad_batches": plan.gradient_accumulation_steps,
        **settings,
    }
    head = [f"Batch: give your data loader {plan.micro_batch_size} samples.", *notes]
    return commented(head) + text + TRAINER.format(settings=json.dumps(everything, indent=4).replace("\n", "\n    "))
