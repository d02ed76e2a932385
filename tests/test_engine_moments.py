"""Moments in fewer bits through the engine: the same numbers in every tier, chunk and rank, and after a checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from offload import checkpoint, contents
from offload.engine import Engine
from offload.errors import PlanError
from offload.plan import Buckets, MomentFormat, OptimizerKind, Plan, Precision
from offload.residency import footprint
from offload.restore import CheckpointTensors
from offload.rules import AdamWStep
from offload.shards import Shards
from tests.loops import losses_of
from tests.models import GPT, FrozenGPT, SkippingGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, N, plan_for
from tests.ranks import on_ranks
from tests.test_engine_ranks import global_batches, parts_of
from tests.test_moments import FEWER, plain_step

State = dict[str, torch.Tensor]
BETAS = (0.9, 0.999)
STEPS = 6


def planned(
    model: nn.Module, placements: tuple, directory: Path, moments: MomentFormat, chunk: int, **changes: object
) -> Plan:
    buckets = Buckets(prefetch_units=1, update_elements=chunk, io_bytes=16384)
    return plan_for(model, placements, directory, moments=moments, **{"buckets": buckets, **changes})


def engine_for(model: nn.Module, plan: Plan) -> Engine:
    """Matrices decay, the others do not; gradients are not clipped: the order of a norm's sum is no matter here."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    sets = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return Engine(model, plan, torch.optim.AdamW(sets, lr=1e-2, betas=BETAS))


def everything(engine: Engine) -> State:
    """Masters and moments, as whole tensors."""
    engine.finish()
    found = {}
    for state in engine.states:
        whole = contents.read(state, engine.plan.state_format, engine.store)
        for name, kinds in contents.named(state, whole):
            found |= {f"{kind} {name}": tensor.clone() for kind, tensor in kinds.items()}
    return found


def assert_holds_what_was_counted(engine: Engine, plan: Plan) -> None:
    shapes, units = [s.unit.shape for s in engine.states], [s.unit.placement for s in engine.states]
    held = footprint(shapes, units, plan.buckets, plan.state_format, plan.gpu_update_share, Shards.of(plan))
    assert engine.arena.taken_bytes == held.host_bytes
    assert (engine.store.taken_bytes if engine.store is not None else 0) == held.nvme_bytes
    assert engine.meter.now_bytes()["gpu"] == held.gpu_bytes


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("moments", FEWER)
def test_steps_through_every_tier_are_those_of_a_plain_loop_that_quantizes_by_itself(
    moments: MomentFormat, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, width=12, heads=2)  # biases of 12: blocks that end in padding
    plain = copy.deepcopy(model)
    kept = {n: (torch.zeros(p.numel()), torch.zeros(p.numel())) for n, p in plain.named_parameters()}
    data = batches(3)
    with engine_for(model, planned(model, EVERY_TIER, tmp_path, moments, 256)) as engine:
        losses_of(engine, data)
        found = everything(engine)
    for step, tokens in enumerate(data, 1):
        plain(tokens).backward()
        for name, p in plain.named_parameters():
            how = AdamWStep(1e-2, *BETAS, 1e-8, 0.1 * (p.ndim > 1), step)
            after, *kept[name] = plain_step(p.detach().flatten(), p.grad.flatten(), *kept[name], how, 1.0, moments)
            p.data = after.view(p.shape)
            p.grad = None
    for name, p in plain.named_parameters():
        assert torch.equal(found[f"weight {name}"], p.detach()), name
        for kind, moment in zip(("exp_avg", "exp_avg_sq"), kept[name], strict=True):
            assert torch.equal(found[f"{kind} {name}"].flatten(), moment), name


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        (FrozenGPT, Precision.FP32),
        (FrozenGPT, Precision.BF16),
        (FrozenGPT, Precision.FP16),
        (SkippingGPT, Precision.FP32),
    ],
)
@pytest.mark.parametrize("moments", FEWER)
def test_tiers_and_chunks_change_no_bit(
    moments: MomentFormat, kind: type[GPT], precision: Precision, tmp_path: Path
) -> None:
    found = []
    layouts = ((RESIDENT,), 1 << 22), (EVERY_TIER, 64 * 7), (EVERY_TIER[3:], 64 * 80), (((N, H, N),), 64)
    for placements, chunk in layouts:
        torch.manual_seed(0)
        model = kind()
        plan = planned(model, placements, tmp_path, moments, chunk, precision=precision)
        with engine_for(model, plan) as engine:
            assert_holds_what_was_counted(engine, plan)
            losses_of(engine, batches(2))
            found.append(everything(engine))
    for other in found[1:]:
        assert_equal(other, found[0])


