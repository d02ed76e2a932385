"""What crosses threads: slow lanes and disks change nothing, and what goes wrong there is seen."""

import copy
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.engine import Engine
from offload.errors import CorruptionError, OffloadError, PlanError, TierError
from offload.plan import Budget, Precision, Tier
from offload.store import Store
from offload.streams import Lane
from tests.models import GPT, LoopingGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, N, plan_for
from tests.test_engine_equals_pytorch import assert_same, train_plainly, train_through_tiers


@pytest.mark.parametrize("slow", ["up", "returns", "down", "update", "disk", "everything"])
@pytest.mark.parametrize("kind", [GPT, LoopingGPT])
def test_slow_transfers_change_nothing(
    slow: str, kind: type[GPT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing wait shows here: whoever does not wait reads before the bytes are there."""
    waits = random.Random(0)
    submit, transfer = Lane.submit, Store._transfer

    def slow_submit(lane: Lane, job: Any, after: Any = ()) -> Any:
        def slow_job() -> None:
            time.sleep(waits.uniform(0, 0.004))
            job()

        return submit(lane, slow_job if slow in (lane.name, "everything") else job, after)

    async def slow_transfer(store: Store, *args: Any, **kwargs: Any) -> None:
        import asyncio

        if slow in ("disk", "everything"):
            await asyncio.sleep(waits.uniform(0, 0.004))
        await transfer(store, *args, **kwargs)

    monkeypatch.setattr(Lane, "submit", slow_submit)
    monkeypatch.setattr(Store, "_transfer", slow_transfer)
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    data = batches(4)
    losses, found = train_through_tiers(model, plan_for(model, EVERY_TIER[1:], tmp_path), data, 0.05)
    assert losses == pytest.approx(train_plainly(plain, data, 1, 0.05), rel=1e-6)
    assert_same(found, plain, 1e-6)


def step(engine: Engine, tokens: torch.Tensor) -> None:
    engine.backward(engine(tokens))
    engine.step()


@pytest.mark.parametrize("placement", [(G, G, N), (H, H, N), (N, H, N)])
def test_a_wrong_byte_from_disk_ends_training(placement: tuple, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    with (
        pytest.raises(CorruptionError, match="checksum"),
        Engine(model, plan_for(model, (placement,), tmp_path)) as engine,
    ):
        step(engine, batches(1)[0])
        engine.finish()
        assert engine.store is not None
        engine.store._checksums = dict.fromkeys(engine.store._checksums, 0)
        for tokens in batches(3):
            step(engine, tokens)


def test_a_disk_that_fails_is_named_and_ends_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT()
    engine = Engine(model, plan_for(model, ((H, H, N),), tmp_path))

    async def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Store, "_read_block", broken)
    named = rf"reading the optimizer state of .* NVMe directory {tmp_path} .*Input/output error.*half done"
    with pytest.raises(TierError, match=named):
        for tokens in batches(3):
            step(engine, tokens)
    engine.close()  # what was said is not said again


def test_the_swap_file_is_never_seen_and_its_space_comes_back(tmp_path: Path) -> None:
    model = GPT()
    with Engine(model, plan_for(model, ((N, H, N),), tmp_path)) as engine:
        step(engine, batches(1)[0])
        assert list(tmp_path.iterdir()) == []
        assert engine.store is not None
        assert engine.store.taken_bytes == engine.store.capacity_bytes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER, ((H, H, H),), ((N, H, N),), ((G, G, H),)])
def test_what_is_allocated_is_what_the_footprint_counts(
    placements: tuple, precision: Precision, tmp_path: Path
) -> None:
    model = GPT()
    with Engine(model, plan_for(model, placements, tmp_path, precision)) as engine:
        held = engine.meter._held
        assert engine.arena.taken_bytes == held.host_bytes
        assert (engine.store.taken_bytes if engine.store else 0) == held.nvme_bytes
        device = [s.device_weights for s in engine.states] + [s.device_gradients for s in engine.states]
        moments = [t for s in engine.states if s.device_state for t in s.device_state.tensors()]
        on_device = sum(t.nbytes for t in (*device, *moments) if t is not None)
        on_device += engine._rings.nbytes + engine._gradients.device_bytes
        assert held.gpu_bytes == on_device


@pytest.mark.parametrize("why", ["missing", "file", "small"])
def test_a_bad_swap_directory_is_said_before_anything_is_allocated(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "swap"
    if why == "file":
        directory.write_text("")
    if why == "small":
        directory.mkdir()
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr("offload.engine.Arena", lambda *_: pytest.fail("allocated before the directory was checked"))
    model = GPT()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(TierError, match="does not exist" if why != "small" else "free"):
        Engine(model, plan_for(model, ((H, H, N),), directory))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_too_little_host_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    model = GPT()
    with pytest.raises(TierError, match="host tier needs"):
        Engine(model, plan_for(model, ((H, H, H),)))


def test_a_plan_for_another_model_is_refused_with_what_differs() -> None:
    plan = plan_for(GPT(width=32), (RESIDENT,))
    with pytest.raises(PlanError, match=r"h\.0\.down\.bias is \[32\] in the plan and \[64\] in the model"):
        Engine(GPT(width=64), plan)
    with pytest.raises(PlanError, match="not in the model"):
        Engine(GPT(layers=3), plan)


def test_a_plan_for_several_gpus_is_refused() -> None:
    model = GPT()
    with pytest.raises(OffloadError, match="4 GPUs"):
        Engine(model, plan_for(model, (RESIDENT,), gpus=4))


class ReachingGPT(GPT):
    """The first block's weight is used again at the end, without calling that block."""

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().run(tokens) + self.h[0].proj.weight.sum()


def test_a_parameter_used_outside_of_its_unit_is_refused_by_name() -> None:
    model = ReachingGPT()
    with Engine(model, plan_for(model, ((H, H, H),))) as engine, pytest.raises(OffloadError, match=r"h\.0\.proj"):
        engine(batches(1)[0])


@pytest.mark.parametrize(
    ("placement", "why"),
    [((H, H, G), "optimizer state on gpu"), ((G, N, N), "gradients can not"), ((G, H, G), "update is on gpu")],
)
def test_a_placement_that_can_not_be_carried_out_is_refused(placement: tuple, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        plan_for(GPT(), (placement,), Path("/"))


def test_a_plan_survives_its_json(tmp_path: Path) -> None:
    plan = plan_for(GPT(), EVERY_TIER, tmp_path, budget=Budget(1, 2, 3))
    plan.save(tmp_path / "plan.json")
    assert type(plan).load(tmp_path / "plan.json") == plan
    assert plan.uses(Tier.NVME)


def test_evaluation_between_steps_changes_nothing_and_fetches_what_it_needs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    data = batches(4)
    with Engine(model, plan_for(model, EVERY_TIER, tmp_path), torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        evaluated = []
        for tokens in data:
            step(engine, tokens)
            with torch.no_grad():
                evaluated.append(engine(data[0]).item())
        assert engine.overflow_count == 0
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for tokens, found in zip(data, evaluated, strict=True):
        plain(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert found == pytest.approx(plain(data[0]).item(), rel=1e-5)
