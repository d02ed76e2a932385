"""The engine over NCCL, a process for each of two GPUs: the facts that gloo shows of CPUs, and what only devices show.

All of it runs in one pair of processes, for starting one takes long; each test looks at its own part of what they did.
"""

import faulthandler
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import watchdog
from offload.engine import Engine
from offload.native import native_update
from offload.plan import Buckets, Plan, Precision
from offload.streams import Lane
from tests.loops import losses_of
from tests.models import GPT
from tests.plans import plan_for
from tests.ranks import on_ranks
from tests.test_engine_equals_pytorch import distance, optimizer_of, scheduler_of
from tests.test_engine_ranks import (
    PLACEMENTS,
    Case,
    global_batches,
    parts_of,
    train_on_rank,
    train_plainly,
)
from tests.test_engine_steady_state import WARM_STEPS

WORLD = 2
HANGS_SECONDS = 40
"""After which a process shows where its threads are, and the watchdog says who keeps the other waiting."""
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 1e-5, 1e-4
"""As on one GPU: kernels add in an order of their own, and AdamW makes whole steps of gradients that are rounding."""
BLOCKS = tuple(f"h.{i}" for i in range(4))
AHEAD = Buckets(1, 1000, 16384, update_slots=9)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(150),
    pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="fewer than two CUDA devices"),
]


def on_cuda(**changes: Any) -> dict[str, Any]:
    return {"device": "cuda", **changes}


FP32 = [Case(stage, PLACEMENTS[kept], changes=on_cuda()) for stage in range(4) for kept in PLACEMENTS]
UNCLIPPED = [
    Case(stage, PLACEMENTS[kept], accumulation=2, max_norm=None, steps=3, changes=on_cuda())
    for stage, kept in ((1, "gpu"), (2, "mixed"), (3, "host"))
]
RECOMPUTED = [
    Case(stage, PLACEMENTS["host"], changes=on_cuda(recompute=BLOCKS, gpu_update_share=0.5)) for stage in (0, 3)
]
SLOW = [Case(stage, PLACEMENTS["mixed"], accumulation=2, steps=3, changes=on_cuda()) for stage in (1, 3)]


def in_bf16(stage: int, kept: str, **changes: Any) -> Case:
    return Case(stage, PLACEMENTS[kept], precision=Precision.BF16, changes=on_cuda(**changes))


SHARED = [
    [
        in_bf16(stage, kept, gpu_update_share=share, **more)
        for share, more in ((0.0, {}), (0.5, {}), (0.7, {"buckets": AHEAD}))
    ]
    for stage, kept in ((3, "host"), (2, "mixed"))
]

# What the processes do


def trained(rank: int, world: int, directory: str, cases: list[Case]) -> list[Any]:
    return [train_on_rank(rank, world, case, directory) for case in cases]


def beside_one_process(rank: int, world: int, directory: str, cases: list[Case]) -> list[Any]:
    """For each case what the rank has, and on the first one also what one process on the global batches makes of it."""
    results = []
    for case in cases:
        losses, parameters = train_on_rank(rank, world, case, directory)
        expected = None
        if rank == 0:
            torch.manual_seed(0)
            plain = case.kind().cuda()
            data = [tokens.cuda() for tokens in global_batches(case.steps * case.accumulation, world)]
            expected = (
                train_plainly(plain, data, world, case),
                {n: p.detach().cpu() for n, p in plain.named_parameters()},
            )
        results.append((losses, parameters, expected))
    return results


def with_slow_streams(rank: int, world: int, directory: str, cases: list[Case]) -> list[Any]:
    """Before each job of a lane its thread waits, or its stream: whoever does not come after it is too early."""
    waits, submit = random.Random(rank), Lane.submit

    def slow_submit(lane: Lane, job: Callable[[], None], after: Any = ()) -> Any:
        def slow_job() -> None:
            if waits.random() < 0.5:
                time.sleep(waits.uniform(0, 0.002))
            else:
                torch.cuda._sleep(waits.randrange(4_000_000))  # cycles: up to 2 ms
            job()

        return submit(lane, slow_job, after)

    Lane.submit = slow_submit  # type: ignore[method-assign]
    try:
        return beside_one_process(rank, world, directory, cases)
    finally:
        Lane.submit = submit  # type: ignore[method-assign]


