"""A checkpoint that DeepSpeed made is imported: every number of it, and training goes on as DeepSpeed's does."""

import json
import os
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn

from memplan.errors import RunDirectoryError
from memplan.export import Dtype, export
from memplan.imported import import_checkpoint
from offload.checkpoint import opened
from offload.engine import Engine
from offload.errors import CheckpointError
from offload.plan import OptimizerKind, Plan, Precision
from tests.deepspeed_training import CASES, STEPS, Small, batch
from tests.plans import EVERY_TIER, RESIDENT, plan_for

pytest.importorskip("deepspeed")
KINDS = {
    "3-bf16": OptimizerKind.ADAM,
    "2-momentum": OptimizerKind.SGD_MOMENTUM,
}
TAG = "some-tag"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """All cases, trained by DeepSpeed; once for all workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "deepspeed"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
            script = Path(__file__).with_name("deepspeed_training.py")
            run = subprocess.run([*launch, str(script), str(folder)], env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr[-3000:]
            (folder / "done").touch()
    return folder


def optimizer_of(case: str, model: Small) -> torch.optim.Optimizer:
    if CASES[case].optimizer is not None:
        return CASES[case].optimizer(model.groups(), lr=1e-2)
    groups = model.groups()
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def plan_of(case: str, model: nn.Module, tmp_path: Path, tiers: tuple = EVERY_TIER) -> Plan:
    kind = KINDS.get(case, OptimizerKind.ADAMW)
    units = ["", "up", "norm", "down", "frozen"]
    return plan_for(model, tiers, tmp_path, Precision(CASES[case].precision), units=units, optimizer=kind)


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_as_deepspeed_reads_it_itself(case: str, made: Path, tmp_path: Path) -> None:
    written = import_checkpoint(made / case / f"after-{STEPS}", tmp_path / "run")
    assert written.optimizer is KINDS.get(case, OptimizerKind.ADAMW)
    assert opened(tmp_path / "run" / "checkpoints").path.name == f"step-{STEPS}"
    export(tmp_path / "run", tmp_path / "out", Dtype.FP32)
    expected = load_file(made / case / f"whole-{STEPS}.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    names = {name for name, _ in Small().named_parameters()} | {"scale"}
    assert found.keys() == names
    assert names - {"frozen.weight", "frozen.bias"} <= expected.keys()
    assert all(torch.equal(tensor.float(), found[name]) for name, tensor in expected.items() if name in names)


@pytest.mark.parametrize("tiers", [(RESIDENT,), EVERY_TIER])
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.precision == "fp32"])
def test_training_goes_on_as_with_deepspeed(case: str, tiers: tuple, made: Path, tmp_path: Path) -> None:
    import_checkpoint(made / case / f"after-{STEPS}", tmp_path / "run")
    torch.manual_seed(7)
    model = Small()
    with Engine(model, plan_of(case, model, tmp_path, tiers), optimizer_of(case, model)) as engine:
        engine.load_checkpoint(tmp_path / "run" / "checkpoints")
        assert engine.global_step == STEPS
        losses = []
        for step in range(STEPS, 2 * STEPS):
            loss = engine(batch(step))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        numbers = engine.state_dict()
    expected = json.loads((made / case / "losses.json").read_text())
    assert losses == pytest.approx(expected[STEPS:], rel=1e-5)
    after = load_file(made / case / f"whole-{2 * STEPS}.safetensors")
    for name, tensor in after.items():
        torch.testing.assert_close(numbers[name], tensor.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.precision != "fp32"])
def test_moments_counts_and_scale_come_along_where_it_computed_in_fewer_bits(
    case: str, made: Path, tmp_path: Path
) -> None:
    import_checkpoint(made / case / f"after-{STEPS}", tmp_path / "run")
    model = Small()
    with Engine(model, plan_of(case, model, tmp_path), optimizer_of(case, model)) as engine:
        engine.load_checkpoint(tmp_path / "run" / "checkpoints")
        steps = engine.hyperparameters.steps
        assert steps and all(STEPS - 1 <= count <= STEPS for count in steps.values())
        if engine.loss_scale is not None:
            assert engine.loss_scale.state_dict()["scale"] == 2**8
        engine.save_checkpoint(tmp_path / "again").wait()
    for file in ("rank-0", "rest"):
        before, after = (
            joined(next(d.glob("step-*")) / f"{file}.safetensors")
            for d in (tmp_path / "run" / "checkpoints", tmp_path / "again")
        )
        assert before.keys() <= after.keys()
        assert all(torch.equal(tensor.float(), after[key].float()) for key, tensor in before.items())


def joined(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    """The spans of a file put together."""
    spans: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for key, tensor in load_file(path).items():
        if key.startswith(("buffer/", "random/")):
            spans[key, ""] = [(0, tensor)]
            continue
        kind, start, name = key.split("/", 2)
        spans.setdefault((kind, name), []).append((int(start), tensor))
    return {key: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) for key, parts in spans.items()}


def test_the_client_state_comes_along(made: Path, tmp_path: Path) -> None:
    import_checkpoint(made / "2" / f"after-{STEPS}", tmp_path)
    model = Small()
    with Engine(model, plan_of("2", model, tmp_path), optimizer_of("2", model)) as engine:
        _, state = engine.load_checkpoint(tmp_path / "checkpoints")
    assert state == {"epoch": 2, "seen": (STEPS - 1, 0.5)}


def test_groups_in_another_order_are_refused(made: Path, tmp_path: Path) -> None:
    import_checkpoint(made / "2" / f"after-{STEPS}", tmp_path)
    model = Small()
    optimizer = torch.optim.AdamW(model.groups()[::-1])
    with (
        Engine(model, plan_of("2", model, tmp_path), optimizer) as engine,
        pytest.raises(CheckpointError, match=r"other parameter groups: \S+ is in group 0 of only one of the two"),
    ):
        engine.load_checkpoint(tmp_path / "checkpoints")


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder of a tag, that a test may spoil."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def without_a_rank(folder: Path) -> None:
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def without_optimizer(folder: Path) -> None:
    for file in folder.glob("*_optim_states.pt"):
        file.unlink()


def without_the_model(folder: Path) -> None:
    (folder / "mp_rank_00_model_states.pt").unlink()


def with_a_wrong_byte(folder: Path) -> None:
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(file.read_bytes())
    data[largest.header_offset + 200] ^= 1
    file.write_bytes(data)


def cut_short(folder: Path) -> None:
    file = folder / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-100])


def of_two_models(folder: Path) -> None:
    (folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"")


def with_experts(folder: Path) -> None:
    (folder / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"")


def of_lamb(folder: Path) -> None:
    changed(folder / "mp_rank_00_model_states.pt", lambda s: s["ds_config"].update(optimizer={"type": "Lamb"}))
    for file in folder.glob("*_optim_states.pt"):
        changed(file, without_torchs_key)


def of_an_unknown_adam(folder: Path) -> None:
    for file in folder.glob("*_optim_states.pt"):
        changed(file, without_torchs_key)


def without_torchs_key(states: dict[str, Any]) -> None:
    for group in states["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
        group.pop("decoupled_weight_decay")


def changed(file: Path, change: Any) -> None:
    states = torch.load(file, weights_only=False)
    change(states)
    torch.save(states, file)


SPOILED = {
    without_a_rank: r"lacks the optimizer's states of rank 1 of 2$",
    without_optimizer: r"has no file of ZeRO's optimizer .* stage 0, or without the optimizer's states",
    without_the_model: r"is no checkpoint of DeepSpeed: it has neither a file 'latest' nor \*_model_states\.pt$",
    with_a_wrong_byte: r"zero_pp_rank_1_\S+ is damaged: \S+ in it does not have its checksum$",
    cut_short: r"mp_rank_00_model_states\.pt is damaged, or no file of torch\.save: ",
    of_two_models: r"is made by several processes that share one model's tensors or layers",
    with_experts: r"has DeepSpeed's experts",
    of_lamb: r"was trained with lamb that keeps exp_avg, exp_avg_sq; memplan goes on with adamw, ",
    of_an_unknown_adam: r"does not say whether AdamW or Adam made it.*: say --optimizer adamw or --optimizer adam$",
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_can_not_be_imported_is_refused_with_its_reason_and_leaves_nothing(
    spoil: Any, made: Path, tmp_path: Path
) -> None:
    folder = copied(made / "2" / f"after-{STEPS}" / TAG, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(CheckpointError, match=SPOILED[spoil]):
        import_checkpoint(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adam_that_nothing_tells_is_what_the_person_says(made: Path, tmp_path: Path) -> None:
    folder = copied(made / "2" / f"after-{STEPS}" / TAG, tmp_path / "copy")
    of_an_unknown_adam(folder)
    assert import_checkpoint(folder, tmp_path / "run", OptimizerKind.ADAM).optimizer is OptimizerKind.ADAM


def test_a_folder_that_is_none_of_deepspeeds_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path} is no checkpoint of DeepSpeed: it has neither"):
        import_checkpoint(tmp_path, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"^there is no folder \S+/nowhere$"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "run")


def test_a_checkpoint_that_is_there_stays(made: Path, tmp_path: Path) -> None:
    import_checkpoint(made / "2" / f"after-{STEPS}", tmp_path)
    with pytest.raises(RunDirectoryError, match=r"step-3 is there already; name another --out$"):
        import_checkpoint(made / "2" / f"after-{STEPS}", tmp_path)


def test_nothing_that_is_pickled_is_run(made: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harmed"),)

    folder = copied(made / "2" / f"after-{STEPS}" / TAG, tmp_path / "copy")
    changed(folder / "mp_rank_00_model_states.pt", lambda states: states.update(mine=Harmful()))
    with pytest.raises(CheckpointError, match=r"no file of torch\.save: .*mkdir"):
        import_checkpoint(folder, tmp_path / "run")
    assert not (tmp_path / "harmed").exists()


def test_what_json_can_not_hold_is_left_out_and_said(made: Path, tmp_path: Path) -> None:
    folder = copied(made / "2" / f"after-{STEPS}" / TAG, tmp_path / "copy")
    changed(folder / "mp_rank_00_model_states.pt", lambda states: states.update(mine=Namespace(epoch=2)))
    written = import_checkpoint(folder, tmp_path / "run")
    assert written.left_out == ("its client_state can not be written as JSON and is left out",)


def test_memplan_train_goes_on_with_an_imported_run(made: Path, tmp_path: Path) -> None:
    """In its two groups, from its step, and the data from its first batch."""
    (tmp_path / "small.py").write_text(MODEL_FILE)
    done = memplan("import", str(made / "2" / f"after-{STEPS}"), "--out", "run", cwd=tmp_path)
    assert "step 3 of adamw, 2 ranks in stage 2" in done.stdout
    memplan("plan", "small.py", "--batch-size", "4", "--precision", "fp32", "--out", "planned", cwd=tmp_path)
    resume = ["--plan", "planned/plan.json", "--out", "run", "--resume", "--steps", "5", "--no-tui"]
    done = memplan("train", "small.py", *resume, cwd=tmp_path)
    assert "does not say where its data was, so that begins at its first batch" in done.stdout
    assert "finished at step 5" in done.stdout
    groups = opened(tmp_path / "run" / "checkpoints").training["groups"]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.01, 0.1), (0.03, 0.0)]


MODEL_FILE = """
from tests.deepspeed_training import Small, batch

def build_model():
    return Small()

def example_batch(batch_size):
    return batch(0)

def loss(output, batch):
    return output

def train_batches(batch_size):
    for step in range(100):
        yield batch(step)
"""


def memplan(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "dumb", "COLUMNS": "200"}
    command = [sys.executable, "-m", "memplan", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
