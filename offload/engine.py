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
from torch.distributed.device_mesh import DeviceMesh

from offload import checkpoint, hooks, restore, whole
from offload import contents as unit_contents
from offload.arena import Arena
from offload.attach import host_bytes_of, in_turn, take_over
from offload.axes import Axes
from offload.block_inputs import BlockInputs
from offload.checks import check_loss, check_norm, checked_axes
from offload.chunked_loss import ChunkedCausalLoss
from offload.divided_gradients import collector
from offload.errors import OffloadError
from offload.events import EventLog
from offload.hyperparameters import Hyperparameters
from offload.loss_scale import loss_scale
from offload.memory import MemoryMeter, traffic_bytes
from offload.passes import Passes
from offload.plan import Plan, Precision
from offload.prefetch import Prefetcher
from offload.ranks import Ranks, local_device
from offload.recovery import GRADIENTS, Recovery
from offload.released import Releasing, lost_parameter, own
from offload.residency import UPDATE_RING, footprint, slot_counts, staging_bytes
from offload.saver import Saver, Saving
from offload.setup import (
    check_scheduler,
    close_all,
    close_at_exit,
    feed_a_gpu,
    grow_segments,
    move_buffers,
    moved,
    update_threads,
)
from offload.shards import Shards
from offload.shortage import HALF_DONE, explaining_shortage
from offload.slots import SlotRings
from offload.state import UnitState, weight_dtype
from offload.steps import Steps
from offload.store import Store
from offload.streamed_update import StreamedUpdate
from offload.streams import URGENT, Lanes
from offload.unit import check_trainable, partition
from offload.update_in_backward import check_early_updates
from offload.updater import Updater
from offload.watch import Watch
from offload.weight_files import WeightFiles
from offload.weights import WeightMover