def kernels_that_repeat(rank: int, world: int, directory: str, groups: list[list[Case]]) -> list[Any]:
    """Trained with kernels that give the same bits every time, as far as there are any."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return [trained(rank, world, directory, cases) for cases in groups]
    finally:
        torch.use_deterministic_algorithms(False)


def host_plan(model: GPT, directory: str, world: int, **changes: Any) -> Plan:
    buckets = Buckets(prefetch_units=1, update_elements=1000, io_bytes=16384)
    stage = 3 if world > 1 else 0
    return plan_for(
        model,
        PLACEMENTS["host"],
        Path(directory),
        device="cuda",
        gpus=world,
        zero_stage=stage,
        buckets=buckets,
        **changes,
    )


def host_engine(model: GPT, plan: Plan) -> Engine:
    optimizer = optimizer_of(model)
    return Engine(model, plan, optimizer, scheduler_of(optimizer), 0.05)


def saved_and_gone_on(rank: int, world: int, directory: str) -> list[float]:
    """The losses of two steps behind a checkpoint of the third."""
    torch.manual_seed(0)
    model, data = GPT(), parts_of(global_batches(5, world), world, rank)
    with host_engine(model, host_plan(model, directory, world)) as engine:
        losses_of(engine, data[:3])
        engine.save_checkpoint(f"{directory}/saved").wait()
        return losses_of(engine, data[3:])


def without_waiting(rank: int, world: int, directory: str) -> int:
    """Steps behind the third, with torch raising wherever a thread waits for a stream."""
    torch.manual_seed(0)
    model = GPT()
    tokens = parts_of(global_batches(1, world), world, rank)[0].cuda()
    plan = host_plan(model, directory, world, precision=Precision.BF16, gpu_update_share=0.5)
    with host_engine(model, plan) as engine:
        for _ in range(WARM_STEPS):
            engine.backward(engine(tokens))
            engine.step()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                engine.backward(engine(tokens))
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return engine.global_step


def everything(rank: int, world: int, directory: str) -> dict[str, Any]:
    """Each part's result, or the text of what it raised."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for products that repeat
    torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    watchdog.begin(timeout_seconds=HANGS_SECONDS)
    parts: dict[str, Callable[[], Any]] = {
        "fp32": lambda: beside_one_process(rank, world, directory, FP32),
        "unclipped": lambda: beside_one_process(rank, world, directory, UNCLIPPED),
        "recomputed": lambda: beside_one_process(rank, world, directory, RECOMPUTED),
        "shared": lambda: kernels_that_repeat(rank, world, directory, SHARED),
        "saved": lambda: saved_and_gone_on(rank, world, directory),
        "steady": lambda: without_waiting(rank, world, directory),
        "slow": lambda: with_slow_streams(rank, world, directory, SLOW),
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        faulthandler.dump_traceback_later(HANGS_SECONDS, file=sys.__stderr__)
        began = time.monotonic()
        try:
            found[name] = part()
        except Exception:  # noqa: BLE001 - the test of this part shows it, and the others have theirs
            found[name] = traceback.format_exc()
        print(f"rank {rank}: {name} took {time.monotonic() - began:.1f} s", file=sys.__stderr__, flush=True)
    faulthandler.cancel_dump_traceback_later()
    watchdog.end()
    return found


# What is looked at


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ranks")
    each = on_ranks(WORLD, everything, str(directory))
    return [{**found, "directory": str(directory)} for found in each]


def of(ranks: list[dict[str, Any]], part: str) -> list[Any]:
    """What each rank has of a part."""
    for rank, found in enumerate(ranks):
        assert not isinstance(found[part], str), f"rank {rank}: {found[part]}"
    return [found[part] for found in ranks]


def assert_trained_alike(ranks: list[dict[str, Any]], part: str, cases: list[Case]) -> None:
    """As one process on the same global batches, and both ranks with the same parameters to the last bit."""
    for case, *each in zip(cases, *of(ranks, part), strict=True):
        (losses, parameters, expected), (other_losses, others, _) = each
        means = [(a + b) / WORLD for a, b in zip(losses, other_losses, strict=True)]
        assert means == pytest.approx(expected[0], rel=LOSS_TOLERANCE), case
        for name, tensor in expected[1].items():
            assert distance(parameters[name], tensor) <= PARAMETER_TOLERANCE, (case, name)
        assert all(torch.equal(tensor, others[name]) for name, tensor in parameters.items()), case


def test_every_stage_and_placement_trains_as_one_process(ranks: list[dict[str, Any]]) -> None:
    assert_trained_alike(ranks, "fp32", FP32)


def test_micro_batches_add_up_without_a_clip(ranks: list[dict[str, Any]]) -> None:
    assert_trained_alike(ranks, "unclipped", UNCLIPPED)


def test_recompute_and_a_shared_update_change_nothing(ranks: list[dict[str, Any]]) -> None:
    assert_trained_alike(ranks, "recomputed", RECOMPUTED)


def test_slow_threads_and_streams_change_nothing(ranks: list[dict[str, Any]]) -> None:
    assert_trained_alike(ranks, "slow", SLOW)


@pytest.mark.skipif(native_update() is None, reason="torch's update on the host differs from the device's in its roots")
def test_in_bf16_who_updates_an_element_changes_no_bit(ranks: list[dict[str, Any]]) -> None:
    for groups in of(ranks, "shared"):
        for cases, ((losses, parameters), *others) in zip(SHARED, groups, strict=True):
            for case, (other_losses, other) in zip(cases[1:], others, strict=True):
                assert other_losses == losses, case
                assert all(torch.equal(other[name], tensor) for name, tensor in parameters.items()), case


def test_no_thread_waits_for_the_device_after_the_third_step(ranks: list[dict[str, Any]]) -> None:
    assert of(ranks, "steady") == [WARM_STEPS + 3] * WORLD


def test_what_two_gpus_saved_goes_on_on_one(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = [sum(losses) / WORLD for losses in zip(*of(ranks, "saved"), strict=True)]
    torch.manual_seed(9)
    model = GPT()
    with host_engine(model, host_plan(model, str(tmp_path), 1)) as engine:
        engine.load_checkpoint(f"{ranks[0]['directory']}/saved")
        assert losses_of(engine, global_batches(5, WORLD)[3:]) == pytest.approx(expected, rel=LOSS_TOLERANCE)
