"""Checkpoints of a model whose tensors are divided: each process writes its part, and any division goes on from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from memplan.export import Dtype, export
from offload.checkpoint import checked, found
from offload.engine import Engine
from offload.plan import Precision
from tests.plans import EVERY_TIER, plan_for
from tests.ranks import on_ranks
from tests.tensor_models import FrozenTensorGPT
from tests.test_engine_equals_pytorch import optimizer_of, scheduler_of
from tests.test_engine_ranks import global_batches, parts_of
from tests.test_engine_tensor_parallel import TENSOR, Case, engine_of

SAVED = Case("sequence", 3, "mixed", FrozenTensorGPT, precision=Precision.BF16)
OTHER = Case("columns", 1, "gpu", FrozenTensorGPT, precision=Precision.BF16)
DATA = 2
"""Parts of a global batch, for one rank of the data axis or two."""


def steps(engine: Engine, data_rank: int, data: int, count: int) -> list[float]:
    losses = []
    for tokens in parts_of(global_batches(5, DATA)[engine.global_step :][:count], data, data_rank):
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def save_and_go_on(rank: int, world: int, case: Case, directory: str) -> tuple[list[Any], list[Any]]:
    """The parameters when it was saved, losses and parameters after it; and the same of who goes on from it."""
    with engine_of(case, rank, world, directory) as engine:
        steps(engine, rank // TENSOR, world // TENSOR, 3)
        before = engine.state_dict()
        saving = engine.save_checkpoint(directory)
        losses = steps(engine, rank // TENSOR, world // TENSOR, 2)
        saving.wait()
        after = engine.state_dict()
    return [before, losses, after], load_and_go_on(rank, world, case, directory)


def load_and_go_on(rank: int, world: int, case: Case, directory: str) -> list[Any]:
    with engine_of(case, rank, world, directory, seed=9) as engine:
        engine.load_checkpoint(directory)
        before = engine.state_dict()
        return [before, steps(engine, rank // TENSOR, world // TENSOR, 2), engine.state_dict()]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_what_four_processes_saved_goes_on_in_any_division(tmp_path: Path) -> None:
    saved = on_ranks(4, save_and_go_on, SAVED, str(tmp_path))
    path = found(tmp_path)["step-3"]
    files = {p.name for p in path.glob("rank-*")}
    assert files == {f"rank-{d}-tensor-{t}.safetensors" for d in range(2) for t in range(TENSOR)}
    assert checked(path).manifest["tensor_parallel"] == TENSOR
    for (before, losses, after), again in saved:  # on the same mesh to the last bit
        assert equal(again[0], before)
        assert again[1] == losses
        assert equal(again[2], after)
    # Divided in another way, by two processes: the same numbers to go on from, and training alike.
    whole, expected = saved[0][0][0], [sum(pair) / 2 for pair in zip(saved[0][0][1], saved[2][0][1], strict=True)]
    for before, losses, _ in on_ranks(2, load_and_go_on, OTHER, str(tmp_path)):
        assert equal(before, whole)
        assert losses == pytest.approx(expected, rel=2e-2)
    # By one process, without a mesh; and as files for other programs.
    model = FrozenTensorGPT()
    optimizer = optimizer_of(model)
    with Engine(
        model, plan_for(model, EVERY_TIER, tmp_path, Precision.BF16), optimizer, scheduler_of(optimizer)
    ) as engine:
        engine.load_checkpoint(tmp_path)
        assert equal(engine.state_dict(), whole)
    exported = export(path, tmp_path / "exported", Dtype.FP32)
    with safe_open(tmp_path / "exported" / exported.files[0], framework="pt") as file:
        for name in ("wte.weight", "h.0.up.weight", "h.0.down.weight", "h.0.ln_1.weight"):
            assert torch.equal(file.get_tensor(name), whole[name])


@pytest.mark.full
def test_what_one_process_saved_goes_on_divided(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = FrozenTensorGPT()
    optimizer = optimizer_of(model)
    plan = plan_for(model, EVERY_TIER, tmp_path, Precision.BF16)
    with Engine(model, plan, optimizer, scheduler_of(optimizer), 0.05) as engine:
        steps(engine, 0, 1, 3)
        whole = engine.state_dict()
        engine.save_checkpoint(tmp_path).wait()
        expected = steps(engine, 0, 1, 2)
    for before, losses, _ in on_ranks(2, load_and_go_on, SAVED, str(tmp_path)):
        assert equal(before, whole)
        assert losses == pytest.approx(expected, rel=2e-2)
