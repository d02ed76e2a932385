"""One optimizer step as events on lanes: what waits for what, in memplan's engine, for many candidates at a time.

Lanes are the CPU that issues work, the GPU that computes, both directions of the link, inputs of blocks, the disk, the
CPU's update, and collectives. Each does one thing after another; what crosses from lane to lane is written down here
once, in the order in which the engine does it:

- forward uses units in order, backward in reverse; a unit computes when the GPU is free, its weights have arrived, and
  the CPU has issued it;
- weights that are away are fetched when the unit is used that is ``prefetch_units`` such units ahead, behind what the
  GPU was given before it; the last ones of forward are still there when backward begins;
- in stage 3 the ranks' shards are gathered on the way; gradients are reduced when a unit's backward is over, and go to
  the host where the plan keeps them there, through two slots, into which a later micro-batch first brings them back;
- the update begins when the norm is known, for clipping needs it, and goes unit by unit in forward order beside the
  next forward pass, chunk by chunk: what a chunk needs comes while the one before is updated, and what it leaves goes
  to disk two chunks later; a unit's weights are fetched, or used, after its update;
- inputs of recomputed blocks that wait on the host have a lane: each leaves while its block computes, and the next
  block computes when it has left; in backward each comes while the block behind it runs again;
- the loop reads its loss, so the CPU waits for the GPU once a step.

Every quantity of time is an array with one entry a candidate. The seconds of a step are those between the ends of two
steps, when the pipeline has filled.
"""

from collections.abc import Callable

import numpy as np

from memplan.memory import Counts
from memplan.passes import BACKWARD, BACKWARD_ISSUE, FORWARD, FORWARD_ISSUE
from memplan.spans import LANES, Span, Timeline, Times
from memplan.work import StepWork
from offload.residency import UPDATE_RING

