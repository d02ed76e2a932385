"""Engine: a model, a plan, and training by it.

    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()

The engine changes nothing of the model but where its parameters' data is. In ``step`` the update begins; it goes on
while the next forward pass runs, and every unit's weights are waited for where they are needed.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from offload import contents as unit_contents
from offload import hooks, whole
from offload.arena import Arena
from offload.attach import host_bytes_of, in_turn, take_over
from offload.block_inputs import BlockInputs
from offload.chunked_loss import ChunkedCausalLoss
from offload.divided_gradients import DividedGradients
from offload.errors import OffloadError, PlanError
from offload.events import EventLog
from offload.gradients import GradientCollector
from offload.hyperparameters import Hyperparameters
from offload.memory import MemoryMeter
from offload.passes import Passes
from offload.plan import Plan, Precision
from offload.prefetch import Prefetcher
from offload.ranks import Ranks, local_device
from offload.residency import UPDATE_RING, footprint, slot_counts, staging_bytes, streamed_bytes
from offload.setup import (
    FEEDING_CORES,
    check_can_run,
    close_at_exit,
    grow_segments,
    move_buffers,
    moved,
    update_threads,
)
from offload.shards import Shards
from offload.shortage import explaining_shortage
from offload.slots import SlotRings
from offload.state import UnitState, weight_dtype
from offload.store import Store
from offload.streamed_update import StreamedUpdate
from offload.streams import Done, Lane
from offload.unit import check_model, check_trainable, partition
from offload.unit_update import ClipFactor, UnitUpdate, from_first
from offload.updater import Updater
from offload.watch import Watch
from offload.weight_files import WeightFiles
from offload.weights import WeightMover

HOLDERS = (
    *("states", "arena", "meter", "_rings", "_mover", "_gradients", "_updater", "_streamed", "_prefetcher", "_inputs"),
    *("_guard", "_watch", "_passes"),
)
"""What has buffers in it: a loss that somebody keeps leads through its graph to the engine, but no longer to these."""


class Engine:
    """Trains ``model`` as ``plan`` says.

    ``optimizer`` is one of torch's, or Lion, over the model's parameters, and of the plan's kind: its groups give the
    hyperparameters, its state stays empty, for the engine keeps the state in the tiers. ``lr_scheduler`` is any torch
    scheduler on it, stepped after every update. ``max_grad_norm`` clips the global norm, exactly. ``weights`` are
    safetensors files with the first values (``WeightFiles``); else those of the model count, and what of it is on meta
    is initialised.
    Raises PlanError where plan and model do not belong together, WeightsError where files and model do not, and
    TierError where a tier is too small, before anything is allocated.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        max_grad_norm: float | None = None,
        events: EventLog | None = None,
        weights: Path | None = None,
    ) -> None:
        check_can_run(plan)
        check_model(plan, model)
        self.model, self.plan = model, plan
        self._forward = model if plan.loss_chunks == 1 else ChunkedCausalLoss(model, plan.loss_chunks)
        self.hyperparameters = Hyperparameters(model, plan.optimizer, optimizer)
        self.optimizer = self.hyperparameters.optimizer
        self.lr_scheduler: Any = None
        if lr_scheduler is not None:
            self.step_scheduler(lr_scheduler)
        self.max_grad_norm = max_grad_norm
        self.device = local_device(plan)
        self.global_step = 0
        self._events = events
        self._micro_batch = 0
        self._forward_step = 0
        """Value of ``global_step`` at the last forward pass with gradients."""
        self._clip: ClipFactor | None = None
        self._closers: list[Callable[[], None]] = []
        try:
            self._attach(weights)
        except BaseException:
            self._release()
            raise
        close_at_exit(self)

    def _attach(self, weights: Path | None) -> None:
        """Allocate the tiers and move the model into them, unit by unit."""
        plan, device, shards = self.plan, self.device, Shards.of(self.plan)
        files = WeightFiles(weights, self.model) if weights is not None else None
        grow_segments(device)
        self._ranks = Ranks(plan, device) if plan.gpus > 1 else None
        if self._ranks is not None:
            self._closers.append(self._ranks.close)
        units = partition(self.model, plan.placements, shards)
        modules = dict(self.model.named_modules())
        if missing := [path for path in plan.recompute if path not in modules]:
            raise PlanError(f"the plan recomputes {missing[0]!r}, but the model has no module of that name")
        shapes, placements = [u.shape for u in units], [u.placement for u in units]
        needed = footprint(shapes, placements, plan.buckets, plan.state_format, plan.gpu_update_share, shards)
        self.store: Store | None = None
        if needed.nvme_bytes:
            assert plan.nvme_dir is not None
            self.store = Store(Path(plan.nvme_dir), needed.nvme_bytes, plan.buckets.io_bytes)
            self._closers.append(self.store.close)
        self.arena = Arena(needed.host_bytes, device, host_bytes_of(units))
        self._closers.append(self.arena.close)
        nan = torch.full((), torch.nan, dtype=weight_dtype(plan.precision), device=device)
        turns = in_turn(self.model, units, plan, device, needed, files)
        self.states = take_over(turns, plan, device, self.arena, self.store, nan, self._ranks)
        self._parts = [state.part() for state in self.states]
        move_buffers(self.model, device, plan.precision)

        # Fetches wait for updates and for slots. What returns to the device must not wait behind them: updated weights
        # that live there, and partial sums of gradients.
        self._up, self._returns, self._down = (self._lane(name, 1) for name in ("up", "returns", "down"))
        self._update_lane = self._lane("update", update_threads(device))
        update_bytes, weight_bytes = staging_bytes(shapes, placements, plan.buckets, plan.state_format, shards)
        dtype, counts = weight_dtype(plan.precision), slot_counts(shapes, placements, plan.buckets, shards)
        self._rings = SlotRings.make(counts, dtype, device)
        reader_ring = [self.arena.take(weight_bytes) for _ in range(UPDATE_RING)]
        gathers = self._lane("gathers", 1) if self._ranks is not None else None
        self._mover = WeightMover(self.states, self._rings, self._up, gathers, self.store, reader_ring, nan)
        collected = self.states, plan, device, self._down, self._returns
        if self._ranks is not None:
            self._gradients: GradientCollector = DividedGradients(*collected, self._lane("reduces", 1), self._ranks)
        else:
            self._gradients = GradientCollector(*collected)
        update_ring = [self.arena.take(update_bytes) for _ in range(UPDATE_RING)]
        self.arena.pin()
        self._streamed: StreamedUpdate | None = None
        if streamed_bytes(placements, plan.buckets, plan.state_format, plan.gpu_update_share):
            size, share = plan.buckets.update_elements, plan.gpu_update_share
            self._streamed = StreamedUpdate(plan.state_format, size, share, device, self._lane("streamed", 1))
        links = self._update_lane, self._down, self._returns
        self._updater = Updater(plan.state_format, *links, self.store, update_ring, self._streamed, device)
        if device.type != "cpu" and update_bytes + needed.host_bytes:
            self._leave_cores_to_the_update()

        self._inputs = BlockInputs(device, plan.checkpoints)
        self._closers.append(self._inputs.close)
        self._prefetcher = Prefetcher(self._mover, units, counts, plan.buckets.prefetch_units, shards)
        # [Note: parameters that are away]: the first pass is watched.
        self._guard: AbstractContextManager[Any] = self._mover.guard()
        self.meter = MemoryMeter(device, needed, self._rings, self._inputs)
        self._watch = Watch(self.model, self.states, self._mover, self._settle)
        used = [u for u in units if u.shape.elements]
        parts = (self._mover, self._prefetcher, self._inputs, self._gradients, self._updater, self._watch, self.meter)
        self._passes = Passes(any(not u.name for u in used), *parts, self._events, self.zero_grad)
        self._closers.append(self._passes.close)
        for handle in hooks.attach(used, plan.recompute, self.model, self._passes):
            self._closers.append(handle.remove)
        self._closers.append(self._gradients.close)

    def _lane(self, name: str, cpu_threads: int) -> Lane:
        lane = Lane(name, self.device, cpu_threads)
        self._closers.append(lane.close)
        return lane

    def _leave_cores_to_the_update(self) -> None:
        """Shrink this thread's own team, for teams that together outnumber the cores sleep between operations."""
        threads = torch.get_num_threads()
        self._closers.append(lambda: torch.set_num_threads(threads))
        torch.set_num_threads(min(FEEDING_CORES, threads))
        torch.ones(1 << 18).add_(1)  # a team changes its size with its next work

    # The training loop

    @explaining_shortage("forward")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward. Tensors go to the device, and in bf16 floating-point ones to bf16, as the model's weights are."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision is Precision.AMP)
        guard: AbstractContextManager[Any] = nullcontext()
        if torch.is_grad_enabled():
            self._forward_step, guard = self.global_step, self._guard
        with self._passes.forward(self.global_step + 1), hooks.saved_tensors(self._passes), autocast, guard:
            args, kwargs = self.to_device((args, kwargs))
            return self._forward(*args, **kwargs)

    def to_device(self, batch: Any) -> Any:
        """The batch with its tensors on the device; in bf16 the floating-point ones in bf16."""
        return moved(batch, self.device, self.plan.precision)

    @explaining_shortage("backward")
    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch; the loss is divided by the number of micro-batches of a step, on all ranks."""
        if self._forward_step != self.global_step:
            raise OffloadError(
                "step() was called between this loss's forward pass and its backward; call it after both"
            )
        accumulation = self.plan.gradient_accumulation_steps
        parts = accumulation * self.plan.gpus
        self._micro_batch += 1
        self._gradients.begin_backward(last_micro_batch=self._micro_batch >= accumulation)
        with self._passes.backward(), self._guard:
            (loss / parts if parts > 1 else loss).backward()
            self._gradients.end_backward()
        self._guard = nullcontext()

    def zero_grad(self) -> None:
        """Forget the gradients since the last step: its micro-batches begin anew. A failed backward does this."""
        self._gradients.discard()
        self._micro_batch = 0

    @explaining_shortage("update")
    def step(self) -> None:
        """Update the parameters, after the last micro-batch of a step; before it, do nothing."""
        if self._micro_batch < self.plan.gradient_accumulation_steps:
            return
        self._watch.check_none_lent()
        check_trainable(state.unit for state in self.states)
        self._micro_batch = 0
        self._clip = ClipFactor(self._gradients.norm(), self.max_grad_norm)
        updates, changed = [], []
        for state, part in zip(self.states, self._parts, strict=True):
            name, landed = state.unit.name, self._gradients.landed(state.unit.name)
            segments = self.hyperparameters.begin_update(state.unit, self._gradients.present(name))
            if segments and landed is not None:
                update = UnitUpdate(part, from_first(segments, state.updated), landed)
                changed.append((state, update))
                if update.segments:
                    updates.append(update)
                else:
                    update.promise.finish(None)  # another rank's parameters
        self._updater.begin(updates, self._clip)
        for state, update in changed:
            self._tell_changed(state, update)
        self._gradients.clear()
        self.global_step += 1
        # None of its parameters has a gradient, so it changes nothing: schedulers and step hooks count on being called.
        self.optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self._prefetcher.prefetch_first()

    def _tell_changed(self, state: UnitState, update: UnitUpdate) -> None:
        """Whoever needs the unit's weights comes after its update, and after the gather where ranks updated parts."""
        done, whole = update.promise, state.on_device
        if whole and state.shards.zero_stage > 0 and self._ranks is not None:
            done = self._mover.gather_updated(state.unit.name, self._after_now(done))
        elif whole and state.device_state is not None:
            return
        self._mover.will_change(state.unit.name, done)

    def _after_now(self, done: Done) -> Done:
        """Behind this and behind all that the device was given so far."""
        both = Done()
        both.follow_all((done, Done.now(self.device)))
        return both

    def step_scheduler(self, scheduler: Any) -> None:
        """Step this torch scheduler after every update; raises OffloadError for one that the engine can not step."""
        if getattr(scheduler, "optimizer", None) is not self.optimizer:
            raise OffloadError("the scheduler is for another optimizer than the engine's; make it with the same one")
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise OffloadError("ReduceLROnPlateau needs a metric: keep it out of the engine and step it yourself")
        self.lr_scheduler = scheduler

    @property
    def gradient_norm(self) -> float | None:
        """Global norm of the last step's gradients before clipping; waits for it."""
        return self._clip.norm() if self._clip is not None else None

    def traffic_bytes(self) -> dict[str, int]:
        """Bytes moved since the start, by link."""
        fetched, sent = self._inputs.fetched_bytes, self._inputs.sent_bytes
        if self._streamed is not None:
            fetched, sent = fetched + self._streamed.fetched_bytes, sent + self._streamed.sent_bytes
        return {
            "host_to_device": self._up.bytes_moved + self._returns.bytes_moved + fetched,
            "device_to_host": self._down.bytes_moved + sent,
            "nvme_read": self.store.bytes_read if self.store else 0,
            "nvme_write": self.store.bytes_written if self.store else 0,
        }

    @property
    def computing(self) -> str | None:
        """The unit that computes, or did when a pass failed; None outside of all units."""
        return self._passes.computing

    @property
    def overflow_count(self) -> int:
        """Device slots that had to be made beyond the plan; 0 in a run that goes as planned."""
        return self._mover.overflow_count

    # Whole tensors

    def finish(self) -> None:
        """Wait until the last update has reached its tiers; raises what went wrong in it, or was changed since."""
        self._watch.check_none_lent()
        self._settle()
        self._watch.check()

    def _settle(self) -> None:
        self._updater.finish()
        self._mover.settle()

    def gathered(
        self, *chosen: whole.Chosen | Iterable[whole.Chosen]
    ) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """``with engine.gathered(model.head) as parameters: model.head.weight.mul_(2)``: whole, and yours to write to.

        Takes parameters, modules and their names, and gives {name: parameter}. Inside, the units of these are on the
        device as a whole, beside all that the plan puts there, and there is no gradient. What was written to is written
        to the tiers at the end, also after an error; in bf16 such a weight's master becomes the weight. Moments stay.
        """
        return whole.gathered(self, self._watch, chosen)

    def state_dict(self) -> dict[str, Any]:
        """What the model's own state_dict has, with the fp32 masters of parameters, as whole tensors on the host."""
        return whole.state_dict(self)

    def load_state_dict(self, tensors: Mapping[str, Any], strict: bool = True) -> whole.KeyDifference:
        """The inverse, from tensors of any floating-point type: they become the fp32 masters.

        As with torch, the optimizer's moments and counts stay as they are, and missing or unexpected keys raise
        (OffloadError) only where ``strict``, other shapes always; nothing was changed then.
        """
        return whole.load_state_dict(self, tensors, strict)

    def replace(self, state: UnitState, whole: unit_contents.Contents) -> None:
        """Put other numbers into a unit, wherever they live; between steps only."""
        self._mover.forget(state.unit.name)
        unit_contents.write(state, whole, self.plan.state_format, self.store)

    def close(self) -> None:
        """Finish the update and give everything back: device, host and NVMe. Parameters are away afterwards."""
        try:
            if self._closers:
                self.finish()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release() if error is not None else self.close()

    def _release(self) -> None:
        """Close everything, the last made first; what fails is raised when all is closed."""
        failed: BaseException | None = None
        while self._closers:
            try:
                self._closers.pop()()
            except BaseException as error:  # noqa: BLE001 - raised below
                failed = failed or error
        for name in HOLDERS:
            vars(self).pop(name, None)
        if failed is not None:
            raise failed
