"""Training over several ranks is training: the losses and parameters of one process on the same global batch."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Buckets, Precision
from offload.residency import footprint
from offload.shards import Shards
from offload.streams import Lane
from tests.models import GPT, Block, FrozenGPT, LoopingGPT, SkippingGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, G, H, N, plan_for
from tests.ranks import on_ranks
from tests.test_engine_equals_pytorch import distance, optimizer_of, scheduler_of

PLACEMENTS = {"gpu": ((G, G, G),), "host": ((H, H, H),), "nvme": ((N, H, N),), "mixed": EVERY_TIER}


def parts_of(data: list[torch.Tensor], world: int, rank: int) -> list[torch.Tensor]:
    """This rank's part of every global batch."""
    return [tokens.chunk(world)[rank] for tokens in data]


def global_batches(count: int, world: int) -> list[torch.Tensor]:
    """Of two samples a rank."""
    torch.manual_seed(7)
    return [torch.cat([batches(1, seed=i * world + r)[0][:2] for r in range(world)]) for i in range(count)]


@dataclass(frozen=True)
class Case:
    """One training."""

    stage: int
    placements: tuple
    kind: type = GPT
    accumulation: int = 1
    max_norm: float | None = 0.05
    steps: int = 5
    precision: Precision = Precision.FP32
    changes: dict[str, Any] = field(default_factory=dict)


class UnevenBlock(Block):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.sometimes, self.used = nn.Linear(width, width), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + self.sometimes(y) if self.used else y


class UnevenGPT(GPT):
    """A parameter inside of a block is used by some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.h[2] = UnevenBlock(32, 4)

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        self.h[2].used = bool(tokens[0, 0] % 2)
        return super().run(tokens)


def train_plainly(model: nn.Module, data: list, world: int, case: Case) -> list[float]:
    """One process on the global batches; each loss is the mean of the ranks' losses."""
    accumulation, call = case.accumulation, model.forward

    def forward(part: torch.Tensor, number: int) -> torch.Tensor:
        model.calls = number  # a rank's model counts its own calls
        return call(part)

    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer)
    losses = []
    for start in range(0, len(data), accumulation):
        for i, tokens in enumerate(data[start : start + accumulation]):
            loss = torch.stack([forward(part, start + i) for part in tokens.chunk(world)]).mean()
            (loss / accumulation).backward()
            losses.append(loss.item())
        if case.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses


