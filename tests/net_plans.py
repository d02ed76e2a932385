"""Plans for a small model, of all kinds, for tests of what is made of plans."""

from dataclasses import replace

from hypothesis import strategies as st
from torch import nn

from memplan.rates import PLANNED
from offload.plan import Buckets, Budget, Placement, Plan, Precision, Prediction, Target, Tier
from tests.plans import EVERY_TIER, RESIDENT

H = Tier.HOST
AWAY = (H, H, H)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(nn.init.ones_(nn.Linear(4, 1).weight.detach()))

    def forward(self, x):
        x = self.embed(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return x


UNITS = ("", "embed", "blocks.0", "blocks.1", "blocks.2")
PLAN = Plan(
    model="Net",
    parameter_shapes={name: tuple(p.shape) for name, p in Net().named_parameters()},
    precision=Precision.BF16,
    device="cuda",
    gpus=8,
    zero_stage=3,
    placements=tuple(Placement(u, *RESIDENT) for u in UNITS),
    buckets=Buckets(),
    micro_batch_size=2,
    gradient_accumulation_steps=3,
    recompute=("blocks.0", "blocks.1", "blocks.2"),
    budget=Budget(1 << 40, 1 << 40, 1 << 40),
    prediction=Prediction(0, 0, 0, 0, None, None),
    target=Target.FSDP2,
)
OFFLOADED = replace(PLAN, placements=tuple(Placement(u, *AWAY) for u in UNITS))
HYBRID = replace(PLAN, gpus=16, nodes=2, shard_gpus=8)
DEEPSPEED = replace(OFFLOADED, target=Target.DEEPSPEED)


@st.composite
def plans(draw) -> Plan:
    """Any valid plan for Net."""
    nodes, ranks = draw(st.sampled_from([(1, 1), (1, 2), (1, 8), (2, 1), (3, 4)]))
    tiers = draw(st.lists(st.sampled_from(EVERY_TIER), min_size=len(UNITS), max_size=len(UNITS)))
    return replace(
        PLAN,
        placements=tuple(Placement(u, *t) for u, t in zip(UNITS, tiers, strict=True)),
        gpus=nodes * ranks,
        nodes=nodes,
        shard_gpus=draw(st.sampled_from([0, ranks, nodes * ranks])),
        zero_stage=draw(st.integers(0, 3)),
        precision=draw(st.sampled_from(PLANNED)),
        device=draw(st.sampled_from(["cuda", "cpu"])),
        target=draw(st.sampled_from(Target)),
        micro_batch_size=draw(st.integers(1, 9)),
        gradient_accumulation_steps=draw(st.integers(1, 9)),
        recompute=draw(st.sampled_from([(), ("blocks.1",), PLAN.recompute])),
        checkpoints=draw(st.sampled_from([Tier.GPU, Tier.HOST])),
        loss_chunks=draw(st.integers(1, 4)),
        gpu_update_share=draw(st.sampled_from([0.0, 0.3])),
        nvme_dir="/swap: #1",
    )
