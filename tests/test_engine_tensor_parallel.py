"""A model divided by PyTorch's tensor parallelism trains by a plan as it would on one process."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from offload.dtensors import local_of
from offload.engine import Engine
from offload.errors import OffloadError, PlanError
from offload.plan import Buckets, Plan, Precision
from offload.residency import footprint
from offload.shards import Shards
from tests.models import batches
from tests.plans import EVERY_TIER, G, H, N, plan_for
from tests.ranks import on_ranks
from tests.tensor_models import COLUMNS, SEQUENCE, FrozenTensorGPT, TensorGPT, divide
from tests.test_engine_equals_pytorch import distance, optimizer_of, scheduler_of
from tests.test_engine_ranks import global_batches, parts_of, train_plainly

TENSOR = 2
"""Processes of the tensor axis."""
WAYS = {"columns": COLUMNS, "sequence": SEQUENCE}
PLACEMENTS = {"gpu": ((G, G, G),), "host": ((H, H, H),), "nvme": ((N, H, N),), "mixed": EVERY_TIER}


@dataclass(frozen=True)
class Case:
    """One training."""

    way: str
    stage: int
    kept: str
    kind: type = TensorGPT
    accumulation: int = 1
    max_norm: float | None = 0.05
    steps: int = 10
    precision: Precision = Precision.FP32
    changes: dict[str, Any] = field(default_factory=dict)


def engine_of(case: Case, rank: int, world: int, directory: str, seed: int = 0) -> Engine:
    data = world // TENSOR
    mesh = init_device_mesh("cpu", (data, TENSOR), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(seed + mesh["dp"].get_local_rank())  # the first data rank's parameters are everybody's
    model = case.kind()
    plan = plan_for(
        model,
        PLACEMENTS[case.kept],
        Path(directory),
        case.precision,
        gpus=data,
        zero_stage=case.stage,
        gradient_accumulation_steps=case.accumulation,
        buckets=Buckets(prefetch_units=1, update_elements=1000, io_bytes=16384),
        **case.changes,
    )
    divide(model, mesh, WAYS[case.way])
    optimizer = optimizer_of(model)
    return Engine(model, plan, optimizer, scheduler_of(optimizer), case.max_norm, mesh=mesh)


def train(engine: Engine, rank: int, world: int, case: Case) -> list[float]:
    data, losses = world // TENSOR, []
    for tokens in parts_of(global_batches(case.steps * case.accumulation, data), data, rank // TENSOR):
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def train_on_rank(rank: int, world: int, case: Case, directory: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    with engine_of(case, rank, world, directory) as engine:
        plan, model = engine.plan, engine.model
        shapes, units = [s.unit.shape for s in engine.states], [s.unit.placement for s in engine.states]
        held = footprint(shapes, units, plan.buckets, plan.state_format, plan.gpu_update_share, Shards.of(plan))
        assert engine.arena.taken_bytes == held.host_bytes
        assert engine.meter.now_bytes()["gpu"] == held.gpu_bytes
        parameters = list(model.parameters())
        losses = train(engine, rank, world, case)
        assert engine.overflow_count == 0
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert any(isinstance(p, DTensor) and local_of(p).numel() < p.numel() for p in parameters)
        return losses, engine.state_dict()


def many(rank: int, world: int, cases: list[Case], directory: str) -> list[Any]:
    return [train_on_rank(rank, world, case, directory) for case in cases]


def assert_all_train_alike(world: int, cases: list[Case], tmp_path: Path, work: Callable[..., Any] = many) -> None:
    """As one process on the same global batches, and every process with the same whole parameters to the last bit."""
    each, data = on_ranks(world, work, cases, str(tmp_path)), world // TENSOR
    for i, case in enumerate(cases):
        torch.manual_seed(0)
        plain = case.kind()
        expected = train_plainly(plain, global_batches(case.steps * case.accumulation, data), data, case)
        for ranks in (each[t::TENSOR] for t in range(TENSOR)):
            found = [sum(losses) / data for losses in zip(*(rank[i][0] for rank in ranks), strict=True)]
            assert found == pytest.approx(expected, rel=1e-6), case
        for name, parameter in plain.named_parameters():
            assert distance(each[0][i][1][name], parameter.detach()) <= 1e-5, (case, name)
        for name, tensor in each[0][i][1].items():
            assert all(torch.equal(tensor, rank[i][1][name]) for rank in each), (case, name)


def test_two_processes_divide_tensors_and_train_as_one(tmp_path: Path) -> None:
    """The tensor axis alone; frozen parameters, several micro-batches a step, recompute, inputs on the host."""
    recomputed = {"recompute": tuple(f"h.{i}" for i in range(4)), "checkpoints": H}
    cases = [
        Case("columns", 0, "mixed", FrozenTensorGPT, accumulation=2),
        Case("sequence", 3, "host", changes=recomputed),
    ]
    assert_all_train_alike(2, cases, tmp_path)


def test_four_processes_divide_tensors_and_data(tmp_path: Path) -> None:
    cases = [Case("columns", 1, "host", accumulation=2, steps=5), Case("sequence", 3, "mixed")]
    assert_all_train_alike(4, cases, tmp_path)


def look_and_write(rank: int, world: int, directory: str) -> Any:
    """Parameters in ``gathered``, changed there, and loaded; then behind the engine's back."""
    case = Case("sequence", 3, "mixed")
    with engine_of(case, rank, world, directory) as engine:
        before, up = engine.state_dict(), engine.model.h[0].up.weight
        with engine.gathered(engine.model.h[0]) as parameters:
            assert parameters["h.0.up.weight"] is up
            shown = {name: p.full_tensor().clone() for name, p in parameters.items()}
            up.mul_(2)
        doubled = engine.state_dict()
        engine.load_state_dict(before)
        loaded = engine.state_dict()
        local_of(up).detach()  # looking is no change
        engine.finish()
        with torch.no_grad():
            engine.model.wte.weight.add_(1)
        try:
            engine.finish()
            said = ""
        except OffloadError as error:
            said = str(error)
        return before, shown, doubled, loaded, said, train(engine, rank, world, replace(case, steps=3))


