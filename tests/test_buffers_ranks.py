"""Buffers of several ranks: those of the first at the start, each rank's own in training and in checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from memplan.export import Dtype, export
from offload.checkpoint import checked, found
from offload.engine import Engine
from offload.errors import CheckpointError, OffloadError
from offload.plan import Plan, Precision
from tests.plans import RESIDENT, plan_for
from tests.ranks import on_ranks

OTHER_TYPES = (torch.float64, torch.bfloat16, torch.complex64, torch.bool, torch.uint8, torch.int16, torch.int64)


class Features(nn.Module):
    """Random features, a running mean of its own batches, and a buffer of every type; unequal unless seeded alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)
        self.register_buffer("frequencies", torch.randn(6, 6), persistent=False)
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("batches", torch.randint(1 << 40, ()))
        self.register_buffer("mask", torch.randn(3, 1).expand(3, 5))
        self.register_buffer("empty", torch.empty(0))
        self.table = nn.Parameter(torch.randint(100, (7,)), requires_grad=False)
        for dtype in OTHER_TYPES:
            self.register_buffer(f"of_{str(dtype).removeprefix('torch.')}", (torch.randn(9) * 3).abs().to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
                self.batches += 1
        return self.b(torch.tanh(h @ self.frequencies.to(h.dtype) - self.mean)).square().mean()


def rest_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_buffers(), ("table", model.table))}


def plan_of(model: nn.Module, world: int, precision: Precision = Precision.FP32) -> Plan:
    plan = plan_for(model, (RESIDENT,), precision=precision, units=["", "b"])
    return replace(plan, gpus=world, zero_stage=min(2, world))


def engine_of(world: int, seed: int, precision: Precision = Precision.FP32) -> Engine:
    torch.manual_seed(seed)
    model = Features()
    return Engine(model, plan_of(model, world, precision), torch.optim.AdamW(model.parameters(), lr=1e-2))


def steps(engine: Engine, rank: int, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        torch.manual_seed(100 * rank + engine.global_step)
        loss = engine(torch.randn(5, 8))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype == t.dtype and torch.equal(first[n], t) for n, t in second.items()
    )


def begin(rank: int, world: int, precision: Precision) -> dict[str, torch.Tensor]:
    with engine_of(world, rank, precision) as engine:
        return rest_of(engine.model)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_ranks_that_built_other_models_begin_with_the_first_ones_buffers_of_every_type(precision: Precision) -> None:
    torch.manual_seed(0)
    firsts = Features()
    began = on_ranks(2, begin, precision)
    assert same(began[1], began[0])
    for name, tensor in rest_of(firsts).items():
        assert torch.equal(began[1][name], tensor.to(began[1][name].dtype)), name


def begin_with_other_buffers(rank: int, world: int) -> str:
    model = Features()
    model.register_buffer("mean", torch.zeros(6 + rank))
    with pytest.raises(OffloadError) as raised:
        Engine(model, plan_of(model, world))
    return str(raised.value)


def test_ranks_with_buffers_of_other_shapes_are_told() -> None:
    assert all("have other buffers than each other" in error for error in on_ranks(2, begin_with_other_buffers))


def save_and_go_on(rank: int, world: int, directory: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    with engine_of(world, rank) as engine:
        engine.save_checkpoint(f"{directory}/start").wait()
        steps(engine, rank, 3)
        saved = rest_of(engine.model)
        saving = engine.save_checkpoint(directory)
        losses = steps(engine, rank, 3)
        saving.wait()
        return saved, losses


def load_and_go_on(rank: int, world: int, directory: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    with engine_of(world, 9 + rank) as engine:
        engine.load_checkpoint(directory)
        return rest_of(engine.model), steps(engine, rank, 3)


def refuse(rank: int, world: int, directory: str) -> str:
    with engine_of(world, 9 + rank) as engine, pytest.raises(CheckpointError) as raised:
        engine.load_checkpoint(directory)
    return str(raised.value)


def test_each_rank_goes_on_with_its_own_buffers_and_other_numbers_of_ranks_with_the_firsts(tmp_path: Path) -> None:
    saved = on_ranks(2, save_and_go_on, str(tmp_path))
    assert not torch.equal(saved[0][0]["mean"], saved[1][0]["mean"])
    again = on_ranks(2, load_and_go_on, str(tmp_path))
    for (buffers, losses), (expected, undisturbed) in zip(again, saved, strict=True):
        assert same(buffers, expected)
        assert losses == undisturbed
    for buffers, _ in [load_and_go_on(0, 1, str(tmp_path)), *on_ranks(3, load_and_go_on, str(tmp_path))]:
        assert same(buffers, saved[0][0])
    # Only where they differ is there a file of them; the manifest answers for it.
    assert not list(found(tmp_path / "start")["step-0"].glob("buffers-*"))
    path = found(tmp_path)["step-3"]
    assert [p.name for p in path.glob("buffers-*")] == ["buffers-rank-1.safetensors"]
    assert "buffers-rank-1.safetensors" in checked(path).manifest["files"]
    exported = export(path, tmp_path / "exported", Dtype.FP32)
    with safe_open(tmp_path / "exported" / exported.files[0], framework="pt") as file:
        assert torch.equal(file.get_tensor("mean"), saved[0][0]["mean"])
    with (path / "buffers-rank-1.safetensors").open("r+b") as damaged:
        damaged.seek(-1, 2)
        damaged.write(b"\xff")
    assert all("buffers-rank-1.safetensors is damaged" in error for error in on_ranks(2, refuse, str(tmp_path)))
