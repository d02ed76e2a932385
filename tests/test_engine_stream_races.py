"""Nothing that streams, threads and the disk do to the same memory is left to chance, and no wait is there for nothing.

[Note: races]
Transfers that are delayed show what goes wrong when something comes late (``test_slow_transfers_change_nothing``, in
several files). Here nothing needs to come late: ``tests.stream_races`` finds what no wait orders. On the CPU the
streams are simulated, and every crossing is covered: each wait of the engine is left out once, and a race must be found
then. On a GPU the same training runs on its streams, as under torch's CUDA sanitizer.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.plan import Buckets, Precision
from tests.models import GPT, LoopingGPT, SkippingGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, G, H, N, plan_for, units_of
from tests.simulated_streams import simulate_streams
from tests.stream_races import TRAINING, Races
from tests.test_engine_equals_pytorch import optimizer_of, scheduler_of
from tests.test_update_in_backward import LateGPT
from tests.watched_engine import Waits, label_memory, watch, watch_gpu

GPU_SECONDS = 200


class TurningGPT(GPT):
    """Every other batch goes through the layers in the other direction."""

    def __init__(self) -> None:
        super().__init__(layers=2)
        self.turned = False

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in reversed(self.h) if self.turned else self.h:
            x = block(x)
        self.turned = not self.turned
        return self.head(self.ln_f(x))


class HandingOnGPT(SkippingGPT):
    """Behind the part that is not in every step there is a small one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.LayerNorm(32)

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().run(tokens) + self.tail(self.wte(tokens)).mean()


def nothing(_: Engine, __: torch.Tensor, ___: Path) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """Some steps of training."""

    placements: tuple
    kind: Callable[[], GPT] = GPT
    steps: int = 3
    max_norm: float | None = 0.05
    early: bool = False
    recompute: bool = False
    between: Callable[[Engine, torch.Tensor, Path], None] = nothing
    """Done before each step."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the plan."""

    @property
    def accumulation(self) -> int:
        return self.changes.get("gradient_accumulation_steps", 1)


def forget_a_pass(engine: Engine, tokens: torch.Tensor, _: Path) -> None:
    engine(tokens)


def evaluate(engine: Engine, tokens: torch.Tensor, _: Path) -> None:
    with torch.no_grad():
        engine(tokens)


def save(engine: Engine, _: torch.Tensor, path: Path) -> None:
    engine.save_checkpoint(path / "checkpoints")


def hand_on(engine: Engine, _: torch.Tensor, __: Path) -> None:
    """The device updates all units up to ``extra``, and in the step that ``extra`` has no part in all but that one."""
    streamed = engine._streamed
    assert streamed is not None
    sizes = {reach.name: reach.elements for reach in streamed._reach}
    names = list(sizes)
    wanted = sum(sizes[n] for n in names[: names.index("extra") + 1])
    wanted -= 200 if engine.global_step == 2 else 0
    streamed._split.device_share, streamed._split.learns = wanted / sum(sizes.values()), False
    streamed.deal_again()


