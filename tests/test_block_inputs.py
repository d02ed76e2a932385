"""Inputs of recomputed blocks that wait on the host: the same training, with less on the device."""

import copy
import random
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.block_inputs import BlockInputs, WaitingInput
from offload.engine import Engine
from offload.plan import Precision, Tier
from offload.residency import checkpoint_host_bytes
from offload.streams import Lane
from tests.models import GPT, LoopingGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, H, plan_for, units_of
from tests.test_engine_equals_pytorch import train_through_tiers

INPUT_BYTES = 4 * 16 * 32 * 4
"""Of one block of the small model: batch, length, width, fp32."""


def plan_with(model: nn.Module, checkpoints: Tier, placements: tuple = (RESIDENT,), nvme: Path | None = None, **k: Any):
    blocks = tuple(u for u in units_of(model) if u.startswith("h."))
    return plan_for(model, placements, nvme, recompute=blocks, checkpoints=checkpoints, **k)


def trained(checkpoints: Tier, kind: type[GPT], placements: tuple, nvme: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = kind()
    plan = plan_with(model, checkpoints, placements, nvme, **changes)
    return train_through_tiers(model, plan, batches(2), 0.05)


def assert_identical(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    for name, parameter in expected[1].items():
        assert torch.equal(found[1][name], parameter), name


@pytest.mark.parametrize(
    ("kind", "placements", "changes"),
    [
        (GPT, (RESIDENT,), {}),
        (LoopingGPT, EVERY_TIER, {}),
        (GPT, EVERY_TIER, {"precision": Precision.BF16, "gradient_accumulation_steps": 2}),
    ],
    ids=["resident", "looping", "bf16, accumulated"],
)
def test_training_is_bit_equal_wherever_the_inputs_wait(
    kind: type[GPT], placements: tuple, changes: dict[str, Any], tmp_path: Path
) -> None:
    assert_identical(
        trained(Tier.HOST, kind, placements, tmp_path, **changes),
        trained(Tier.GPU, kind, placements, tmp_path, **changes),
    )


@pytest.mark.parametrize("slow", ["inputs", "everything"])
def test_slow_transfers_change_nothing(slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing wait shows here: whoever does not wait reads before the bytes are there, or after they have gone."""
    expected = trained(Tier.GPU, GPT, EVERY_TIER, tmp_path)
    waits, submit = random.Random(0), Lane.submit

    def slow_submit(lane: Lane, job: Any, after: Any = ()) -> Any:
        def slow_job() -> None:
            time.sleep(waits.uniform(0, 0.006))
            job()

        return submit(lane, slow_job if slow in (lane.name, "everything") else job, after)

    monkeypatch.setattr(Lane, "submit", slow_submit)
    assert_identical(trained(Tier.HOST, GPT, EVERY_TIER, tmp_path), expected)


def test_the_device_holds_one_input_after_forward_and_two_in_backward() -> None:
    model = GPT(layers=6)
    alive: list[Any] = []
    counts: list[int] = []

    def seen(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        alive.append(weakref.ref(args[0].untyped_storage()))

    with Engine(model, plan_with(model, Tier.HOST)) as engine:
        fetch = BlockInputs.fetch

        def counting(inputs: BlockInputs, waiting: WaitingInput) -> torch.Tensor:
            found = fetch(inputs, waiting)
            chain = [waiting]
            while chain[-1].previous is not None:
                chain.append(chain[-1].previous)
            counts.append(sum(w.device is not None for w in chain))  # beside the one that is handed out
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BlockInputs, "fetch", counting)
            for block in model.h:
                block.register_forward_pre_hook(seen)
            loss = engine(batches(1)[0])
            assert [a() is not None for a in alive] == [False] * 5 + [True]
            engine.backward(loss)
            engine.step()
    assert counts == [1, 1, 1, 1, 1, 0]


def test_the_bytes_are_those_that_were_said_and_all_move_once_each_way_but_for_the_last() -> None:
    model = GPT()
    with Engine(model, plan_with(model, Tier.HOST)) as engine:
        held = engine.meter.now_bytes()["host"]
        for step, tokens in enumerate(batches(3), 1):
            engine.backward(engine(tokens))
            engine.step()
            assert engine.meter.now_bytes()["host"] - held == checkpoint_host_bytes(4, INPUT_BYTES)
            traffic = engine.traffic_bytes()
            assert traffic["device_to_host"] == step * 4 * INPUT_BYTES
            assert traffic["host_to_device"] == step * 3 * INPUT_BYTES


def test_less_is_held_on_the_device_and_evaluation_sends_nothing() -> None:
    peaks = {}
    for tier in (Tier.GPU, Tier.HOST):
        model = GPT(layers=8)
        with Engine(model, plan_with(model, tier)) as engine:
            with torch.no_grad():
                engine(batches(1)[0])
            assert engine.traffic_bytes()["device_to_host"] == 0
            engine.backward(engine(batches(1)[0]))
            engine.step()
            engine.meter.now_bytes()
            peaks[tier] = engine.meter.peak_bytes()["gpu"]
    assert peaks[Tier.GPU] - peaks[Tier.HOST] == 6 * INPUT_BYTES


def test_a_pass_without_a_backward_leaves_its_memory_to_the_next() -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    first, second = batches(2)
    with Engine(model, plan_with(model, Tier.HOST, ((H, H, H),))) as engine:
        engine(first)  # its graph ends here
        engine.backward(engine(second))
        engine.step()
        plain(second).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
        assert engine.gradient_norm == pytest.approx(norm, rel=1e-6)
        assert engine.meter._inputs.host_bytes == checkpoint_host_bytes(4, INPUT_BYTES)


@pytest.mark.gpu
@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER])
def test_the_same_on_a_gpu(placements: tuple, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_identical(
        trained(Tier.HOST, GPT, placements, tmp_path, device="cuda"),
        trained(Tier.GPU, GPT, placements, tmp_path, device="cuda"),
    )
