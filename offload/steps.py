"""Steps: the updates of all units begun, and what becomes of counts and schedulers when a step is skipped.

[Note: skipped steps]
In fp16 a step whose gradients are not finite changes nothing. Who updates finds that out: the device for what lives
there, the lanes for the rest. The training thread does not wait for it. A step counts its updates as if it were made;
before the step after it reads those counts and the learning rates, it asks whether that was so. By then the answer is
a whole forward and backward old, so it only keeps the thread from running ahead of the device further than that.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from offload.gradients import GradientCollector
from offload.hyperparameters import Hyperparameters
from offload.loss_scale import LossScale
from offload.recovery import Recovery
from offload.shortage import HALF_DONE
from offload.state import UnitState
from offload.streams import Done
from offload.unit_update import ClipFactor, UnitUpdate, from_first
from offload.update_in_backward import UpdateInBackward
from offload.updater import Updater
from offload.weights import WeightMover


class Steps:
    """Begins every step's updates; ``updated`` is called for each step that was made, when that is known.

    ``copied`` tells when a unit may be changed, as far as a checkpoint under way is concerned.
    """

    def __init__(
        self,
        states: Sequence[UnitState],
        hyperparameters: Hyperparameters,
        recovery: Recovery,
        gradients: GradientCollector,
        updater: Updater,
        mover: WeightMover,
        loss_scale: LossScale | None,
        updated: Callable[[], None],
        copied: Callable[[str], Done | None],
        device: torch.device,
    ) -> None:
        self._hyperparameters, self._recovery, self._gradients = hyperparameters, recovery, gradients
        self._parts = {state.unit.name: state.part() for state in states}
        self._updater, self._mover, self._loss_scale, self._updated = updater, mover, loss_scale, updated
        self.early = UpdateInBackward(states, gradients, self._begin_early)
        recovery.steps = self
        self._device, self._copied = device, copied
        self._clip: ClipFactor | None = None
        self._counts_before: dict[str, int] | None = None
        """Before the last step, until it is known whether that was made."""
        self._skipped = 0
        self._unclipped: ClipFactor | None = None
        """Of updates that begin before anybody can know a norm."""

    def norm(self) -> torch.Tensor:
        """Of the gradients; what became of the last step is known then."""
        self.conclude()
        return self._gradients.norm()

    def begin(self, norm: torch.Tensor, max_norm: float | None) -> None:
        """Begin the update of every unit that has a gradient."""
        self._counts_before = dict(self._hyperparameters.steps)
        scale = self._loss_scale
        self._clip = ClipFactor(norm, max_norm) if scale is None else scale.clip_factor(norm, max_norm)
        self._begin(self.early.rest(), self._clip)
        self._gradients.clear()

    def conclude(self, *, waits: bool = True) -> None:
        """Learn what became of the last step ([Note: skipped steps]); one that ``waits`` for nothing may not."""
        if self._counts_before is None or not (waits or self._loss_scale is None):
            return
        assert self._clip is not None
        skipped = self._clip.skipped()
        with self._recovery.changing(f"stepping the schedulers was cut short. {HALF_DONE}", may_fail=True):
            counts, self._counts_before = self._counts_before, None
            if skipped:
                self._hyperparameters.steps = counts
                self._skipped += 1
            else:
                self._updated()

    def forget(self) -> None:
        """Other numbers take the place of all: what became of the last step does not matter any more."""
        self._counts_before = None

    @property
    def skipped_count(self) -> int:
        """Steps skipped so far; waits for the last one."""
        self.conclude()
        return self._skipped

    @property
    def gradient_norm(self) -> float | None:
        """Of the last step, before clipping; waits for it."""
        self.conclude()
        return self._clip.norm() if self._clip is not None else None

    def _begin_early(self, state: UnitState) -> None:
        if self._unclipped is None:
            self._unclipped = ClipFactor(torch.zeros((), device=self._device), None)
        self._begin([state], self._unclipped)

    def _begin(self, states: Iterable[UnitState], clip: ClipFactor) -> None:
        updates, changed = [], []
        for state in states:
            name, landed = state.unit.name, self._gradients.landed(state.unit.name)
            segments = self._hyperparameters.begin_update(state.unit, self._gradients.present(name))
            if segments and landed is not None:
                own, kept = from_first(segments, state.updated), self._gradients.stayed(name)
                update = UnitUpdate(self._parts[name], own, landed, self._copied(name), kept)
                changed.append((state, update))
                if update.segments:
                    updates.append(update)
                else:
                    update.promise.finish(None)  # another rank's parameters
        self._updater.begin(updates, clip)
        for state, update in changed:
            self._tell_changed(state, update)

    def _tell_changed(self, state: UnitState, update: UnitUpdate) -> None:
        """Whoever needs the unit's weights comes after its update, and after the gather where ranks updated parts."""
        done, whole = update.promise, state.on_device
        if whole and state.shards.zero_stage > 0 and state.ranks is not None:
            done = self._mover.gather_updated(state.unit.name, self._after_now(done))
        elif whole and state.device_state is not None:
            return
        self._mover.will_change(state.unit.name, done)

    def _after_now(self, done: Done) -> Done:
        """Behind this and behind all that the device was given so far."""
        both = Done()
        both.follow_all((done, Done.now(self._device)))
        return both
