"""In the steady state the training thread waits for no device, and nothing is allocated on it."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload.engine import Engine
from offload.memory import MemoryMeter
from offload.passes import Passes
from offload.plan import Precision
from offload.streams import Done
from tests.models import GPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, plan_for, units_of
from tests.test_engine_equals_pytorch import optimizer_of, scheduler_of

WARM_STEPS = 3
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2", "unique_dim", "masked_select"}
"""Operations whose result a host needs before it goes on: what item, bool, float and their like come down to."""
WAITS: tuple[tuple[Any, str], ...] = (
    (Done, "synchronize"),
    (torch.Tensor, "cpu"),
    (torch.Tensor, "numpy"),
    (torch.Tensor, "tolist"),
    (torch.cuda, "synchronize"),
    (torch.accelerator, "synchronize"),
)
"""The engine waits for events and streams of a device through Done only."""
ALL_AWAY = ((H, H, H),)


class _Reads(TorchDispatchMode):
    """Notes the operations of this thread that read a number from the device."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            self._found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_of_this_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What this thread waits for, as far as it can be told without a device."""
    found: list[str] = []
    here = threading.get_ident()

    def noted(owner: Any, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == here:
                found.append(f"{owner.__name__}.{name}")
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in WAITS:
            patch.setattr(owner, name, noted(owner, name))
        with _Reads(found):
            yield found


def engine_of(
    placements: tuple,
    path: Path | None,
    max_norm: float | None,
    early: bool = False,
    device: str = "cpu",
    **changes: Any,
) -> Engine:
    torch.manual_seed(0)
    model = GPT()
    optimizer = optimizer_of(model)
    plan = plan_for(model, placements, path, device=device, **changes)
    return Engine(model, plan, optimizer, scheduler_of(optimizer), max_norm, update_in_backward=early)


def step(engine: Engine, tokens: torch.Tensor) -> None:
    for _ in range(engine.plan.gradient_accumulation_steps):
        engine.backward(engine(tokens))
        engine.step()


@pytest.mark.parametrize("placements", [(RESIDENT,), ALL_AWAY, EVERY_TIER])
@pytest.mark.parametrize(
    ("max_norm", "early", "changes"),
    [
        (0.05, False, {}),
        (None, False, {"gradient_accumulation_steps": 2}),
        (None, True, {}),
        (0.05, False, {"gpu_update_share": 0.5}),
        (0.05, False, {"recompute": tuple(u for u in units_of(GPT()) if u.startswith("h."))}),
    ],
)
def test_the_training_thread_waits_for_no_device(
    placements: tuple, max_norm: float | None, early: bool, changes: dict, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tokens = batches(1)[0]
    with engine_of(placements, tmp_path, max_norm, early, **changes) as engine:
        for _ in range(WARM_STEPS - 1):
            step(engine, tokens)
        with waits_of_this_thread(monkeypatch) as found:
            step(engine, tokens)
            engine(tokens)  # the next one begins
        assert found == []


def test_in_fp16_it_asks_once_what_became_of_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = batches(1)[0]
    with engine_of(EVERY_TIER, tmp_path, 0.05, precision=Precision.FP16) as engine:
        for _ in range(WARM_STEPS - 1):
            step(engine, tokens)
        with waits_of_this_thread(monkeypatch) as found:
            step(engine, tokens)
            engine(tokens)
    # The read is of host memory, behind the wait.
    assert found == ["Done.synchronize", "_local_scalar_dense"]


@pytest.mark.parametrize(
    ("placements", "changes", "packed", "bounded"),
    [
        ((RESIDENT,), {}, False, False),
        (((G, G, H),), {}, False, False),
        ((RESIDENT,), {"checkpoints": H, "recompute": ("h.1",)}, True, False),
        (ALL_AWAY, {}, True, True),
        ((RESIDENT, (H, H, H)), {}, True, True),
    ],
)
def test_what_never_leaves_the_device_has_no_hooks_on_what_autograd_saves(
    placements: tuple, changes: dict, packed: bool, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose allocator counts what is saved."""
    calls: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    counted(Passes, "pack")
    counted(Passes, "bounded")
    tokens = batches(1)[0]
    losses = []
    for counts_saved in (True, False):
        monkeypatch.setattr(MemoryMeter, "counts_saved", counts_saved)
        calls.clear()
        with engine_of(placements, None, 0.05, **changes) as engine:
            for _ in range(WARM_STEPS):
                step(engine, tokens)
            losses.append(engine(tokens).item())
        assert (calls["pack"] > 0, calls["bounded"] > 0) == (packed or counts_saved, bounded)
    assert losses[0] == losses[1]


def test_what_waits_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(ALL_AWAY, tmp_path, 0.05) as engine:
        step(engine, batches(1)[0])
        with waits_of_this_thread(monkeypatch) as found:
            assert engine.gradient_norm is not None
            torch.ones(()).item()
            bool(torch.ones(()))
            engine.finish()
        assert found.count("_local_scalar_dense") == 3
        assert "Done.synchronize" in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("placements", [(RESIDENT,), ALL_AWAY, ((G, G, H), (G, H, H), (H, G, H))])
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_gpu_three_steps_synchronise_nothing(placements: tuple, precision: Precision, share: float) -> None:
    """torch raises at any call that makes a host wait for a CUDA stream, in whichever thread."""
    tokens = batches(1)[0].cuda()
    with engine_of(placements, None, 0.05, device="cuda", precision=precision, gpu_update_share=share) as engine:
        for _ in range(WARM_STEPS):
            step(engine, tokens)
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                step(engine, tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", [False, True])
def test_on_a_gpu_the_allocator_takes_nothing_after_the_third_step(recompute: bool) -> None:
    tokens = batches(1)[0].cuda()
    blocks = tuple(u for u in units_of(GPT()) if u.startswith("h.")) if recompute else ()
    counted = ("num_alloc_retries", "num_device_alloc", "num_device_free", "reserved_bytes.all.allocated")
    with engine_of(ALL_AWAY, None, 0.05, device="cuda", precision=Precision.BF16, recompute=blocks) as engine:
        found = []
        for number in range(WARM_STEPS + 5):
            step(engine, tokens)
            if number >= WARM_STEPS - 1:
                engine.finish()
                torch.cuda.synchronize()
                stats = torch.cuda.memory_stats()
                found.append([stats[name] for name in counted])
        assert engine.overflow_count == 0
    assert all(counts == found[0] for counts in found), dict(zip(counted, zip(*found, strict=True), strict=True))
