"""What tests import: checkpoints that DeepSpeed makes, by two ranks on the CPU. Run by torchrun, with a folder.

For each case it trains, saves, and trains on: the folder has the checkpoint, what DeepSpeed's own reader makes of it,
the losses that follow, and the parameters in the end.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, STEPS, GLOBAL_BATCH = 11, 3, 4


class Small(nn.Module):
    """Tied and frozen weights, buffers of both kinds, and sizes that divide by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.up, self.norm, self.down = nn.Linear(8, 7), nn.LayerNorm(7), nn.Linear(7, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        self.register_buffer("not_kept", torch.ones(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embedding(tokens)) * self.scale.prod() * self.not_kept[0]
        hidden = self.down(torch.tanh(self.norm(self.up(hidden))))
        return functional.cross_entropy(self.head(hidden).float().flatten(0, 1), tokens.flatten())

    def groups(self) -> list[dict[str, Any]]:
        """With and without weight decay, of different rates."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-2},
        ]


def batch(step: int) -> torch.Tensor:
    """The global batch of a step."""
    return torch.randint(0, VOCABULARY, (GLOBAL_BATCH, 5), generator=torch.Generator().manual_seed(step))


@dataclass(frozen=True)
class Case:
    """One training: what is beside ZeRO's stage in the configuration, and the person's own optimizer, if any."""

    stage: int
    precision: str = "fp32"
    optimizer: Any = torch.optim.AdamW
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def momentum(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """SGD with it."""
    return torch.optim.SGD(groups, lr=lr, momentum=0.8)


CASES = {
    "1": Case(1),
    "2": Case(2),
    "2-round-robin": Case(2, zero={"round_robin_gradients": True}),
    "2-bf16": Case(2, "bf16"),
    "2-fp16": Case(2, "fp16"),
    "3": Case(3),
    "3-sub-groups": Case(3, zero={"sub_group_size": 60}),
    "3-bf16": Case(3, "bf16", torch.optim.Adam),
    "2-momentum": Case(2, optimizer=momentum),
    "1-configured": Case(
        1,
        optimizer=None,
        config={"optimizer": {"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}},
    ),
}


def main(folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.comm.torch as its_comm
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import save_file
    from torch import distributed as dist

    its_comm.build_shm_op = lambda: None  # it would be compiled
    deepspeed.init_distributed(dist_backend="gloo")
    rank, per_rank = dist.get_rank(), GLOBAL_BATCH // dist.get_world_size()

    def whole(path: Path) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in get_fp32_state_dict_from_zero_checkpoint(str(path)).items()}

    for name, case in CASES.items():
        torch.manual_seed(0)
        model = Small()
        given = case.optimizer(model.groups(), lr=1e-2) if case.optimizer is not None else None
        config = {
            "train_micro_batch_size_per_gpu": per_rank,
            "zero_optimization": {"stage": case.stage, **case.zero},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            **({case.precision: {"enabled": True}} if case.precision != "fp32" else {}),
            **({"fp16": {"enabled": True, "initial_scale_power": 8}} if case.precision == "fp16" else {}),
            **case.config,
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=given, config=config, model_parameters=model.groups() if given is None else None
        )
        losses = []
        for step in range(2 * STEPS):
            loss = engine(batch(step)[rank * per_rank : (rank + 1) * per_rank])
            engine.backward(loss)
            engine.step()
            mean = loss.detach().float() / dist.get_world_size()
            dist.all_reduce(mean)
            losses.append(mean.item())
            if step + 1 in (STEPS, 2 * STEPS):
                state = {"epoch": 2, "seen": (step, 0.5)}
                engine.save_checkpoint(str(folder / name / f"after-{step + 1}"), tag="some-tag", client_state=state)
                dist.barrier()
                if rank == 0:
                    save_file(
                        whole(folder / name / f"after-{step + 1}"), folder / name / f"whole-{step + 1}.safetensors"
                    )
                dist.barrier()
        if rank == 0:
            (folder / name / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
