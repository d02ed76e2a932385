"""A checkpoint holds everything: training goes on as if it had never stopped, under another plan too."""

import json
from pathlib import Path

import pytest
import torch

from offload import checkpoint
from offload.engine import Engine
from offload.errors import CheckpointError
from offload.plan import Plan, Precision
from tests.models import GPT, SkippingGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, plan_for


def engine_for(model: torch.nn.Module, plan: Plan) -> Engine:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    return Engine(model, plan, optimizer, scheduler, max_grad_norm=0.05)


def run(engine: Engine, data: list[torch.Tensor]) -> list[float]:
    losses = []
    for tokens in data:
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("kind", [GPT, TiedGPT, SkippingGPT])
def test_resumed_training_is_the_undisturbed_training(kind: type[GPT], precision: Precision, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = batches(10)
    model = kind()
    with engine_for(model, plan_for(model, EVERY_TIER, tmp_path, precision)) as engine:
        run(engine, data[:5])
        path = checkpoint.save(engine, tmp_path / "checkpoints", {"batches": 5})
        calls = getattr(model, "calls", 0)
        undisturbed = run(engine, data[5:])
        whole = engine.state_dict()
    again = kind()
    again.calls = calls
    # Another plan: what is saved names parameters, not places.
    with engine_for(again, plan_for(again, EVERY_TIER[2:], tmp_path, precision)) as engine:
        assert checkpoint.load(engine, checkpoint.latest(tmp_path / "checkpoints")) == {"batches": 5}
        assert path.name == "step-5"
        assert engine.global_step == 5
        assert run(engine, data[5:]) == pytest.approx(undisturbed, rel=1e-5)
        for name, tensor in engine.state_dict().items():
            assert (tensor - whole[name]).norm() <= 1e-5 * whole[name].norm().clamp(min=1e-3), name


def saved(tmp_path: Path) -> tuple[Engine, Path]:
    torch.manual_seed(0)
    model = GPT(layers=1)
    engine = engine_for(model, plan_for(model, (RESIDENT,)))
    run(engine, batches(1))
    return engine, checkpoint.save(engine, tmp_path, {})


@pytest.mark.parametrize("name", ["unit-0.safetensors", "unit-3.safetensors", "rest.safetensors"])
def test_a_flipped_byte_is_found_before_anything_changes(name: str, tmp_path: Path) -> None:
    engine, path = saved(tmp_path)
    before = engine.state_dict()
    file = path / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(engine, path)
    assert all(torch.equal(before[n], t) for n, t in engine.state_dict().items())
    engine.close()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    engine, path = saved(tmp_path)
    engine.close()
    other = GPT(layers=2)
    with (
        engine_for(other, plan_for(other, (RESIDENT,))) as engine,
        pytest.raises(CheckpointError, match="another model"),
    ):
        checkpoint.load(engine, path)


def test_what_is_not_complete_is_not_a_checkpoint(tmp_path: Path) -> None:
    engine, path = saved(tmp_path)
    engine.close()
    path.rename(tmp_path / ".step-1.partial")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.latest(tmp_path)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    engine, path = saved(tmp_path)
    engine.close()
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((path / "manifest.json").read_text())["step"] == 1
