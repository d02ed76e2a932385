"""One optimizer step as events on lanes: what waits for what, in memplan's engine, for many candidates at a time.

Lanes are the CPU that issues work, the GPU that computes, both directions of the link, the disk, the CPU's update, and
collectives. Each does one thing after another; what crosses from lane to lane is written down here once, in the order
in which the engine does it:

- forward uses units in order, backward in reverse; a unit computes when the GPU is free, its weights have arrived, and
  the CPU has issued it;
- weights that are away are fetched ``prefetch_units`` uses ahead, into the slot of the unit that was used longest ago;
  the last ones of forward are still there when backward begins;
- in stage 3 the ranks' shards are gathered on the way; gradients are reduced when a unit's backward is over, and go to
  the host where the plan keeps them there, through two slots;
- the update begins when the last gradient has landed, since clipping needs the norm, and goes unit by unit in forward
  order beside the next forward pass; a unit's weights are fetched, or used, after its update;
- the loop reads its loss, so the CPU waits for the GPU once a step.

Every quantity of time is an array with one entry a candidate. The seconds of a step are those between the ends of two
steps, when the pipeline has filled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memplan.memory import Counts
from memplan.passes import BACKWARD, BACKWARD_ISSUE, FORWARD, FORWARD_ISSUE
from memplan.work import StepWork

LANES = ("compute", "host_to_device", "device_to_host", "nvme", "cpu_update", "collective")
WARM_STEPS = 2
"""Steps before the one that is timed: the second fills what the first left empty, on disk too."""
MICRO_BATCHES_SIMULATED = 3
"""The first, one that stands for all others, and the last."""
GRADIENT_SLOTS = 2

Times = np.ndarray


class Span(NamedTuple):
    """One thing that a lane does."""

    lane: str
    label: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """One optimizer step in the steady state. It begins and ends when the CPU has read a loss."""

    seconds: float
    spans: tuple[Span, ...]
    """In order of their starts; the update beside this step's forward pass is that of the step before."""

    @property
    def busy_seconds(self) -> dict[str, float]:
        """By lane, those that do nothing left out."""
        busy = dict.fromkeys(LANES, 0.0)
        for span in self.spans:
            busy[span.lane] += span.end_seconds - span.start_seconds
        return {lane: seconds for lane, seconds in busy.items() if seconds > 0}


def step_seconds(work: StepWork, counts: Counts) -> Times:
    """Seconds of one optimizer step of each candidate; the fields of ``counts`` are arrays of one length."""
    return _Pipeline(work, counts, None).run()


def timeline(work: StepWork, counts: Counts) -> Timeline:
    """One optimizer step of one candidate, every span of it."""
    spans: list[Span] = []
    one = Counts(*(np.atleast_1d(getattr(counts, name)) for name in Counts.__dataclass_fields__))
    pipeline = _Pipeline(work, one, spans.append)
    seconds = float(pipeline.run()[0])
    begin = float(pipeline.begun[0])
    kept = [s._replace(start_seconds=s.start_seconds - begin, end_seconds=s.end_seconds - begin) for s in spans]
    return Timeline(seconds, tuple(sorted(kept, key=lambda s: s.start_seconds)))


