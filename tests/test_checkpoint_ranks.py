"""Ranks save together, each its own part; what they saved goes on over other ranks, stages and placements."""

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import checkpoint
from offload.checkpoint import checked, found
from offload.engine import Engine
from offload.plan import Buckets, Plan, Precision
from tests.models import FrozenGPT
from tests.plans import EVERY_TIER, RESIDENT, G, H, plan_for
from tests.ranks import on_ranks
from tests.test_checkpoint import engine_for
from tests.test_engine_ranks import global_batches, parts_of

MIRRORED = ((G, G, H),)
LAYOUTS = {
    "stage 3, every tier": (3, EVERY_TIER),
    "stage 2, on the device": (2, (RESIDENT,)),
    "stage 1, updated on the host": (1, MIRRORED),
    "stage 0, every tier": (0, EVERY_TIER),
}
GLOBAL = 6
"""Parts of a global batch, for any number of ranks up to three."""


def plan_of(model: torch.nn.Module, layout: str, world: int, directory: str, **changes: Any) -> Plan:
    stage, placements = LAYOUTS[layout]
    buckets = Buckets(prefetch_units=1, update_elements=1000, io_bytes=16384)
    return plan_for(
        model, placements, Path(directory), Precision.BF16, gpus=world, zero_stage=stage, buckets=buckets, **changes
    )


def steps(engine: Engine, rank: int, world: int, count: int) -> list[float]:
    losses = []
    for tokens in parts_of(global_batches(5, GLOBAL)[engine.global_step :][:count], world, rank):
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def save_and_go_on(rank: int, world: int, layouts: list[str], directory: str, changes: dict) -> list[Any]:
    """For each layout the losses and the state at the end, with a checkpoint after three steps."""
    results = []
    for layout in layouts:
        torch.manual_seed(rank)
        model = FrozenGPT()
        with engine_for(model, plan_of(model, layout, world, directory, **changes)) as engine:
            steps(engine, rank, world, 3)
            before = engine.state_dict()
            saving = engine.save_checkpoint(f"{directory}/{layout}", client_state={"rank": 0})
            losses = steps(engine, rank, world, 2)
            saving.wait()
            results.append((before, losses, engine.state_dict()))
    return results


def load_and_go_on(rank: int, world: int, layouts: list[tuple[str, str]], directory: str) -> list[Any]:
    """The same from (saved layout, layout to go on with)."""
    results = []
    for saved, layout in layouts:
        torch.manual_seed(9)
        model = FrozenGPT()
        with engine_for(model, plan_of(model, layout, world, directory)) as engine:
            assert engine.load_checkpoint(f"{directory}/{saved}")[1] == {"rank": 0}
            before = engine.state_dict()
            results.append((before, steps(engine, rank, world, 2), engine.state_dict()))
    return results


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_what_two_ranks_saved_goes_on_over_any_ranks_stages_and_placements(tmp_path: Path) -> None:
    names = list(LAYOUTS)
    saved = on_ranks(2, save_and_go_on, names, str(tmp_path), {})
    for layout in names:
        path = found(tmp_path / layout)["step-3"]
        assert {"rank-0.safetensors", "rank-1.safetensors"} < {p.name for p in path.iterdir()}
        assert checked(path).manifest["world_size"] == 2
    # The same ranks and layout: the undisturbed training, to the last bit.
    for rank, results in enumerate(on_ranks(2, load_and_go_on, [(n, n) for n in names], str(tmp_path))):
        for (before, losses, after), (*expected, after_expected) in zip(results, saved[rank], strict=True):
            assert equal(before, expected[0])
            assert losses == expected[1]
            assert equal(after, after_expected)
    # One rank, and three, with another layout: the same numbers to go on from, and training alike.
    others = [(name, names[(i + 1) % len(names)]) for i, name in enumerate(names)]
    for world in (1, 3):
        ranks = (
            [load_and_go_on(0, 1, others, str(tmp_path))]
            if world == 1
            else on_ranks(3, load_and_go_on, others, str(tmp_path))
        )
        for i in range(len(names)):
            assert all(equal(results[i][0], saved[0][i][0]) for results in ranks)
            expected = [sum(pair) / 2 for pair in zip(saved[0][i][1], saved[1][i][1], strict=True)]
            losses = [sum(each) / world for each in zip(*(results[i][1] for results in ranks), strict=True)]
            assert losses == pytest.approx(expected, rel=2e-2)


DISKS_THAT_ARE_FULL = [(1, "posix_fallocate"), (0, "posix_fallocate"), (1, "fsync"), (0, "mkdir"), (0, "manifest")]
"""The rank, and the call of it that finds no room; the last two are the first rank's alone."""


def fail_on_one(rank: int, world: int, directory: str) -> list[tuple[str, list[str]]]:
    """What each rank is told of each checkpoint, and the checkpoints that are there then."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_manifest(path: Path, data: bytes) -> dict[str, int]:
        return full() if path.name == checkpoint.MANIFEST else write_durably(path, data)  # type: ignore[return-value]

    write_durably, said, model = checkpoint.write_durably, [], FrozenGPT()
    places = {"mkdir": (Path, "mkdir"), "manifest": (checkpoint, "write_durably")}
    with engine_for(model, plan_of(model, "stage 3, every tier", world, directory)) as engine:
        for failing, call in [(-1, ""), *DISKS_THAT_ARE_FULL, (-1, "")]:
            losses = steps(engine, rank, world, 1) if engine.global_step < 5 else []
            assert all(map(math.isfinite, losses))
            place, name = places.get(call, (os, call))
            with pytest.MonkeyPatch.context() as patched:
                if failing == rank:
                    patched.setattr(place, name, no_manifest if call == "manifest" else full)
                saving = engine.save_checkpoint(f"{directory}/c", f"t{len(said)}")
                saving.settle()
                said.append((str(saving.error or ""), list(found(Path(directory, "c")))))
    return said


def test_where_the_disk_of_one_rank_is_full_none_has_a_checkpoint_and_all_go_on(tmp_path: Path) -> None:
    both = on_ranks(2, fail_on_one, str(tmp_path))
    for number, (failing, _) in enumerate(DISKS_THAT_ARE_FULL, 1):
        for rank, told in enumerate(both):
            error, there = told[number]
            who = "" if rank == failing else f"rank {failing} could not write its part: "
            assert f"was not saved: {who}No space left on device; what was there" in error, (number, rank)
            assert there == ["t0"], "what was there before, and nothing else"
    for told in both:
        assert told[0][0] == told[-1][0] == ""
    assert list(found(tmp_path / "c")) == ["t6", "t0"]
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"t6", "t0", "latest"}
    checked(tmp_path / "c" / "t0")


def test_replicas_save_one_copy(tmp_path: Path) -> None:
    layout = "stage 3, every tier"
    saved = on_ranks(2, save_and_go_on, [layout], str(tmp_path), {"nodes": 2, "shard_gpus": 1})
    path = found(tmp_path / layout)["step-3"]
    assert (path / "rank-1.safetensors").stat().st_size < (path / "rank-0.safetensors").stat().st_size / 3
    (before, _, _) = load_and_go_on(0, 1, [(layout, layout)], str(tmp_path))[0]
    assert equal(before, saved[0][0][0])