def refused(rank: int, world: int, directory: str) -> dict[str, str]:
    """What is said to everything that does not go."""
    said: dict[str, str] = {}
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))

    def attempt(what: str, model: nn.Module, plan: Plan, *, trains: bool = False, **settings: Any) -> None:
        try:
            with Engine(model, plan, **settings) as engine:
                if trains:
                    engine.backward(engine(batches(1, seed=rank)[0]))
            said[what] = ""
        except (OffloadError, PlanError) as error:
            said[what] = str(error)

    def divided(how: dict = SEQUENCE, seed: int = 0) -> tuple[nn.Module, Plan]:
        torch.manual_seed(seed)
        model = TensorGPT()
        plan = plan_for(model, PLACEMENTS["gpu"])
        return divide(model, mesh, how), plan

    attempt("no mesh", *divided())
    attempt("other gpus", (model := divided())[0], replace(model[1], gpus=2), mesh=mesh)
    attempt("loss in chunks", (model := divided())[0], replace(model[1], loss_chunks=2), mesh=mesh)
    attempt("in backward", *divided(), mesh=mesh, update_in_backward=True)
    attempt("files", *divided(), mesh=mesh, weights=Path(directory))
    attempt("copies differ", *divided(COLUMNS, seed=rank), mesh=mesh)
    attempt("batches differ", *divided(COLUMNS), mesh=mesh, trains=True)
    attempt("not divided", *divided({}), mesh=mesh)
    partial = divided()
    partial[0].ln_f.weight = nn.Parameter(DTensor.from_local(torch.ones(32), mesh["tp"], [Partial()]))
    attempt("partial", *partial, mesh=mesh)
    both = divided()
    both[0].ln_f.weight = nn.Parameter(distribute_tensor(torch.ones(32), mesh, [Replicate(), Shard(0)]))
    attempt("two axes", *both, mesh=mesh)
    reading = divided()
    reading[0].h[3].register_forward_hook(lambda *_: reading[0].h[0].up.weight.sum() and None)
    attempt("read", reading[0], plan_for(reading[0], PLACEMENTS["host"]), mesh=mesh, trains=True)
    on_meta = divided()
    on_meta[0].ln_f = nn.LayerNorm(32, device="meta")
    attempt("meta", *on_meta, mesh=mesh)
    return said


