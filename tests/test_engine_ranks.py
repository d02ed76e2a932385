"""Training over several ranks is training: the losses and parameters of one process on the same global batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offload.engine import Engine
from offload.plan import Buckets
from offload.residency import footprint
from offload.shards import Shards
from tests.models import GPT, batches
from tests.plans import EVERY_TIER, G, H, N, plan_for
from tests.ranks import on_ranks
from tests.test_engine_equals_pytorch import distance, optimizer_of, scheduler_of

STEPS = 20
PLACEMENTS = {"gpu": ((G, G, G),), "host": ((H, H, H),), "nvme": ((N, H, N),), "mixed": EVERY_TIER}
BUCKETS = Buckets(prefetch_units=1, update_elements=1000, io_bytes=16384)


def parts_of(data: list[torch.Tensor], world: int, rank: int) -> list[torch.Tensor]:
    """This rank's part of every global batch."""
    return [tokens.chunk(world)[rank] for tokens in data]


def global_batches(count: int, world: int) -> list[torch.Tensor]:
    """Of two samples a rank."""
    torch.manual_seed(7)
    return [torch.cat([batches(1, seed=i * world + r)[0][:2] for r in range(world)]) for i in range(count)]


def train_plainly(model: Any, data: list, world: int, accumulation: int, max_norm: float | None) -> list[float]:
    """One process on the global batches; each loss is the mean of the ranks' losses."""
    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer)
    losses = []
    for start in range(0, len(data), accumulation):
        for tokens in data[start : start + accumulation]:
            loss = torch.stack([model(part) for part in tokens.chunk(world)]).mean()
            (loss / accumulation).backward()
            losses.append(loss.item())
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses


def train_on_rank(
    rank: int, world: int, kind: type, stage: int, placements: tuple, accumulation: int, max_norm: float | None,
    directory: str, **changes: Any,
) -> tuple[list[float], dict[str, torch.Tensor], int]:  # fmt: skip
    torch.manual_seed(rank)  # the first rank's parameters are everybody's
    if rank == 0:
        torch.manual_seed(0)
    model = kind()
    plan = plan_for(
        model, placements, Path(directory), **{
            "gpus": world, "zero_stage": stage, "gradient_accumulation_steps": accumulation, "buckets": BUCKETS, **changes
        },
    )  # fmt: skip
    optimizer = optimizer_of(model)
    losses = []
    with Engine(model, plan, optimizer, scheduler_of(optimizer), max_norm) as engine:
        shapes, units = [s.unit.shape for s in engine.states], [s.unit.placement for s in engine.states]
        held = footprint(shapes, units, plan.buckets, plan.precision, 0.0, Shards.of(plan))
        assert engine.arena.taken_bytes == held.host_bytes
        assert (engine.store.taken_bytes if engine.store is not None else 0) == held.nvme_bytes
        for tokens in parts_of(global_batches(STEPS * accumulation, world), world, rank):
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        assert engine.overflow_count == 0
        return losses, engine.state_dict(), engine._gradients.overflow_count if world > 1 else 0


def many(rank: int, world: int, cases: list[tuple], directory: str) -> list[Any]:
    return [train_on_rank(rank, world, *case, directory) for case in cases]


def assert_all_train_alike(world: int, cases: list[tuple], tmp_path: Path) -> None:
    """Cases are (model, stage, placements, accumulation, max_norm)."""
    each = on_ranks(world, many, cases, str(tmp_path))
    for i, (kind, stage, placements, accumulation, max_norm) in enumerate(cases):
        torch.manual_seed(0)
        plain = kind()
        expected = train_plainly(plain, global_batches(STEPS * accumulation, world), world, accumulation, max_norm)
        found = [sum(losses) / world for losses in zip(*(ranks[i][0] for ranks in each), strict=True)]
        what = f"world {world}, {kind.__name__}, stage {stage}, {placements}, accumulation {accumulation}"
        assert found == pytest.approx(expected, rel=1e-6), what
        for ranks in each:
            for name, parameter in plain.named_parameters():
                assert distance(ranks[i][1][name], parameter.detach()) <= 1e-5, (what, name)
        for name, tensor in each[0][i][1].items():
            assert all(torch.equal(tensor, ranks[i][1][name]) for ranks in each), (what, name)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_twenty_steps_in_every_stage_end_where_one_process_does(world: int, tmp_path: Path) -> None:
    cases = [(GPT, stage, placement, 1, 0.05) for stage in range(4) for placement in PLACEMENTS.values()]
    assert_all_train_alike(world, cases, tmp_path)
