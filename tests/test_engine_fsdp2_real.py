"""The counts beside ``fully_shard`` itself, which runs on the CPU over a process group that only pretends."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from memplan.engines.fsdp2_memory import FSDP2Setup, fsdp2_held, fsdp2_traffic
from memplan.engines.held import STEP
from offload.plan import Precision
from offload.residency import UnitShape
from profiler.profile import ParameterProfile

RANKS = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(10, 18), nn.Linear(18, 10), nn.GELU()) for _ in range(3))
        self.norm = nn.LayerNorm(10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.norm(hidden) @ self.embed.weight.t()


class Counted:
    """A collective that counts the bytes of its inputs and does nothing else."""

    def __init__(self, counts: Counter, kind: str) -> None:
        self.counts, self.kind = counts, kind

    def allocate(self, size, *, dtype, device):
        return torch.zeros(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op=None, async_op=False):
        self.counts[self.kind] += min(input_tensor.nbytes, output_tensor.nbytes)


@pytest.fixture
def group():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield dist.init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_fully_shard_gathers_reduces_and_keeps_what_is_counted(group, precision, reshard):
    model, counts = Net(), Counter()
    parameters = [ParameterProfile(n, tuple(p.shape), "float32", True) for n, p in model.named_parameters()]
    units = [UnitShape(name, 0, 0) for name in ("", "blocks.0", "blocks.1", "blocks.2")]
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision is Precision.BF16 else MixedPrecisionPolicy()
    )
    for module in model.blocks:
        fully_shard(module, mesh=group, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=group, mp_policy=policy)
    for module in (model, *model.blocks):
        module.set_custom_all_gather(Counted(counts, "gather"))
        module.set_custom_reduce_scatter(Counted(counts, "reduce"))
    for _ in range(2):
        model(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()

    setup = FSDP2Setup(RANKS, 1, 0, precision, offload=False, reshard_after_forward=reshard, micro_batches=2)
    traffic = fsdp2_traffic(units, parameters, setup)
    assert (RANKS - 1) * counts["gather"] == traffic.gather_bytes
    assert (RANKS - 1) * counts["reduce"] == traffic.reduce_bytes
    local = [p.to_local() for p in model.parameters()]
    state = [t.to_local() for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*local, *state)}
    kept |= {
        g.untyped_storage().data_ptr(): g.untyped_storage().nbytes()
        for g in (p.grad.to_local() for p in model.parameters())
    }
    assert sum(kept.values()) == fsdp2_held(units, parameters, setup).gpu[STEP]