def train_on_rank(rank: int, world: int, case: Case, directory: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(rank)  # the first rank's parameters are everybody's
    model = case.kind()
    buckets = Buckets(prefetch_units=1, update_elements=1000, io_bytes=16384)
    plan = plan_for(
        model,
        case.placements,
        Path(directory),
        case.precision,
        gpus=world,
        zero_stage=case.stage,
        gradient_accumulation_steps=case.accumulation,
        **{"buckets": buckets, **case.changes},
    )
    optimizer = optimizer_of(model)
    losses = []
    with Engine(model, plan, optimizer, scheduler_of(optimizer), case.max_norm) as engine:
        shapes, units = [s.unit.shape for s in engine.states], [s.unit.placement for s in engine.states]
        held = footprint(shapes, units, plan.buckets, plan.state_format, plan.gpu_update_share, Shards.of(plan))
        assert engine.arena.taken_bytes == held.host_bytes
        assert (engine.store.taken_bytes if engine.store is not None else 0) == held.nvme_bytes
        if plan.device == "cpu":  # a GPU's allocator counts what others hold, too
            assert engine.meter.now_bytes()["gpu"] == held.gpu_bytes
        for tokens in parts_of(global_batches(case.steps * case.accumulation, world), world, rank):
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        assert engine.overflow_count == 0
        return losses, engine.state_dict()


def many(rank: int, world: int, cases: list[Case], directory: str) -> list[Any]:
    return [train_on_rank(rank, world, case, directory) for case in cases]


def assert_all_train_alike(
    world: int, cases: list[Case], tmp_path: Path, work: Any = many, within: float = 1e-5
) -> None:
    """As one process on the same global batches, and every rank with the same parameters to the last bit."""
    each = on_ranks(world, work, cases, str(tmp_path))
    for i, case in enumerate(cases):
        torch.manual_seed(0)
        plain = case.kind()
        expected = train_plainly(plain, global_batches(case.steps * case.accumulation, world), world, case)
        found = [sum(losses) / world for losses in zip(*(ranks[i][0] for ranks in each), strict=True)]
        assert found == pytest.approx(expected, rel=1e-6), case
        for name, parameter in plain.named_parameters():
            assert distance(each[0][i][1][name], parameter.detach()) <= within, (case, name)
        for name, tensor in each[0][i][1].items():
            assert all(torch.equal(tensor, ranks[i][1][name]) for ranks in each), (case, name)


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("kept", PLACEMENTS)
def test_twenty_steps_in_every_stage_end_where_one_process_does(world: int, kept: str, tmp_path: Path) -> None:
    assert_all_train_alike(world, [Case(stage, PLACEMENTS[kept], steps=20) for stage in range(4)], tmp_path)


def test_two_ranks_train_as_one_process_in_every_stage(tmp_path: Path) -> None:
    cases = [Case(stage, PLACEMENTS[kept]) for stage in range(4) for kept in ("gpu", "mixed")]
    assert_all_train_alike(2, cases, tmp_path)


def test_three_ranks_divide_what_three_does_not_divide(tmp_path: Path) -> None:
    """Odd shards, frozen parameters, tied ones, blocks that run twice, and several micro-batches a step."""
    cases = [
        Case(3, PLACEMENTS["mixed"], FrozenGPT),
        Case(2, PLACEMENTS["host"], TiedGPT, accumulation=2),
        Case(3, PLACEMENTS["mixed"], LoopingGPT, accumulation=2, max_norm=None),
        Case(1, PLACEMENTS["nvme"], SkippingGPT),
    ]
    assert_all_train_alike(3, cases, tmp_path)


def test_nodes_hold_replicas_of_what_their_ranks_divide(tmp_path: Path) -> None:
    nodes = {"nodes": 2, "shard_gpus": 2}
    cases = [Case(stage, PLACEMENTS["mixed"], accumulation=2, steps=3, changes=nodes) for stage in (1, 2, 3)]
    assert_all_train_alike(4, cases, tmp_path)


def test_a_parameter_may_have_a_gradient_on_one_rank_only(tmp_path: Path) -> None:
    cases = [
        Case(stage, PLACEMENTS["mixed"], UnevenGPT, accumulation=a) for stage, a in ((0, 1), (1, 2), (2, 2), (3, 1))
    ]
    assert_all_train_alike(2, cases, tmp_path)


def test_recompute_and_a_shared_update_change_nothing(tmp_path: Path) -> None:
    blocks = tuple(f"h.{i}" for i in range(4))
    shared = {"recompute": blocks, "gpu_update_share": 0.5}
    ahead = {"gpu_update_share": 0.7, "buckets": Buckets(1, 1000, 16384, update_slots=9)}
    cases = [Case(stage, PLACEMENTS["host"], changes=shared) for stage in (0, 2, 3)]
    cases += [Case(stage, PLACEMENTS[kept], changes=ahead) for stage, kept in ((1, "mixed"), (3, "host"))]
    assert_all_train_alike(2, cases, tmp_path)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_in_half_precision_the_stage_changes_no_bit(precision: Precision, tmp_path: Path) -> None:
    """Two ranks add two numbers, in any order: whatever is divided, sums and updates are the same."""
    cases = [
        Case(stage, PLACEMENTS[kept], precision=precision, max_norm=None)
        for stage, kept in ((0, "gpu"), (1, "gpu"), (2, "mixed"), (3, "mixed"), (3, "nvme"))
    ]
    first, *others = on_ranks(2, many, cases, str(tmp_path))[0]
    for losses, parameters in others:
        assert losses == first[0]
        assert all(torch.equal(parameters[name], tensor) for name, tensor in first[1].items())


def with_slow_lanes(rank: int, world: int, cases: list[Case], directory: str) -> list[Any]:
    waits, submit = random.Random(rank), Lane.submit

    def slow_submit(lane: Lane, job: Any, after: Any = ()) -> Any:
        def slow_job() -> None:
            time.sleep(waits.uniform(0, 0.003))
            job()

        return submit(lane, slow_job, after)

    Lane.submit = slow_submit  # type: ignore[method-assign] - this process ends after it
    return many(rank, world, cases, directory)


def test_slow_ranks_and_lanes_change_nothing(tmp_path: Path) -> None:
    cases = [Case(stage, PLACEMENTS["mixed"], accumulation=2, steps=2) for stage in (1, 3)]
    assert_all_train_alike(2, cases, tmp_path, with_slow_lanes)


def test_a_plan_for_more_ranks_than_there_are_is_refused() -> None:
    model = GPT()
    with pytest.raises(OffloadError, match=r"plan is for 4 GPUs.*torch.distributed has 1.*--gpus 1"):
        Engine(model, plan_for(model, PLACEMENTS["gpu"], gpus=4, zero_stage=3))
