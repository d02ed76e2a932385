"""A checkpoint holds everything: training goes on as if it had never stopped, under another plan too."""

import json
import random
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from offload import checkpoint
from offload.engine import Engine
from offload.errors import CheckpointError, OffloadError
from offload.plan import Plan, Precision
from tests.loops import losses_of
from tests.models import GPT, FrozenGPT, SkippingGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, plan_for


def engine_for(model: torch.nn.Module, plan: Plan) -> Engine:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    return Engine(model, plan, optimizer, scheduler, max_grad_norm=0.05)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("kind", [GPT, TiedGPT, SkippingGPT, FrozenGPT])
def test_resumed_training_is_the_undisturbed_training(kind: type[GPT], precision: Precision, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = batches(10)
    model = kind()
    with engine_for(model, plan_for(model, EVERY_TIER, tmp_path, precision)) as engine:
        losses_of(engine, data[:5])
        calls = getattr(model, "calls", 0)
        saving = engine.save_checkpoint(tmp_path / "checkpoints", client_state={"batches": 5})
        undisturbed = losses_of(engine, data[5:])  # while it is copied and written
        whole = engine.state_dict()
        path = saving.wait()
    again = kind()
    again.calls = calls
    # Another plan: what is saved names parameters, not places.
    with engine_for(again, plan_for(again, EVERY_TIER[2:], tmp_path, precision)) as engine:
        assert engine.load_checkpoint(tmp_path / "checkpoints") == (path, {"batches": 5})
        assert path.name == "step-5"
        assert engine.global_step == 5
        assert losses_of(engine, data[5:]) == undisturbed
        for name, tensor in engine.state_dict().items():
            assert torch.equal(tensor, whole[name]), name


def test_a_checkpoint_of_fp32_goes_on_in_bf16_and_back_with_the_same_masters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = batches(4)
    states = []
    for before, precision in ((None, Precision.FP32), ("a", Precision.BF16), ("b", Precision.FP32)):
        model = GPT()
        with engine_for(model, plan_for(model, EVERY_TIER, tmp_path, precision)) as engine:
            if before is None:
                losses_of(engine, data)
            else:
                engine.load_checkpoint(tmp_path, before)
            engine.save_checkpoint(tmp_path, "b" if before else "a").wait()
            states.append(engine.state_dict())
    assert all(torch.equal(states[0][n], s[n]) for s in states[1:] for n in s)


def test_training_goes_on_with_every_random_number_it_would_have_drawn(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        gauss = random.gauss(0, 1), float(numpy.random.standard_normal())
        return [random.random(), float(numpy.random.rand()), *gauss, *torch.rand(3).tolist()]

    torch.manual_seed(0)
    model = GPT(layers=1)
    with engine_for(model, plan_for(model, (RESIDENT,))) as engine:
        drawn()
        engine.save_checkpoint(tmp_path).wait()
        expected = drawn()
        engine.load_checkpoint(tmp_path)
        assert drawn() == expected


def test_a_checkpoint_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT(layers=1)
    with engine_for(model, plan_for(model, (RESIDENT,))) as engine:
        losses_of(engine, batches(1))
        saving = engine.save_checkpoint(tmp_path)
        assert engine.load_checkpoint(tmp_path)[0] == saving.path
        assert saving.done


def test_between_micro_batches_nothing_can_be_saved(tmp_path: Path) -> None:
    model = GPT(layers=1)
    with engine_for(model, plan_for(model, (RESIDENT,), gradient_accumulation_steps=2)) as engine:
        engine.backward(engine(batches(1)[0]))
        with pytest.raises(OffloadError, match="last micro-batch"):
            engine.save_checkpoint(tmp_path)


def saved(tmp_path: Path) -> tuple[Engine, Path]:
    torch.manual_seed(0)
    model = GPT(layers=1)
    engine = engine_for(model, plan_for(model, (RESIDENT,)))
    losses_of(engine, batches(1))
    return engine, engine.save_checkpoint(tmp_path).wait()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    engine, _ = saved(tmp_path)
    engine.close()
    other = GPT(layers=2)
    with (
        engine_for(other, plan_for(other, (RESIDENT,))) as engine,
        pytest.raises(CheckpointError, match="another model"),
    ):
        engine.load_checkpoint(tmp_path)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    engine, path = saved(tmp_path)
    engine.close()
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((path / "manifest.json").read_text())["step"] == 1


def test_the_format_is_that_of_the_safetensors_library(tmp_path: Path) -> None:
    engine, path = saved(tmp_path)
    with engine:
        flat = load_file(path / "rank-0.safetensors")
        parts: dict[str, dict[int, torch.Tensor]] = {}
        for key, tensor in flat.items():
            kind, _, rest = key.partition("/")
            if kind == "weight":
                start, _, name = rest.partition("/")
                parts.setdefault(name, {})[int(start)] = tensor
        for name, tensor in engine.state_dict().items():
            whole = torch.cat([part for _, part in sorted(parts[name].items())])
            assert torch.equal(whole.view(tensor.shape), tensor), name
        assert flat["exp_avg/0/ln_f.weight"].abs().sum() > 0


def test_parameters_are_put_together_from_the_files_of_any_number_of_ranks(tmp_path: Path) -> None:
    engine, path = saved(tmp_path)
    flat = load_file(path / "rank-0.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    files = {name: manifest["files"][name] for name in ("training.json", "rest.safetensors")}
    partial = checkpoint.begin(tmp_path, "three")
    for name in files:
        shutil.copy(path / name, partial)
    for rank in range(3):
        entries = {}
        for key, tensor in flat.items():
            kind, start, *name = key.split("/", 2)
            if kind == "random":
                entries |= {key: tensor} if rank == 0 else {}
                continue
            edges = [len(tensor) * r // 3 for r in range(4)]
            a, b = edges[rank : rank + 2]
            if a < b:
                entries[f"{kind}/{int(start) + a}/{name[0]}"] = tensor[a:b].clone()
        file = partial / checkpoint.rank_file(rank)
        save_file(entries, file)
        files[file.name] = {"bytes": file.stat().st_size, "crc32c": checkpoint.file_crc32c(file)}
    checkpoint.publish(partial, "three", {"step": 7, "world_size": 3}, files)
    with engine:
        expected = engine.state_dict()
        losses_of(engine, batches(1))
        engine.load_checkpoint(tmp_path)
        assert engine.global_step == 7
        assert all(torch.equal(t, expected[n]) for n, t in engine.state_dict().items())