class _Pipeline:
    """The lanes' clocks, and when each unit's weights, gradients and slots are there."""

    def __init__(self, work: StepWork, counts: Counts, log: Callable[[Span], None] | None) -> None:
        self.work, self.log = work, log
        self._keep = log
        size = len(np.atleast_1d(counts.state))
        rank = work.rank[:, None]

        def below(count: object) -> np.ndarray:
            return np.broadcast_to(rank < np.asarray(count), (work.units, size))

        self.away, self.away_nvme = below(counts.parameters), below(counts.nvme_parameters)
        self.grad_off, self.state_off, self.state_nvme = (
            below(counts.gradients),
            below(counts.state),
            below(counts.nvme_state),
        )
        zero = np.zeros(size)
        self.zero = zero
        self.cpu = self.gpu = zero
        self.lanes = dict.fromkeys(LANES[1:], zero)
        self.ready = [zero] * work.units
        """When the weights are up to date where they live."""
        self.last_use = [zero] * work.units
        self.landed = [zero] * work.units
        """When the gradient is where its update reads it."""
        self.gradient_slot = [zero] * work.units
        """When the slot in which it was gathered is free again."""
        self.held = np.zeros((work.units, size), dtype=bool)
        """Weights that are still in their slots."""
        streaming = np.asarray(counts.parameters) > 0
        updating = np.asarray(counts.state) > 0
        returning = np.asarray(counts.gradients) > 0
        r = work.rates
        self.up_factor = np.where(returning, 1 / r.duplex_share, 1.0)
        self.down_factor = np.where(streaming, 1 / r.duplex_share, 1.0)
        self.up_factor_update = np.where(updating, 1 / r.links_beside_update, 1.0)
        self.update_factor = np.where(streaming, r.cpu_update_beside_links, 1.0)
        self.begun = zero
        self.gathered = self.norm_known = zero
        """When the last step's gradients had landed, and when their norm was known."""

    def run(self) -> Times:
        ends = []
        for number in range(WARM_STEPS + 1):
            last = number == WARM_STEPS
            self.log = self._keep if last else None
            self.begun = self.cpu
            self._step(whole=last and self._keep is not None)
            ends.append(self.cpu)
        return ends[-1] - ends[-2]

    def _step(self, whole: bool) -> None:
        """One optimizer step; every micro-batch of it where ``whole``."""
        count = self.work.micro_batches
        simulated = count if whole else min(count, MICRO_BATCHES_SIMULATED)
        for number in range(simulated):
            before = self.gpu
            self._forward(first=number == 0)
            self._backward(first=number == 0, last=number == simulated - 1)
            if number == 1 and simulated < count:
                self._shift((self.gpu - before) * (count - simulated))
        self._end_step()

    def _shift(self, seconds: Times) -> None:
        """Let time pass in which the lanes do what they just did again and again."""
        self.cpu, self.gpu = self.cpu + seconds, self.gpu + seconds
        self.lanes = {lane: clock + seconds for lane, clock in self.lanes.items()}
        self.last_use = [t + seconds for t in self.last_use]
        self.landed = [t + seconds for t in self.landed]
        self.gradient_slot = [t + seconds for t in self.gradient_slot]

    # The parts of a step

    def _forward(self, first: bool) -> None:
        w = self.work
        issued = [self.cpu] * w.units
        if w.root is not None:
            if first:
                self._update_unit(w.root)
            arrived = self._weights(w.root, self.cpu, self.zero, self.up_factor_update, first)
            self.gpu = np.maximum(self.gpu, arrived)
            self.held[w.root] = self.away[w.root]
        for i, u in enumerate(w.order):
            issued[i] = self.cpu
            trigger = issued[max(0, i - w.prefetch)]
            factor = self.up_factor_update if first else np.ones_like(self.zero)
            slot = self._slot_free(w.earlier[u])
            if first:
                self._update_unit(u)
            arrived = self._weights(u, trigger, slot, factor, first)
            self._compute(w.by_unit[u], FORWARD, FORWARD_ISSUE, arrived, f"{w.names[u]} forward")
            self.last_use[u] = self.gpu
        # Of each ring the last ones stay; those whose follower came into the same slot are gone.
        for u in w.order:
            follower = w.later[u]
            self.held[u] = self.away[u] & (~self.away[follower] if follower is not None else True)
        self._compute(w.rest, FORWARD, FORWARD_ISSUE, self.zero, "rest forward")

    def _backward(self, first: bool, last: bool) -> None:
        w = self.work
        self._compute(w.rest, BACKWARD, BACKWARD_ISSUE, self.zero, "rest backward")
        issued = [self.cpu] * w.units
        order = list(reversed(w.order))
        for i, u in enumerate(order):
            issued[i] = self.cpu
            trigger = issued[max(0, i - w.prefetch)]
            slot = self._slot_free(w.later[u])
            arrived = self._weights(u, trigger, slot, self.up_factor, first=False)
            room = self._gradient_room(u)
            self._compute(w.by_unit[u], BACKWARD, BACKWARD_ISSUE, np.maximum(arrived, room), f"{w.names[u]} backward")
            self.last_use[u] = self.gpu
            self._gradient(u, first, last)
        for u in w.order:
            follower = w.earlier[u]
            self.held[u] = self.away[u] & (~self.away[follower] if follower is not None else True)
        if w.root is not None:
            self._gradient(w.root, first, last)

    def _end_step(self) -> None:
        """The norm is known: units on the GPU are updated at once, the others beside the next forward pass."""
        w = self.work
        self.gathered = np.max(self.landed, axis=0)
        self.norm_known = np.maximum(self.gpu, self.lanes["collective"]) if w.gpus > 1 else self.gpu
        self.gpu = self.norm_known + w.gpu_update_seconds
        self._tell("compute", self.norm_known, self.gpu, None, "update on the GPU")
        self.ready = [self.gpu] * w.units
        self.held[:] = False
        self.cpu = np.maximum(self.cpu + w.step_issue_seconds, self.gpu)

    def _update_unit(self, u: int) -> None:
        """The last step's update of a unit whose state is off the GPU, and what brings shards together again.

        It is told here, ahead of the unit's forward, so that lanes serve units in the order of time.
        """
        w, name = self.work, self.work.names[u]
        off = self.state_off[u]
        if w.state_elements[u] and off.any():
            there = np.maximum(np.maximum(self.norm_known, self.gathered), self.landed[u])
            late = off & ~self.grad_off[u]
            sent = self._do(
                "device_to_host", self.norm_known, w.gradient_bytes[u] / w.down_rate, late, f"{name} gradient"
            )
            there = np.where(late, np.maximum(there, sent), there)
            nvme = self.state_nvme[u]
            if nvme.any():
                read = self._do(
                    "nvme", self.norm_known, w.nvme_state_bytes[u] / w.read_rate, nvme, f"{name} state read"
                )
                there = np.where(nvme, np.maximum(there, read), there)
            seconds = w.state_elements[u] * w.cpu_update_seconds * self.update_factor
            done = self._do("cpu_update", there, seconds, off, f"{name} update")
            if nvme.any():
                self._do("nvme", done, w.nvme_state_bytes[u] / w.write_rate, nvme, f"{name} state written")
            weights = self.away_nvme[u]
            if weights.any():
                both = w.nvme_weight_bytes[u] * (1 / w.read_rate + 1 / w.write_rate)
                written = self._do("nvme", done, both, weights, f"{name} weights written")
                done = np.where(weights, written, done)
            mirrored = off & ~self.away[u]
            copied = w.state_weight_bytes[u] / w.up_rate * self.up_factor_update
            done = np.where(mirrored, self._do("host_to_device", done, copied, mirrored, name), done)
            self.ready[u] = np.where(off, done, self.ready[u])
        if w.gathers_after_update:
            self.ready[u] = self._do("collective", self.ready[u], w.gather_seconds[u], None, f"{name} gather")

    # What parts are made of

    def _weights(self, u: int, trigger: Times, slot_free: Times, factor: Times, first: bool) -> Times:
        """When a unit's weights are on the device; starts what brings them there."""
        w, name = self.work, self.work.names[u]
        arrived = self.ready[u] if first else self.zero
        fetched = self.away[u] & ~self.held[u]
        if fetched.any():
            start = np.maximum(np.maximum(trigger, slot_free), self.ready[u])
            seconds = w.weight_bytes[u] / w.up_rate * factor
            from_disk = fetched & self.away_nvme[u]
            if from_disk.any():
                read = self._do("nvme", start, w.nvme_weight_bytes[u] / w.read_rate, from_disk, f"{name} read")
                seconds = np.where(from_disk, np.maximum(seconds, read - start), seconds)
            here = self._do("host_to_device", start, seconds, fetched, name)
            # The CPU goes on when the copy is enqueued, and that comes after the update of the unit.
            self.cpu = np.where(fetched, np.maximum(self.cpu, self.ready[u]), self.cpu)
            arrived = np.where(fetched, here, np.where(self.away[u], self.zero, arrived))
        waits = self.state_off[u] & ~self.away[u]
        if first and waits.any():
            self.cpu = np.where(waits, np.maximum(self.cpu, self.ready[u]), self.cpu)
        if w.gathers_each_use:
            arrived = self._do("collective", np.maximum(arrived, trigger), w.gather_seconds[u], None, f"{name} gather")
        return arrived

    def _slot_free(self, other: int | None) -> Times:
        """When the slot is free that a unit takes over from another of its ring."""
        if other is None:
            return self.zero
        return np.where(self.away[other], self.last_use[other], self.zero)

    def _gradient_room(self, u: int) -> Times:
        """When the slot is free in which the unit's gradients gather."""
        other = self.work.gradient_follower[u]
        if other is None:
            return self.zero
        return np.where(self.grad_off[u], self.gradient_slot[other], self.zero)

    def _gradient(self, u: int, first: bool, last: bool) -> None:
        """A unit's backward is over: reduce its gradient, send it home."""
        w, name = self.work, self.work.names[u]
        if not w.gradient_bytes[u]:
            return
        off = self.grad_off[u]
        if not first and off.any():  # the partial sum comes back first
            start = np.maximum(self.cpu, self.landed[u])
            back = self._do("host_to_device", start, w.gradient_bytes[u] / w.up_rate * self.up_factor, off, name)
            self.gpu = np.where(off, np.maximum(self.gpu, back), self.gpu)
        there = self.gpu
        if w.gpus > 1 and (last or w.reduces_each_pass):
            there = self._do("collective", there, w.reduce_seconds[u][last], None, f"{name} reduce")
        seconds = w.gradient_bytes[u] / w.down_rate * self.down_factor
        sent = self._do("device_to_host", there, seconds, off, f"{name} gradient")
        self.landed[u] = np.where(off, sent, there)
        self.gradient_slot[u] = self.landed[u]

    def _compute(self, seconds: np.ndarray, kernels: int, issue: int, arrived: Times, label: str) -> None:
        begun = self.cpu
        self.cpu = self.cpu + seconds[issue]
        start = np.maximum(np.maximum(self.gpu, arrived), begun)
        # A GPU that waits for the CPU ends with what was issued last.
        end = np.maximum(start + seconds[kernels], self.cpu)
        self._tell("compute", start, end, None, label)
        self.gpu = end

    def _do(self, lane: str, start: Times, seconds: object, where: np.ndarray | None, label: str) -> Times:
        """Something takes ``seconds`` of a lane, not before ``start``; elsewhere the lane stays as it is."""
        if where is not None and not where.any():
            return self.zero
        begin = np.maximum(self.lanes[lane], start)
        end = begin + seconds
        self._tell(lane, begin, end, where, label)
        self.lanes[lane] = end if where is None else np.where(where, end, self.lanes[lane])
        return end

    def _tell(self, lane: str, start: Times, end: Times, where: np.ndarray | None, label: str) -> None:
        if self.log is not None and (where is None or where[0]) and end[0] > start[0]:
            self.log(Span(lane, label, float(start[0]), float(end[0])))