@pytest.mark.parametrize("moments", FEWER)
def test_the_device_may_take_its_share_of_the_update(moments: MomentFormat, tmp_path: Path) -> None:
    found = []
    for share in (0.0, 0.4):
        torch.manual_seed(0)
        model = GPT()
        plan = planned(model, ((H, H, H), (G, G, H)), tmp_path, moments, 128, gpu_update_share=share)
        with engine_for(model, plan) as engine:
            assert_holds_what_was_counted(engine, plan)
            losses_of(engine, batches(3))
            found.append(everything(engine))
    assert_equal(*found)


def on_rank(rank: int, world: int, stage: int, placements: tuple, moments: MomentFormat, directory: str) -> State:
    torch.manual_seed(rank)
    model = FrozenGPT()
    plan = planned(model, placements, Path(directory), moments, 640, gpus=world, zero_stage=stage)
    with engine_for(model, plan) as engine:
        assert_holds_what_was_counted(engine, plan)
        losses_of(engine, parts_of(global_batches(2, world), world, rank))
        engine.save_checkpoint(f"{directory}/{stage}").wait()
        return everything(engine)


@pytest.mark.parametrize("moments", FEWER)
def test_stages_of_several_ranks_change_no_bit(moments: MomentFormat, tmp_path: Path) -> None:
    found = {}
    stages = {0: (RESIDENT,), 1: ((G, G, H), (H, H, H)), 2: (RESIDENT,), 3: EVERY_TIER}
    for stage, placements in stages.items():
        first, second = on_ranks(2, on_rank, stage, placements, moments, str(tmp_path))
        assert_equal(first, second)
        found[stage] = first
    for stage in stages:
        assert_equal(found[stage], found[0])
    # And one process goes on with what two have saved.
    model = FrozenGPT()
    with engine_for(model, planned(model, EVERY_TIER, tmp_path, moments, 4096)) as engine:
        engine.load_checkpoint(tmp_path / "3")
        assert_equal(everything(engine), found[0])


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("moments", FEWER)
def test_resumed_training_is_the_undisturbed_training_to_the_last_bit(
    moments: MomentFormat, precision: Precision, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    data, model = batches(STEPS), GPT()
    with engine_for(model, planned(model, EVERY_TIER, tmp_path, moments, 448, precision=precision)) as engine:
        losses_of(engine, data[:3])
        path = engine.save_checkpoint(tmp_path / "checkpoints").wait()
        losses, end = losses_of(engine, data[3:]), everything(engine)
    assert checkpoint.checked(path).training["moments"] == moments
    again = GPT()
    with engine_for(again, planned(again, EVERY_TIER[2:], tmp_path, moments, 5056, precision=precision)) as engine:
        engine.load_checkpoint(tmp_path / "checkpoints")
        assert losses_of(engine, data[3:]) == losses
        assert_equal(everything(engine), end)


@pytest.mark.parametrize("optimizer", [OptimizerKind.ADAMW, OptimizerKind.ADAGRAD, OptimizerKind.LION])
@pytest.mark.parametrize("loaded", MomentFormat)
@pytest.mark.parametrize("saved", MomentFormat)
def test_a_checkpoint_is_loaded_into_any_format_of_moments(
    saved: MomentFormat, loaded: MomentFormat, optimizer: OptimizerKind, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, files = GPT(layers=1), tmp_path / "checkpoints"
    with Engine(model, planned(model, EVERY_TIER, tmp_path, saved, 448, optimizer=optimizer)) as engine:
        losses_of(engine, batches(2))
        engine.save_checkpoint(files).wait()
        before = everything(engine)
    other = GPT(layers=1)
    with Engine(other, planned(other, EVERY_TIER[1:], tmp_path, loaded, 640, optimizer=optimizer)) as engine:
        engine.load_checkpoint(files)
        after = everything(engine)
        if loaded in (saved, MomentFormat.FP32):
            assert_equal(after, before)
        for name, tensor in before.items():
            far = 0.05 * tensor.abs().max() if loaded is MomentFormat.EIGHT_BIT else 2.0**-8 * tensor.abs()
            assert ((after[name] - tensor).abs() <= far).all(), name
        losses_of(engine, batches(1))


def test_a_checkpoint_holds_moments_as_what_they_are(tmp_path: Path) -> None:
    model = GPT(layers=1)
    with engine_for(model, planned(model, EVERY_TIER, tmp_path, MomentFormat.EIGHT_BIT, 448)) as engine:
        losses_of(engine, batches(1))
        path = engine.save_checkpoint(tmp_path / "checkpoints").wait()
    with CheckpointTensors(checkpoint.checked(path)) as tensors:
        file = tensors._open(checkpoint.checked(path).rank_files()[0][0])
        kinds = {}
        for key in file.keys():  # noqa: SIM118 - it is no dict
            kinds.setdefault(key.split("/")[0], set()).add(file.get_slice(key).get_dtype())
        found = torch.zeros(100)
        tensors.read_into(found, "exp_avg_sq", "h.0.up.weight", 30)
        whole = torch.zeros(32 * 128)
        tensors.read_into(whole, "exp_avg_sq", "h.0.up.weight")
    assert torch.equal(found, whole[30:130])
    assert found.any()
    assert {k: v for k, v in kinds.items() if k != "random"} == {
        "weight": {"F32"},
        "exp_avg.codes": {"I8"},
        "exp_avg.scales": {"F32"},
        "exp_avg_sq.codes": {"U8"},
        "exp_avg_sq.scales": {"F32"},
    }


@pytest.mark.parametrize("moments", FEWER)
def test_whole_parameters_are_changed_beside_moments_that_stay(moments: MomentFormat, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    with engine_for(model, planned(model, EVERY_TIER, tmp_path, moments, 448)) as engine:
        losses_of(engine, batches(2))
        before = everything(engine)
        with engine.gathered(model), torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        after = everything(engine)
    assert_equal({n: t for n, t in after.items() if "exp" in n}, {n: t for n, t in before.items() if "exp" in n})
    assert torch.equal(after["weight wte.weight"], before["weight wte.weight"] + 1)


def test_training_comes_as_far_as_with_moments_in_fp32(tmp_path: Path) -> None:
    ends = {}
    for moments in MomentFormat:
        torch.manual_seed(0)
        model = GPT(layers=2)
        with engine_for(model, planned(model, (RESIDENT,), tmp_path, moments, 1 << 22)) as engine:
            losses = losses_of(engine, batches(4) * 25)
        ends[moments] = sum(losses[-8:]) / 8
        assert losses[0] > 4
    assert ends[MomentFormat.FP32] < 1
    for moments in FEWER:
        assert ends[moments] == pytest.approx(ends[MomentFormat.FP32], rel=0.15)


def test_chunks_that_would_cut_a_block_are_refused(tmp_path: Path) -> None:
    model = GPT(layers=1)
    planned(model, EVERY_TIER, tmp_path, MomentFormat.BF16, 1000)
    with pytest.raises(PlanError, match="update_elements is 1000; with moments in 8 bits it must be a multiple of 64"):
        planned(model, EVERY_TIER, tmp_path, MomentFormat.EIGHT_BIT, 1000)