WARM_STEPS = 2
"""Steps before the one that is timed: the second fills what the first left empty, on disk too."""
MICRO_BATCHES_SIMULATED = 4
"""The first, one in which lanes find their rhythm, one that stands for all others, and the last.

As many in every step: what the disk still has to do at the end of one step would else differ from that of the next.
"""


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
        self.on_disk = np.broadcast_to(np.asarray(counts.nvme_state) > 0, (size,))
        zero = np.zeros(size)
        self.zero = zero
        self.cpu = self.gpu = zero
        self.lanes = dict.fromkeys(LANES[1:], zero)
        self.ready = [zero] * work.units
        """When the weights are up to date where they live."""
        self.promised = [zero] * work.units
        """When the CPU knows that they are, or will be once a copy that is under way has arrived."""
        self.landed = [zero] * work.units
        """When the gradient is where its update reads it."""
        self.input = zero
        """When the input of a block is on the host, or back, which the next block waits for."""
        self.held = np.zeros((work.units, size), dtype=bool)
        """Weights that are still in their slots."""
        self.frozen = np.array([[not s.trainable_elements] for s in work.shapes])
        streaming = np.asarray(counts.parameters) > 0
        updating = np.asarray(counts.state) > 0
        self.hooked = streaming | (sum(work.input_bytes) > 0)
        """Whether saved tensors go through hooks."""
        returning = np.asarray(counts.gradients) > 0
        r = work.rates
        self.up_factor = np.where(returning, 1 / r.duplex_share, 1.0)
        self.down_factor = np.where(streaming, 1 / r.duplex_share, 1.0)
        self.up_factor_update = np.where(updating, 1 / r.links_beside_update, 1.0)
        self.update_factor = np.where(streaming, r.cpu_update_beside_links, 1.0)
        self.begun = zero
        self.norm_known = zero
        self.triggers = [(zero, zero)] * work.prefetch
        """The last uses of units that are fetched, the latest first: when the CPU and the GPU came to them."""
        self.fetching = zero
        """When the thread that fetches has nothing left to wait for but the GPU."""
        self.staging = zero
        """When the update looks ahead for its next chunk: one chunk before it is there."""
        self.unwritten = self.last_chunk = zero
        """Seconds of writes that the disk is not yet asked for, and those of the last chunk."""

    def run(self) -> Times:
        count = self.work.micro_batches
        self.log = None
        for _ in range(WARM_STEPS):
            self._step(min(count, MICRO_BATCHES_SIMULATED))
        self.log, self.begun = self._keep, self.cpu
        self._step(count if self._keep is not None else min(count, MICRO_BATCHES_SIMULATED))
        return self.cpu - self.begun

    def _step(self, simulated: int) -> None:
        """One optimizer step, of which so many micro-batches are simulated."""
        count = self.work.micro_batches
        for number in range(simulated):
            before = self.gpu
            self._forward(first=number == 0)
            self._backward(first=number == 0, last=number == simulated - 1)
            if number == simulated - 2 and simulated < count:
                self._shift((self.gpu - before) * (count - simulated))
        self._end_step()

    def _shift(self, seconds: Times) -> None:
        """Let time pass in which the lanes do what they just did again and again; the update has nothing to do."""
        self.cpu, self.gpu = self.cpu + seconds, self.gpu + seconds
        still = {"cpu_update": self.zero, "nvme": np.where(self.away_nvme.any(axis=0), seconds, 0.0)}
        self.lanes = {lane: clock + still.get(lane, seconds) for lane, clock in self.lanes.items()}
        self.fetching = self.fetching + seconds
        self.triggers = [(cpu + seconds, gpu + seconds) for cpu, gpu in self.triggers]
        self.landed = [t + seconds for t in self.landed]

    # The parts of a step

    def _forward(self, first: bool) -> None:
        w = self.work
        factor = self.up_factor_update if first else np.ones_like(self.zero)
        self.triggers = [(self.cpu, self.gpu)] * w.prefetch
        if w.root is not None:
            if first:
                self._update_unit(w.root)
            self.gpu = np.maximum(self.gpu, self._weights(w.root, factor, first))
            self.held[w.root] = self.away[w.root]
        for u in w.order:
            if first:
                self._update_unit(u)
            arrived = self._weights(u, factor, first)
            self._used(u, arrived)
            leaves = w.input_bytes[u] > 0
            arrived = np.maximum(arrived, self.input) if leaves else arrived
            begun = self._compute_unit(u, FORWARD, FORWARD_ISSUE, arrived, f"{w.names[u]} forward")
            if leaves:
                seconds = w.input_bytes[u] / w.down_rate * factor
                self.input = self._do("inputs", begun, seconds, None, f"{w.names[u]} input")
        if first:
            self._write(self.on_disk, self.lanes["cpu_update"], "state written")
        # Of each ring the last ones stay; those whose follower came into the same slot are gone.
        for u in w.order:
            follower = w.later[u]
            self.held[u] = self.away[u] & (~self.away[follower] if follower is not None else True)
        self._compute(w.passes.rest, w.hooks_of_rest, FORWARD, FORWARD_ISSUE, self.zero, "rest forward")

    def _backward(self, first: bool, last: bool) -> None:
        w = self.work
        self._compute(w.passes.rest, w.hooks_of_rest, BACKWARD, BACKWARD_ISSUE, self.zero, "rest backward")
        for i, u in enumerate(reversed(w.order)):
            arrived = self._weights(u, self.up_factor, first=False)
            if i > 0:  # the last unit's forward and backward are one use
                self._used(u, arrived)
            room = self._gradient_room(u, first)
            if i == 0 and w.root is not None:
                room = np.maximum(room, self._gradient_room(w.root, first))
            came = self.input if w.input_bytes[u] else self.zero
            arrived = np.maximum(np.maximum(arrived, room), came)
            begun = self._compute_unit(u, BACKWARD, BACKWARD_ISSUE, arrived, f"{w.names[u]} backward")
            if w.input_bytes[u] and (previous := w.input_before[u]) is not None:
                seconds = w.input_bytes[previous] / w.up_rate * self.up_factor
                self.input = self._do("inputs", begun, seconds, None, f"{w.names[previous]} input")
            self._gradient(u, last)
        for u in w.order:
            follower = w.earlier[u]
            self.held[u] = self.away[u] & (~self.away[follower] if follower is not None else True)
        if w.root is not None:
            self._gradient(w.root, last)

    def _end_step(self) -> None:
        """The norm is known: units on the GPU are updated at once, the others beside the next forward pass."""
        w = self.work
        self.norm_known = np.maximum(self.gpu, self.lanes["collective"]) if w.gpus > 1 else self.gpu
        self.staging = self.norm_known
        self.gpu = self.norm_known + w.gpu_update_seconds
        self._tell("compute", self.norm_known, self.gpu, None, "update on the GPU")
        self.ready = [self.gpu] * w.units
        self.held &= self.frozen  # what an update changed is fetched again
        self.cpu = np.maximum(self.cpu + w.step_issue_seconds, self.gpu)

    def _update_unit(self, u: int) -> None:
        """The last step's update of a unit whose state is off the GPU, and what brings shards together again.

        It is told here, ahead of the unit's forward, so that lanes serve units in the order of time.
        """
        w, name = self.work, self.work.names[u]
        off = self.state_off[u]
        if w.state_elements[u] and off.any():
            chunks = w.update_chunks[u]
            each = np.where(self.state_nvme[u], w.nvme_update_seconds, w.host_update_seconds)
            seconds = w.state_elements[u] * each * self.update_factor
            there = np.maximum(self.norm_known, self.landed[u])
            late = off & ~self.grad_off[u]
            sending = w.gradient_bytes[u] / w.down_rate
            sent = self._do("device_to_host", self.staging, sending, late, f"{name} gradient")
            there = np.where(late, _chunk_by_chunk(sent - sending, sent, seconds, chunks), there)
            if self.on_disk.any():
                begun, read = self._stream_state(u)
                there = np.where(
                    self.state_nvme[u], np.maximum(there, _chunk_by_chunk(begun, read, seconds, chunks)), there
                )
                # A chunk takes a staging slot whether it needs it or not, and so waits for what is written from it.
                waits = off & ~self.state_nvme[u] & (self.unwritten > 0) & (chunks > 1)
                written = self._write(waits, self.lanes["cpu_update"], "state written")
                there = np.where(waits, np.maximum(there, written), there)
            done = self._do("cpu_update", there, seconds, off, f"{name} update")
            self.staging = np.where(off, done - seconds / chunks, self.staging)
            if self.away_nvme[u].any():
                written = self._write(self.away_nvme[u], done, f"{name} weights written")
                done = np.where(self.away_nvme[u], written, done)
            mirrored = off & ~self.away[u]
            copied = w.state_weight_bytes[u] / w.up_rate * self.up_factor_update
            self.promised[u] = np.where(off, done, self.promised[u])
            done = np.where(mirrored, self._do("host_to_device", done, copied, mirrored, name), done)
            self.ready[u] = np.where(off, done, self.ready[u])
        if w.gathers_after_update:
            self.ready[u] = self._do("collective", self.ready[u], w.gather_seconds[u], None, f"{name} gather")

    def _stream_state(self, u: int) -> tuple[Times, Times]:
        """A unit's state comes from disk and goes back, its weights too where they live there: chunk by chunk, two
        reads ahead of the writes. Returns when its first read begins, and when its last one ends."""
        w, name, nvme = self.work, self.work.names[u], self.state_nvme[u]
        moved = w.nvme_state_bytes[u] + np.where(self.away_nvme[u], w.nvme_weight_bytes[u], 0)
        chunk = moved / w.write_rate / w.update_chunks[u]
        owed = self.unwritten + chunk * w.update_chunks[u]
        two = chunk * 2 if w.update_chunks[u] > 1 else chunk + self.last_chunk
        begun = np.maximum(self.lanes["nvme"], self.staging)
        writing = np.maximum(owed - two, 0.0)
        self._do("nvme", begun, writing, nvme, "state written")
        read = self._do("nvme", begun, moved / w.read_rate, nvme, f"{name} state read")
        self.unwritten = np.where(nvme, owed - writing, self.unwritten)
        self.last_chunk = np.where(nvme, chunk, self.last_chunk)
        return begun, read

    def _write(self, where: np.ndarray, done: Times, label: str) -> Times:
        """The disk writes what it was not yet asked for; the last chunk was updated at ``done``."""
        start = np.maximum(self.staging, done - self.unwritten + self.last_chunk)
        written = self._do("nvme", start, self.unwritten, where, label)
        self.unwritten = np.where(where, 0.0, self.unwritten)
        self.last_chunk = np.where(where, 0.0, self.last_chunk)
        return written

    # What parts are made of

    def _weights(self, u: int, factor: Times, first: bool) -> Times:
        """When a unit's weights are on the device; starts what brings them there."""
        w, name = self.work, self.work.names[u]
        cpu, gpu = self.triggers[-1] if self.triggers and u != w.root else (self.cpu, self.gpu)
        arrived = self.ready[u] if first else self.zero
        fetched = self.away[u] & ~self.held[u]
        if fetched.any():
            begun = np.maximum(np.maximum(self.fetching, cpu), self.promised[u])
            start = np.maximum(begun, gpu)
            seconds = w.weight_bytes[u] / w.up_rate * factor
            from_disk = fetched & self.away_nvme[u]
            if from_disk.any():
                reading = w.nvme_weight_bytes[u] / w.read_rate
                chunks = w.weight_chunks[u]
                # As many chunks as the reader's ring has slots come from disk before the first of them can leave it.
                early = np.maximum(begun, start - reading * min(UPDATE_RING, chunks) / chunks)
                read = self._do("nvme", early, reading, from_disk, f"{name} read")
                start = np.where(from_disk, _chunk_by_chunk(read - reading, read, seconds, chunks), start)
                start = np.maximum(start, gpu)
                begun = np.where(from_disk, read, begun)
            here = self._do("host_to_device", start, seconds, fetched, name)
            # The CPU goes on when the copy is enqueued: after the unit's update, and after what is read from disk.
            self.fetching = np.where(fetched, begun, self.fetching)
            self.cpu = np.where(fetched, np.maximum(self.cpu, begun), self.cpu)
            arrived = np.where(fetched, here, np.where(self.away[u], self.zero, arrived))
        waits = self.state_off[u] & ~self.away[u]
        if first and waits.any():
            self.cpu = np.where(waits, np.maximum(self.cpu, self.promised[u]), self.cpu)
        if w.gathers_each_use:
            start = np.maximum(np.maximum(arrived, cpu), gpu)
            arrived = self._do("collective", start, w.gather_seconds[u], None, f"{name} gather")
        return arrived

    def _used(self, u: int, arrived: Times) -> None:
        """The CPU has come to a unit whose weights arrive then: where they come and go, it has others fetched now."""
        moves = np.ones_like(self.away[u]) if self.work.gathers_each_use else self.away[u]
        now = [(self.cpu, np.maximum(self.gpu, arrived)), *self.triggers]
        self.triggers = [
            (np.where(moves, new[0], old[0]), np.where(moves, new[1], old[1]))
            for new, old in zip(now, self.triggers, strict=False)
        ]

    def _gradient_room(self, u: int, first: bool) -> Times:
        """When the slot is there in which the unit's gradients gather, with what the micro-batches before left."""
        w, off = self.work, self.grad_off[u]
        if not w.gradient_bytes[u] or not off.any():
            return self.zero
        other = w.gradient_follower[u]
        room = self.zero
        if other is not None:  # only those that leave the GPU gather in slots
            room = np.where(self.grad_off[other], self.landed[other], self.zero)
        if not first:
            start = np.maximum(np.maximum(self.cpu, self.landed[u]), room)
            seconds = w.gradient_bytes[u] / w.up_rate * self.up_factor
            room = self._do("host_to_device", start, seconds, off, w.names[u])
        return np.where(off, room, self.zero)

    def _gradient(self, u: int, last: bool) -> None:
        """A unit's backward is over: reduce its gradient, send it home."""
        w, name = self.work, self.work.names[u]
        if not w.gradient_bytes[u]:
            return
        there = self.gpu
        if w.gpus > 1 and (last or w.reduces_each_pass):
            there = self._do("collective", there, w.reduce_seconds[u][last], None, f"{name} reduce")
        seconds = w.gradient_bytes[u] / w.down_rate * self.down_factor
        sent = self._do("device_to_host", there, seconds, self.grad_off[u], f"{name} gradient")
        self.landed[u] = np.where(self.grad_off[u], sent, there)

    def _compute_unit(self, u: int, kernels: int, issue: int, arrived: Times, label: str) -> Times:
        return self._compute(self.work.by_unit[u], self.work.hooks_by_unit[u], kernels, issue, arrived, label)

    def _compute(
        self, seconds: np.ndarray, hooks: np.ndarray, kernels: int, issue: int, arrived: Times, label: str
    ) -> Times:
        """Issue and compute; gives when computing began."""
        begun = self.cpu
        self.cpu = self.cpu + seconds[issue] + hooks[issue] * self.hooked
        start = np.maximum(np.maximum(self.gpu, arrived), begun)
        # A GPU that waits for the CPU ends with what was issued last.
        end = np.maximum(start + seconds[kernels], self.cpu)
        self._tell("compute", start, end, None, label)
        self.gpu = end
        return start

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


def _chunk_by_chunk(begun: Times, ended: Times, seconds: Times, chunks: int) -> Times:
    """When work of so many seconds begins that takes chunk after chunk of what came between ``begun`` and ``ended``.

    Not before the first chunk is there, and so late that the last one is there when its turn comes.
    """
    return np.maximum(begun + (ended - begun) / chunks, ended - seconds * (chunks - 1) / chunks)