def both(rank: int, world: int, directory: str) -> tuple[Any, Any]:
    return look_and_write(rank, world, directory), refused(rank, world, directory)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two processes found, which take longer to start than to do both."""
    return on_ranks(2, both, str(tmp_path_factory.mktemp("both")))


def test_parameters_can_be_seen_written_and_loaded_whole(two_ranks: list[Any]) -> None:
    torch.manual_seed(0)
    plain = TensorGPT()
    for before, shown, doubled, loaded, said, losses in (found[0] for found in two_ranks):
        for name, parameter in plain.named_parameters():
            assert torch.equal(before[name], parameter.detach())
            assert torch.equal(loaded[name], parameter.detach())
            assert torch.equal(doubled[name], parameter.detach() * (2 if name == "h.0.up.weight" else 1))
        assert all(torch.equal(tensor, before[name]) for name, tensor in shown.items())
        assert "parameter wte.weight was changed in place behind the engine's back" in said
        assert len(losses) == 3


def test_what_does_not_go_with_divided_tensors_is_refused(two_ranks: list[Any]) -> None:
    first, second = (found[1] for found in two_ranks)
    assert first == second
    expected = {
        "no mesh": "is a DTensor; give the engine the whole mesh too",
        "other gpus": "this plan is for 2 ranks that share the data, and the mesh has 1 beside 2 that share tensors",
        "loss in chunks": "the loss in chunks (loss_chunks) does not go with parameters that are DTensors",
        "in backward": "update_in_backward does not go with",
        "files": "reading first values from files (weights) does not go with",
        "copies differ": "parameter wte.weight is not divided over the mesh and differs between its processes",
        "batches differ": "differs between processes that share tensors, each of which has all of it: give these",
        "not divided": "no parameter of the model is a DTensor",
        "partial": "parameter ln_f.weight is placed Partial(sum); only Shard and Replicate can be trained",
        "two axes": "parameter ln_f.weight is a DTensor on 2 axes",
        "read": "reads a parameter of shape [128, 32] outside of the forward of its module",
        "meta": "ln_f.weight is on meta, and the model has DTensors",
    }
    assert first.keys() == expected.keys()
    for what, sentence in expected.items():
        assert sentence in first[what], (what, first[what])


@pytest.mark.full
@pytest.mark.parametrize("precision", [Precision.AMP, Precision.BF16, Precision.FP16])
def test_tensors_are_divided_in_half_precision_too(precision: Precision, tmp_path: Path) -> None:
    case = Case("sequence", 3, "mixed", steps=5, precision=precision)
    each = on_ranks(4, many, [case], str(tmp_path))
    torch.manual_seed(0)
    expected = train_plainly(TensorGPT(), global_batches(case.steps, 2), 2, case)
    found = [sum(losses) / 2 for losses in zip(each[0][0][0], each[2][0][0], strict=True)]
    assert found == pytest.approx(expected, rel=2e-3)
    for name, tensor in each[0][0][1].items():
        assert all(torch.equal(tensor, rank[0][1][name]) for rank in each), name


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kept", PLACEMENTS)
def test_tensors_are_divided_in_every_stage_and_placement(world: int, kept: str, tmp_path: Path) -> None:
    cases = [Case(way, stage, kept) for way in WAYS for stage in range(4)]
    assert_all_train_alike(world, cases, tmp_path)
