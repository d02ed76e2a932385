"""Train a model file by a plan: the loop, its run directory, and what a person sees of it."""

import math
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from memplan.audit import UNAUDITED, check_plan
from memplan.batches import LargerBatches, token_count
from memplan.errors import MemplanError, RunDirectoryError, TrainingFailed
from memplan.export import keep_config
from memplan.first_values import Start, start_of
from memplan.formatting import format_bytes
from memplan.launch import ALONE, Place, blamed, together
from memplan.progress import INTERRUPTED, Progress
from memplan.saving import RunCheckpoints, batches_drawn, optimizer_of, to_resume
from offload import checkpoint, restore, watchdog
from offload.engine import Engine
from offload.errors import CheckpointError, OffloadError, WeightsError
from offload.events import EventLog
from offload.plan import Plan, Precision
from offload.store import check_directory
from profiler.blame import user_traceback
from profiler.contract import ModelSource, call_model
from profiler.errors import ProfilerError, SourceError

CHECKPOINTS = "checkpoints"
"""The folder of a run with its checkpoints."""
LOSSES_AVERAGED = 10


@dataclass(frozen=True)
class TrainingOptions:
    """What a run is asked to do beside its plan."""

    last_step: int
    """The number of the last optimizer step, counted from the start of the first run."""
    learning_rate: float
    max_grad_norm: float
    seed: int
    resume: bool
    dashboard: bool
    checkpoint_every: int | None = None
    """Steps between two checkpoints; None for one at the end only."""
    keep_checkpoints: int = 2
    """How many of the newest stay."""
    session: str = ""
    """Equal in what the processes that were started together tell."""


def prepare_run(run_dir: Path, *, resume: bool, restarted: bool = False) -> bool:
    """Make the run's directory; raises RunDirectoryError when it holds another run's files, or none to resume.

    Gives whether to resume: ``restarted`` by a launcher it goes on from the last checkpoint, or from the beginning
    where it had not come to one.
    """
    events = run_dir / "events.jsonl"
    if restarted and not resume:
        run_dir.mkdir(parents=True, exist_ok=True)  # the first start may have ended before it came to this
        return bool(checkpoint.found(run_dir / CHECKPOINTS))
    if resume:
        if not checkpoint.found(run_dir / CHECKPOINTS):
            raise CheckpointError(f"there is no checkpoint in {run_dir / CHECKPOINTS}; train without --resume first")
        return True
    if events.exists() and '"event": "step"' in events.read_text():
        raise RunDirectoryError(f"{run_dir} holds a run already; go on with it by --resume, or name another --out")
    run_dir.mkdir(parents=True, exist_ok=True)
    for left in (events, *run_dir.glob("events-*.jsonl")):  # of a run that failed before its first step
        left.unlink(missing_ok=True)
    return False


def train(
    source: ModelSource,
    plan: Plan,
    run_dir: Path,
    options: TrainingOptions,
    console: Console,
    place: Place = ALONE,
) -> int:
    """Train to the last step and save a checkpoint; returns the exit code (0, or 130 when interrupted).

    The run directory must have been prepared. On the way out, whichever way, the engine is closed and the end is
    written to the events. Several processes train together, each with events of its own; ``console`` is the first's.
    """
    console = console if place.speaks else Console(quiet=True)
    if plan.nvme_dir is not None:
        check_directory(Path(plan.nvme_dir), plan.prediction.nvme_bytes)
    torch.manual_seed(options.seed)
    name = "events.jsonl" if place.speaks else f"events-{place.rank}.jsonl"
    with EventLog(run_dir / name) as events, _stop_on_interrupt() as stop:
        start = start_of(source, plan, resume=options.resume)
        if start.remark:
            console.print(start.remark, soft_wrap=True, highlight=False, markup=False)
        if plan.prediction.made_for is None:
            console.print(UNAUDITED, soft_wrap=True, highlight=False, markup=False)
        run = _Run(source, start, plan, run_dir, options, events, place)
        if place.speaks:  # only now: a plan that is refused must not take the place of the run's own
            keep_config(source, start.model, run_dir)
            plan.save(run_dir / "plan.json")
        with (
            Progress(run_dir, options.dashboard and place.speaks, console) as progress,
            run.told_of(progress),
            run.explaining(),
        ):
            with run.engine, run.explaining():
                run.start(progress)
                run.loop(stop, progress)
                path = run.checkpoints.finish(run.position())
            reason = "interrupted" if run.stopped else "finished"
            events.write("end", reason=reason, step=run.step, message=f"checkpoint {path}")
    count = len(run.losses)
    loss = f", loss {sum(run.losses) / count:.4f} over the last {count} steps" if count else ""
    console.print(f"{reason} at step {run.step}{loss}; checkpoint in {path}", soft_wrap=True, highlight=False)
    if run.nonfinite_steps:
        console.print(f"{run.nonfinite_steps} steps had gradients that are not finite", highlight=False)
    predicted = plan.predicted_bytes
    held = [f"{tier} {format_bytes(size)} of {format_bytes(predicted[tier])}" for tier, size in run.peak_bytes.items()]
    if held:
        console.print(f"peak of predicted: {', '.join(held)}", soft_wrap=True, highlight=False)
    return INTERRUPTED if run.stopped else 0