ON_HOST = ((H, H, H), (G, G, H), (G, H, H), (H, G, H))
SLOTS = Buckets(prefetch_units=1, update_elements=5000, io_bytes=16384, update_slots=9)
SMALL_SLOTS = Buckets(prefetch_units=1, update_elements=1000, io_bytes=16384, update_slots=13)
CASES = {
    "all on the host": Case(((H, H, H),)),
    "every tier": Case(EVERY_TIER),
    "every tier in bf16": Case(EVERY_TIER, changes={"precision": Precision.BF16}),
    "weights on NVMe": Case(((N, H, N),)),
    "two micro-batches": Case(EVERY_TIER, changes={"gradient_accumulation_steps": 2}),
    "turning": Case(((H, H, H),), TurningGPT, changes={"gradient_accumulation_steps": 2}),
    "looping": Case(EVERY_TIER, LoopingGPT),
    "tied": Case(EVERY_TIER, TiedGPT),
    "skipping": Case(EVERY_TIER, SkippingGPT, steps=6),
    "evaluating": Case(EVERY_TIER, between=evaluate),
    "saving": Case(EVERY_TIER, between=save),
    "half of the update on the device": Case(ON_HOST, changes={"gpu_update_share": 0.5}),
    "slots for the update": Case(ON_HOST, steps=5, changes={"gpu_update_share": 0.5, "buckets": SLOTS}),
    "all of the update on the device": Case(
        ((H, H, H),),
        SkippingGPT,  # one part has gradients in the first micro-batch of a step only
        changes={"gpu_update_share": 1.0, "buckets": SLOTS, "gradient_accumulation_steps": 2},
    ),
    "a slot that changes hands": Case(
        ((H, H, H),), HandingOnGPT, between=hand_on, changes={"gpu_update_share": 0.1, "buckets": SMALL_SLOTS}
    ),
    "fp16": Case(EVERY_TIER, changes={"precision": Precision.FP16, "gpu_update_share": 0.4}),
    "inputs on the host": Case(((H, H, H),), recompute=True, changes={"checkpoints": H}),
    "a forgotten pass": Case(EVERY_TIER, recompute=True, between=forget_a_pass, changes={"checkpoints": H}),
    "updates in backward": Case(ON_HOST, LateGPT, early=True, max_norm=None),
    "shared updates in backward": Case(ON_HOST, early=True, max_norm=None, changes={"gpu_update_share": 0.5}),
}
"""Each way of training that has streams of its own, by name."""


def train(case: Case, path: Path, device: str, races: Races) -> None:
    torch.manual_seed(0)
    model = case.kind()
    optimizer = optimizer_of(model)
    recompute = tuple(u for u in units_of(model) if u.startswith("h.")) if case.recompute else ()
    plan = plan_for(model, case.placements, path, device=device, recompute=recompute, **case.changes)
    data = batches(case.steps * case.accumulation)
    with (
        races.thread(TRAINING),
        Engine(model, plan, optimizer, scheduler_of(optimizer), case.max_norm, update_in_backward=case.early) as engine,
    ):
        label_memory(races, engine)
        for number, tokens in enumerate(data):
            if number % case.accumulation == 0:
                case.between(engine, tokens, path)
            engine.backward(engine(tokens))  # no look at the loss, for that would wait for the device
            engine.step()
        engine.state_dict()
        assert engine.overflow_count == 0


def simulated(case: Case, path: Path, left_out: str | None = None) -> tuple[list[str], set[str]]:
    """The races on simulated streams, and the waits."""
    with pytest.MonkeyPatch.context() as patch:
        races, waits = simulate_streams(patch), Waits(left_out)
        watch(patch, races, waits)
        train(case, path, "cpu", races)
        return list(races.found.values()), waits.seen