class Engine(Releasing):
    """Trains ``model`` as ``plan`` says.

    ``optimizer`` is one of torch's, or Lion, over the model's parameters, and of the plan's kind: its groups give the
    hyperparameters, its state stays empty, for the engine keeps the state in the tiers. ``lr_scheduler`` is any torch
    scheduler on it, stepped after every update. ``max_grad_norm`` clips the global norm, exactly. ``mesh`` has an
    axis for data beside that of DTensors: [Note: tensor parallel] in ``offload.axes``. ``weights`` are
    safetensors files with the first values (``WeightFiles``); else those of the model count, and what of it is on meta
    is initialised. In fp16 the loss is scaled by the rules of ``grad_scaler`` (a ``torch.amp.GradScaler`` with its
    defaults): a step whose gradients are not finite changes nothing, and schedulers step when the next one knows it.

    With ``update_in_backward`` units are updated as their gradients land in the backward of a step's last micro-batch,
    and ``step`` updates what is left; not with clipping or fp16, which need all gradients first. Learning rates are
    then read in backward. A failure inside of it, or ``zero_grad`` behind it, leaves the update half done, as a failure
    of any update does: whatever computes with such numbers or saves them raises OffloadError until a checkpoint is
    loaded ([Note: half done] in ``offload.recovery``).

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
        weights: str | Path | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        *,
        update_in_backward: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> None:
        axes = checked_axes(model, plan, mesh, max_grad_norm, weights, update_in_backward=update_in_backward)
        self.model, self.plan, self._update_in_backward = model, plan, update_in_backward
        self._forward = model if plan.loss_chunks == 1 else ChunkedCausalLoss(model, plan.loss_chunks)
        self.hyperparameters = Hyperparameters(model, plan.optimizer, optimizer)
        self.optimizer = self.hyperparameters.optimizer
        self.lr_scheduler: Any = None
        if lr_scheduler is not None:
            self.step_scheduler(lr_scheduler)
        self.max_grad_norm = max_grad_norm
        self.device = local_device(plan, axes)
        self.loss_scale = loss_scale(grad_scaler, plan.precision, self.device)
        self.global_step = 0
        """Steps so far, those that were skipped too."""
        self._events, self._micro_batch, self.lost = events, 0, lost_parameter(model)
        self._forward_step = 0
        """Value of ``global_step`` at the last forward pass with gradients."""
        self._closers: list[Callable[[], None]] = []
        try:
            self._attach(weights, axes)
        except BaseException:
            self._release()
            raise
        close_at_exit(self)

    def _attach(self, weights: str | Path | None, axes: Axes | None) -> None:
        """Allocate the tiers and move the model into them, unit by unit."""
        plan, device, shards = self.plan, self.device, Shards.of(self.plan)
        files = WeightFiles(weights, self.model) if weights is not None else None
        grow_segments(device)
        if (ranks := Ranks.of(plan, device, axes)) is not None:
            self._closers.append(ranks.close)
        units = partition(self.model, plan.placements, shards, ranks.tensor_position if ranks is not None else 0)
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
        self.states = take_over(turns, plan, device, self.arena, self.store, nan, ranks)
        move_buffers(self.model, device, plan.precision, ranks)

        # Fetches wait for updates and slots; weights and sums of gradients that return must not wait behind them.
        lane = Lanes(device, self._closers)
        self._up, self._returns, self._down = (lane(name, 1) for name in ("up", "returns", "down"))
        update_lane = lane("update", update_threads(device, ranks))
        update_bytes, weight_bytes = staging_bytes(shapes, placements, plan.buckets, plan.state_format, shards)
        dtype, counts = weight_dtype(plan.precision), slot_counts(shapes, placements, plan.buckets, shards)
        self._rings = SlotRings.make(counts, dtype, device)
        reader_ring = [self.arena.take(weight_bytes) for _ in range(UPDATE_RING)]
        gathers = lane("gathers", 1, URGENT) if ranks is not None else None
        self._mover = WeightMover(self.states, self._rings, self._up, gathers, self.store, reader_ring, nan)
        reduces = lane("reduces", 1, URGENT) if ranks is not None else None
        self._gradients = collector(self.states, plan, device, self._down, self._returns, reduces, ranks)
        update_ring = [self.arena.take(update_bytes) for _ in range(UPDATE_RING)]
        self.arena.pin()
        self._streamed = StreamedUpdate.of(plan, self.states, device, lane, in_backward=self._update_in_backward)
        links = update_lane, self._down, self._returns
        self._updater = Updater(plan.state_format, *links, self.store, update_ring, self._streamed, device)
        self._gradients.kept = self._updater.kept

        self._inputs = BlockInputs(device, plan.checkpoints)
        self._closers.append(self._inputs.close)
        self._prefetcher = Prefetcher(self._mover, units, counts, plan.buckets.prefetch_units, shards)
        # [Note: parameters that are away]: the first pass is watched.
        self._guard: Any = self._mover.guard()
        self.meter = MemoryMeter(device, needed, self._rings, self._inputs)
        parts = (self._guard, self._updater, self._mover, self._prefetcher, self._inputs)
        self.recovery = Recovery(plan, self.meter, lane.made, self.store, parts, self._gradients, self._begin_step_anew)
        self._updater.explain_by(self.recovery.failed)
        self._watch = Watch(self.model, self.states, self._mover, self._settle)
        used = [u for u in units if u.shape.elements]
        told = (self._mover, self._prefetcher, self._inputs, self._gradients, self._updater, self._watch, self.meter)
        self._passes = Passes(any(not u.name for u in used), *told, self._events, self.recovery, self.zero_grad)
        self.recovery.join(self._passes)
        self._closers.append(self._passes.close)
        self._closers.extend(handle.remove for handle in hooks.attach(used, plan.recompute, self.model, self._passes))
        self._saver = Saver(lane("copying", 1), lane("saving", 1), ranks)
        self._closers += [self.recovery.close, self._gradients.close, self._saver.close, own(self.model)]
        feed_a_gpu(device, self._closers, updates_on_host=update_bytes + needed.host_bytes > 0)
        updating = (self.recovery, self._gradients, self._updater, self._mover, self.loss_scale)
        self._steps = Steps(
            self.states, self.hyperparameters, *updating, self._step_schedulers, self._saver.copied, device
        )
        self.early_updates = self._steps.early
        self._passes.early = self.early_updates if self._update_in_backward else None

    # The training loop

    @explaining_shortage("forward")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward. Tensors go to the device, and floating-point ones to bf16 or fp16 where the weights are."""
        self.check_numbers()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision is Precision.AMP)
        guard: AbstractContextManager[Any] = nullcontext()
        if torch.is_grad_enabled():
            self._forward_step, guard = self.global_step, self._guard
        with self.recovery.passing(), self._passes.forward(self.global_step + 1), autocast, guard:
            args, kwargs = self.to_device((args, kwargs))
            return self._forward(*args, **kwargs)

    def to_device(self, batch: Any) -> Any:
        """The batch with its tensors on the device; in bf16 and fp16 the floating-point ones in that type."""
        return moved(batch, self.device, self.plan.precision)

    @explaining_shortage("backward")
    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch; the loss is divided by the number of micro-batches of a step, on all ranks."""
        working = self.recovery.passing(GRADIENTS)
        check_loss(loss, stepped=self._forward_step != self.global_step)
        accumulation, scale = self.plan.gradient_accumulation_steps, self.loss_scale
        parts, last = accumulation * self.plan.gpus, self._micro_batch + 1 >= accumulation
        if self._update_in_backward and last:
            self._check_can_update()
        self._gradients.check_hooks()
        with working, self._passes.backward(step_follows=last), self._guard:
            self._micro_batch += 1
            self._gradients.begin_backward(last_micro_batch=last)
            if self._micro_batch == accumulation:  # in one more pass before the step all of it has begun
                self._updater.coming()
            loss = loss / parts if parts > 1 else loss
            (loss if scale is None else scale.scaled(loss)).backward()
            self._gradients.end_backward()
        self._guard = nullcontext()

    def zero_grad(self) -> None:
        """Forget the gradients since the last step: its micro-batches begin anew. A failed backward does this."""
        with self.recovery.work(GRADIENTS):
            self._gradients.discard()
            self._begin_step_anew()

    def _begin_step_anew(self) -> None:
        self._micro_batch = 0
        self.early_updates.forget()

    @explaining_shortage("update")
    def step(self) -> None:
        """Update the parameters, after the last micro-batch of a step; before it, do nothing."""
        self.recovery.check_whole()
        if self._micro_batch < self.plan.gradient_accumulation_steps:
            return
        self._check_can_update()
        norm = self._steps.norm()
        with self.recovery.changing(f"step() was cut short. {HALF_DONE}"):
            self._steps.begin(norm, self.max_grad_norm)
            self._micro_batch = 0
            self.global_step += 1
        with self.recovery.work():
            self._steps.conclude(waits=False)
            self._prefetcher.prefetch_first()

    def _check_can_update(self) -> None:
        self._watch.check_none_lent()
        self.hyperparameters.check()
        check_norm(self.max_grad_norm)
        check_trainable(state.unit for state in self.states)
        if self._update_in_backward:
            check_early_updates(self.plan, self.max_grad_norm)

    def _step_schedulers(self) -> None:
        # None of its parameters has a gradient, so it changes nothing: schedulers and step hooks count on being called.
        self.optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def step_scheduler(self, scheduler: Any) -> None:
        """Step this torch scheduler after every update; raises OffloadError for one that the engine can not step."""
        check_scheduler(scheduler, self.optimizer)
        self.lr_scheduler = scheduler

    @property
    def gradient_norm(self) -> float | None:
        """Global norm of the last step's gradients before clipping; waits for it."""
        return self._steps.gradient_norm

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients were not finite in fp16, so that nothing was updated; waits for the last one."""
        return self._steps.skipped_count

    def traffic_bytes(self) -> dict[str, int]:
        """Bytes moved since the start, by link."""
        return traffic_bytes((self._up, self._returns), (self._down,), (self._inputs, self._streamed), self.store)

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
        self.recovery.check_whole()
        self._steps.conclude()
        self.recovery.telling(self._settle)
        self._watch.check()

    def _settle(self) -> None:
        self._updater.finish()
        self._saver.settle()
        self._mover.settle()

    def gathered(
        self, *chosen: whole.Chosen | Iterable[whole.Chosen]
    ) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """``with engine.gathered(model.head) as parameters: model.head.weight.mul_(2)``: whole, and yours to write to.

        Takes parameters, modules and their names, and gives {name: parameter}. Inside, the units of these are on the
        device as a whole, beside all that the plan puts there, and there is no gradient. What was written to is written
        to the tiers at the end, also after an error; in bf16 such a weight's master becomes the weight. Moments stay.
        """
        self.recovery.check()
        return whole.gathered(self, self._watch, chosen)

    def state_dict(self) -> dict[str, Any]:
        """What the model's own state_dict has, with the fp32 masters of parameters, as whole tensors on the host."""
        self.check_numbers()
        return whole.state_dict(self)

    def load_state_dict(self, tensors: Mapping[str, Any], strict: bool = True) -> whole.KeyDifference:
        """The inverse, from tensors of any floating-point type: they become the fp32 masters.

        As with torch, the optimizer's moments and counts stay as they are (behind an update that is half done they
        begin anew), and missing or unexpected keys raise (OffloadError) only where ``strict``, other shapes always.
        """
        found = whole.load_state_dict(self, tensors, strict)
        return found if found.missing_keys else self.restored(found)

    def replace(self, state: UnitState, whole: unit_contents.Contents) -> None:
        """Put other numbers into a unit, wherever they live; between steps only."""
        self._mover.forget(state.unit.name)
        self._updater.changed(state.unit.name)
        unit_contents.write(state, whole, self.plan.state_format, self.store)

    # Checkpoints

    def save_checkpoint(
        self, directory: str | Path, tag: str | None = None, client_state: Any = None, keep: int | None = None
    ) -> Saving:
        """Begin to save everything as ``directory/tag``, by default ``step-N``, and go on; ``Saving.wait`` waits.

        Between steps only. The next updates of units wait until these are copied, and so does ``finish``: call it
        before you change parameters yourself. ``client_state`` is any JSON of yours. Of the checkpoints named for
        their step only the ``keep`` newest stay. One is saved at a time: this waits for the one before.
        """
        self.check_numbers()
        if self._micro_batch:
            raise OffloadError("a checkpoint has no gradients: save after the last micro-batch's step(), not before")
        self._watch.check_none_lent()
        self._watch.check()
        self._steps.conclude()  # whether the last step counts
        return self._saver.save(self, Path(directory), tag, client_state, keep, after=self._updater.settled())

    def load_checkpoint(self, directory: str | Path, tag: str | None = None) -> tuple[Path, Any]:
        """Go on from the checkpoint of this tag, or from the latest; gives its path and its ``client_state``.

        Raises CheckpointError, with nothing changed, where it is damaged or of another model.
        """
        self._saver.close()  # the latest may be the one that is being written
        found = checkpoint.opened(Path(directory), tag)
        return self.restored((found.path, restore.load(self, found)))

    def close(self) -> None:
        """Finish the update and give everything back: device, host and NVMe. Parameters are away afterwards."""
        try:
            if self._closers and not self.recovery.known:
                self.finish()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._saver.abandon()
        self._release() if error is not None else self.close()

    def _release(self) -> None:
        """Close everything, the last made first; what fails is raised when all is closed."""
        try:
            close_all(self._closers)
        finally:
            self.release()