class _Run:
    """One training run: the engine, its data, and what it tells."""

    def __init__(
        self,
        source: ModelSource,
        start: Start,
        plan: Plan,
        run_dir: Path,
        options: TrainingOptions,
        events: EventLog,
        place: Place,
    ) -> None:
        self.source, self.plan, self.run_dir, self.options, self.events = source, plan, run_dir, options, events
        self.place = place
        self.stopped = False
        """Whether somebody asked to stop, and every process knows."""
        model = start.model
        model.train()
        self.parameters = sum(p.numel() for p in model.parameters())
        check_plan(plan, model)
        self._found: checkpoint.Checkpoint | None = None
        self._warnings: list[str] = []
        if options.resume:
            self._found, self._warnings = to_resume(run_dir / CHECKPOINTS, plan.micro_batch_size)
        optimizer = optimizer_of(plan, model, options.learning_rate, self._found)
        max_norm = options.max_grad_norm
        try:
            self.engine = Engine(model, plan, optimizer, max_grad_norm=max_norm, events=events, weights=start.weights)
        except WeightsError as error:
            raise WeightsError(f"{error}; or name {source.path} to start from random weights") from error
        if place.rank:  # all have the first one's weights, but each its own dropout
            torch.manual_seed(options.seed + place.rank)
        self.drawn = 0
        """Micro-batches drawn from the data, for all processes."""
        self.losses: deque[float] = deque(maxlen=LOSSES_AVERAGED)
        self.peak_bytes: dict[str, int] = {}
        self._ended = False
        self.nonfinite_steps = 0
        """Steps so far whose gradients had a NaN or an infinity in them."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.engine.global_step

    def start(self, progress: Progress) -> None:
        """Restore the checkpoint when resuming, put the data where it was, and announce the run."""
        engine, plan, options, folder = self.engine, self.plan, self.options, self.run_dir / CHECKPOINTS
        self.batches = self.source.train_batches(plan.micro_batch_size)
        if (found := self._found) is not None:
            if found.step > options.last_step:
                raise RunDirectoryError(
                    f"the run in {self.run_dir} has come to step {found.step}, beyond --steps {options.last_step}: "
                    "that is the number of the last step, counted from the very start; name a later one"
                )
            for _ in range(batches_drawn(found)):
                self._next()
            restore.load(engine, found)
        kept = options.checkpoint_every, options.keep_checkpoints
        self.checkpoints = RunCheckpoints(engine, folder, *kept, self.events, progress.say)
        self.events.write(
            "run",
            model=plan.model,
            device=plan.device,
            precision=plan.precision,
            parameters=self.parameters,
            pid=os.getpid(),
            host=socket.gethostname(),
            rank=self.place.rank,
            ranks=self.place.world,
            session=options.session,
            first_step=engine.global_step + 1,
            last_step=self.options.last_step,
            micro_batch_size=plan.micro_batch_size,
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            budget_bytes=plan.budget_bytes,
            predicted_bytes=plan.predicted_bytes,
            predicted_step_seconds=plan.prediction.step_seconds,
            bottleneck=plan.prediction.bottleneck,
            units=[
                {
                    "name": state.unit.name,
                    "elements": state.unit.shape.elements,
                    "parameters": state.unit.placement.parameters,
                    "gradients": state.unit.placement.gradients,
                    "optimizer": state.unit.placement.optimizer,
                }
                for state in engine.states
            ],
        )
        for message in self._warnings:
            self._warn(message, progress)

    def _warn(self, message: str, progress: Progress) -> None:
        self.events.write("warning", step=self.step, message=message)
        progress.say(f"warning: {message}")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """What ends the run by an error is told: to the other processes, in the events, and with the file's own lines.

        It comes before the engine closes, whose collectives may wait for processes that must hear of it, and after it.
        """
        try:
            yield
        except BaseException as error:
            told: BaseException = error
            if isinstance(error, Exception) and not isinstance(error, OffloadError | ProfilerError | MemplanError):
                # What fails before any step is done fails on whatever the file gives: it is the file's fault.
                kind = TrainingFailed if self.losses else SourceError
                sentence = f"training failed in step {self.step + 1}: {type(error).__name__}: {error}"
                told = kind(sentence, user_traceback(error, self.source.path))
            blamed(told)
            self._write_end(error, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            if told is error:
                raise
            raise told from error

    @contextmanager
    def told_of(self, progress: Progress) -> Iterator[None]:
        """What the watchdog finds is in the events; where it ends this process, the dashboard shows that first."""
        if (dog := watchdog.current()) is None:
            yield
            return

        def end() -> None:
            self._write_end(None, "failed")
            progress.close()

        dog.on_verdict = end
        dog.on_wait = lambda place, seconds: self.events.write("waiting", step=dog.step, inside=place, seconds=seconds)
        try:
            yield
        finally:
            dog.on_verdict = lambda: None

    def _write_end(self, error: BaseException | None, reason: str) -> None:
        """Once: the reason in a sentence, and which process is to blame where there are several."""
        if self._ended:
            return
        self._ended = True
        verdict = dog.verdict if (dog := watchdog.current()) is not None else None
        message = verdict.sentence if verdict is not None else str(error) or type(error).__name__
        blamed_rank = {"rank": verdict.rank} if verdict is not None else {}
        self.events.write("end", reason=reason, step=self.step, message=message, **blamed_rank)

    def position(self) -> dict[str, Any]:
        """Where the data is, for a checkpoint."""
        return {"batches": self.drawn, "micro_batch_size": self.plan.micro_batch_size}

    def loop(self, stop: "_Stop", progress: Progress) -> None:
        """Step until the last step, the end of the data, or a wish to stop."""
        larger = LargerBatches(self.plan)
        before, waited = self.engine.traffic_bytes(), _waited_seconds()
        while self.engine.global_step < self.options.last_step and not self.stopped:
            began = time.perf_counter()
            micro_batches = self._draw(self.plan.gradient_accumulation_steps)
            if len(micro_batches) < self.plan.gradient_accumulation_steps:
                self.events.write("note", message="train_batches ended before the last step")
                return
            if (warning := larger.warning(micro_batches)) is not None:
                self._warn(warning, progress)
            loss, self.stopped = together(self._step(micro_batches), stop.requested)
            self.losses.append(loss)
            seconds, moved = time.perf_counter() - began, self.engine.traffic_bytes()
            norm = self.engine.gradient_norm
            self._count_nonfinite(norm)
            held, self.peak_bytes = self.engine.meter.now_bytes(), self.engine.meter.peak_bytes()
            step = {
                "step": self.engine.global_step,
                "loss": loss,
                "gradient_norm": norm,
                "nonfinite_steps": self.nonfinite_steps,
                "skipped_steps": self.engine.skipped_steps,
                "learning_rate": float(self.engine.optimizer.param_groups[0]["lr"]),
                "seconds": seconds,
                "tokens": sum(token_count(batch) for batch in micro_batches) * self.place.world,
                "memory_bytes": held,
                "peak_bytes": self.peak_bytes,
                "traffic_bytes": {link: moved[link] - before[link] for link in moved},
            }
            if self.place.world > 1:
                step["waited_seconds"] = _waited_seconds() - waited
            before, waited = moved, _waited_seconds()
            self.events.write("step", **step)
            self.checkpoints.after_step(self.position())
            stop.requested |= progress.tell(step, self.options.last_step)
            if self.place.world == 1:  # others learn of it with the next loss
                self.stopped = stop.requested
            if self.stopped:
                self.events.write("note", message="stopping after this step; a checkpoint is being saved")

    def _count_nonfinite(self, norm: float | None) -> None:
        if norm is None or math.isfinite(norm):
            return
        self.nonfinite_steps += 1
        if self.nonfinite_steps == 1:
            step = self.engine.global_step
            then = "; in fp16 it is skipped and the loss scale lowered" if self.engine.loss_scale is not None else ""
            message = f"the gradients of step {step} are not finite (their norm is {norm}){then}; more are counted"
            self.events.write("note", message=message)

    def _draw(self, count: int) -> list[Any]:
        """The next batches of this process, none at the end of the data: processes take theirs in turn."""
        drawn = [self._next() for _ in range(count * self.place.world)]
        return [] if any(batch is None for batch in drawn) else drawn[self.place.rank :: self.place.world]

    def _next(self) -> Any:
        """The next batch, or None.

        Each is drawn under a random state of its own, which its number decides: a resumed run draws the same ones
        again, whatever the model has drawn in between.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed * 2**32 + self.drawn)
            batch = next(self.batches, None)
        self.drawn += batch is not None
        return batch

    def _step(self, micro_batches: list[Any]) -> float:
        losses = []
        for cpu_batch in micro_batches:
            batch = self.engine.to_device(cpu_batch)
            loss = self.source.loss(call_model(self.engine, batch), batch)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()


def _waited_seconds() -> float:
    """Inside of collectives so far."""
    return dog.waited_seconds() if (dog := watchdog.current()) is not None else 0.0


@dataclass
class _Stop:
    """Whether the person asked to stop after the running step."""

    requested: bool = False


@contextmanager
def _stop_on_interrupt() -> Iterator[_Stop]:
    """The first Ctrl-C asks to stop after the step, with a checkpoint; the second one ends at once."""
    stop = _Stop()

    def on_interrupt(_: int, __: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def default_precision(device: str) -> Precision:
    """bf16 where there is a GPU to compute in it, fp32 on the CPU."""
    return Precision.BF16 if device == "cuda" else Precision.FP32