NEEDED = {
    "BlockInputs._copy: after[0]": "inputs on the host",
    "BlockInputs.begin_pass: waiting.wait()": "a forgotten pass",
    "BlockInputs.fetch: waiting.wait()": "inputs on the host",
    "BlockInputs.send: self._newest.wait()": "inputs on the host",
    "ClipFactor.norm: self._arrived.synchronize()": "fp16",
    "ClipFactor.on_host: self._arrived.synchronize()": "all on the host",
    "GradientCollector._send.<locals>.send: free.wait()": "a slot that changes hands",
    "GradientCollector._send: after[0]": "all on the host",
    "GradientCollector._target: after[0]": "all of the update on the device",
    "GradientCollector._target: after[1]": "turning",
    "GradientCollector._target: idle.wait()": "all on the host",
    "GradientCollector._target: "
    "self._up.copy(buffer, state.host_gradients, after=[idle, gathering.landed]).wait()": "two micro-batches",
    "Saver.save.<locals>.copy: done.synchronize()": "saving",
    "StreamedUpdate._fetch_all: earlier.wait()": "slots for the update",
    "StreamedUpdate._fetch_all: left.wait()": "slots for the update",
    "StreamedUpdate._keep_promise: after[0]": "half of the update on the device",
    "StreamedUpdate._let_go: after[0]": "half of the update on the device",
    "StreamedUpdate._run: begun.wait()": "half of the update on the device",
    "StreamedUpdate._run: earlier.wait()": "slots for the update",
    "StreamedUpdate._update_piece: arrived.wait() (2)": "half of the update on the device",
    "StreamedUpdate._update_piece: visit.before.wait()": "half of the update on the device",
    "StreamedUpdate._update_piece: visit.update.landed.wait()": "half of the update on the device",
    "StreamedUpdate._update_piece: visit.update.landed.wait() (2)": "slots for the update",
    "StreamedUpdate.finish: done.synchronize()": "half of the update on the device",
    "Updater._apply: chunk.gradients_there.synchronize()": "all on the host",
    "Updater._keep_promise: after[0]": "updates in backward",
    "Updater._run: earlier.synchronize()": "half of the update on the device",
    "Updater._stage: after[0]": "updates in backward",
    "WeightMover._read: idle.synchronize()": "weights on NVMe",
    "WeightMover._start: after[0]": "all on the host",
    "WeightMover._start: after[1]": "half of the update on the device",
    "WeightMover.settle: updated.synchronize()": "every tier",
    "WeightMover.use: slot.arrived.wait()": "all on the host",
    "WeightMover.use: updated.wait()": "every tier",
}
"""Where something waits for a stream, and a training in which a race shows that it must."""
SPARE = {
    "DividedGradients._reduce: after[1]": "buffers are free in the order of reductions, so it was waited for with one",
    "Saving.": "copying for a checkpoint has waited for the device already",
    "StreamedUpdate._let_go: after[1]": "state lets the host's update go first, for nobody waits for it",
    "StreamedUpdate._run: after": "the end of the update is timed",
    "StreamedUpdate._update_piece: arrived.wait()": "state comes ahead on the same stream; this is for its failures",
    "Updater.finish: self._last.synchronize()": "the update on the host gives its stream nothing",
    "WeightMover._vacate: slot.arrived.wait()": "what comes into the slot next is behind it on the same stream",
}
"""Other waits, by how their places begin, and what they are for."""


def check(found: list[str], waits: set[str]) -> None:
    assert not found, "\n".join(found)
    unknown = {w for w in waits - NEEDED.keys() if not w.startswith(tuple(SPARE))}
    assert not unknown, "no training shows that these waits are needed: enter one into NEEDED"


@pytest.mark.parametrize("name", CASES)
def test_nothing_races(name: str, tmp_path: Path) -> None:
    check(*simulated(CASES[name], tmp_path))


@pytest.mark.parametrize("wait", NEEDED)
def test_without_any_one_of_the_waits_something_races(wait: str, tmp_path: Path) -> None:
    found, waits = simulated(CASES[NEEDED[wait]], tmp_path, left_out=wait)
    assert wait in waits
    assert found


# On a GPU


def on_gpu(case: Case, path: Path, left_out: str | None = None) -> list[str]:
    """The races on the streams of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        races = watch_gpu(patch)
        watch(patch, races, Waits(left_out))
        train(case, path, "cuda", races)
        return list(races.found.values())


@pytest.fixture(scope="module")
def another_process() -> Iterator[Pool]:
    """One in which torch traces the GPU: once begun, that does not end."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_nothing_races(name: str, another_process: Pool, tmp_path: Path) -> None:
    found = another_process.apply_async(on_gpu, (CASES[name], tmp_path)).get(GPU_SECONDS)
    assert not found, "\n".join(found)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "wait",
    [
        "BlockInputs.fetch: waiting.wait()",
        "GradientCollector._send: after[0]",
        "GradientCollector._target: idle.wait()",
        "StreamedUpdate._keep_promise: after[0]",
        "StreamedUpdate._update_piece: arrived.wait() (2)",
        "Updater._apply: chunk.gradients_there.synchronize()",
        "WeightMover._read: idle.synchronize()",
        "WeightMover._start: after[0]",
        "WeightMover.use: slot.arrived.wait()",
    ],
)
def test_on_a_gpu_a_wait_that_is_missing_shows(wait: str, another_process: Pool, tmp_path: Path) -> None:
    found = another_process.apply_async(on_gpu, (CASES[NEEDED[wait]], tmp_path, wait)).get(GPU_SECONDS)
    assert found
