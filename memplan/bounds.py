"""Seconds that no step of a candidate can go below, for arrays of candidates at once; on a CPU, the estimate itself.

Every lane must do what it has to do, at its rate alone. And an update that begins after the last gradient holds up the
next forward pass at the units that it has not reached: with all of it behind the backward pass, a step takes what
computes without forward, and the update.
"""

import numpy as np

from memplan.memory import Counts, Ints
from memplan.passes import BACKWARD, BACKWARD_ISSUE, FORWARD, FORWARD_ISSUE
from memplan.spans import Times
from memplan.work import StepWork

SAFETY = 1 - 1e-9
"""A bound must not pass its own price by the rounding of sums."""


def least_seconds(work: StepWork, counts: Counts) -> Times:
    """A lower bound of ``pipeline.step_seconds`` for each candidate."""
    lanes = _lanes(work, counts)
    # Beside weights that stream an update is slower.
    streaming = np.asarray(counts.parameters) > 0
    lanes["cpu_update"] = lanes["cpu_update"] * np.where(streaming, work.rates.cpu_update_beside_links, 1.0)
    columns = _columns(work)
    kernels = work.micro_batches * float(columns[FORWARD] + columns[BACKWARD])
    issue = work.micro_batches * float(columns[FORWARD_ISSUE] + columns[BACKWARD_ISSUE])
    beside = float(columns[FORWARD]) + work.gpu_update_seconds
    # What comes after the last unit that waits for its update can not be beside it.
    left = _forward_left(work)
    updated = lanes["cpu_update"] + left[np.asarray(counts.state)]
    streamed = _streamed_seconds(work, counts) + left[np.asarray(counts.nvme_state)]
    behind = kernels - float(columns[FORWARD]) + np.maximum(beside, np.maximum(updated, streamed))
    longest = np.maximum(issue, behind)
    for seconds in lanes.values():
        longest = np.maximum(longest, seconds)
    return longest * SAFETY


def cpu_step_seconds(work: StepWork, counts: Counts) -> Times:
    """Seconds of a step where the CPU computes: computing, updating and copying share its cores and add up.

    Only the disk works beside them.
    """
    lanes = cpu_lanes(work, counts)
    nvme = lanes.pop("nvme")
    return np.maximum(np.sum(list(lanes.values()), axis=0), nvme)


def cpu_lanes(work: StepWork, counts: Counts) -> dict[str, Times]:
    """Busy seconds of every lane where the CPU computes. It updates every unit itself, wherever its state lives."""
    lanes = _lanes(work, counts)
    columns = _columns(work)
    compute = work.micro_batches * float(columns.sum())
    updated = float(sum(work.state_elements)) * work.nvme_update_seconds  # nobody shares it
    return {
        **lanes,
        "cpu_update": np.full_like(lanes["nvme"], updated),
        "compute": np.full_like(lanes["nvme"], compute),
    }


def _columns(work: StepWork) -> np.ndarray:
    """Of one micro-batch. The root unit does nothing by itself: what is outside of all units is the rest."""
    return work.by_unit[work.order].sum(axis=0) + work.passes.rest


def _lanes(work: StepWork, counts: Counts) -> dict[str, Times]:
    """The least that each lane beside computing is busy in one step."""
    t, w, k = work.tables, work.precision.weight_bytes, work.micro_batches
    # A unit is fetched for forward and for backward of every micro-batch, but for what is still in its slot at a turn.
    turns = 2 * k - 1

    def fetched(count: Ints) -> Times:
        return (t.parameter_elements[count] * (turns + 1) - t.slot_elements[count] * turns) * float(w)

    gradients = t.gradient_elements[counts.gradients] * float(w)
    late = np.maximum(0, t.gradient_elements[counts.state] - t.gradient_elements[counts.gradients]) * float(w)
    returned = np.maximum(0, t.state_elements[counts.state] - t.state_elements[counts.parameters]) * float(w)
    on_disk = t.nvme_state[counts.nvme_state] + t.nvme_parameters[counts.nvme_parameters]
    weight_reads = fetched(counts.nvme_parameters) / work.read_rate
    collective = 0.0
    if work.gpus > 1:
        of_root = work.gather_seconds[work.root] if work.root is not None else 0.0
        gathered, reduced = sum(work.gather_seconds), [sum(row) for row in zip(*work.reduce_seconds, strict=True)]
        if work.gathers_each_use:  # the root stays whole from forward to backward
            gathered = k * (2 * gathered - of_root)
        collective = reduced[1] + (gathered if work.sharding.zero_stage else 0.0)
        collective += (k - 1) * reduced[0] if work.reduces_each_pass else 0.0
    found = {
        "host_to_device": (fetched(counts.parameters) + returned + gradients * (k - 1)) / work.up_rate,
        "device_to_host": (gradients * k + late) / work.down_rate,
        "nvme": on_disk * (1 / work.read_rate + 1 / work.write_rate) + weight_reads,
        "cpu_update": t.state_elements[counts.state] * work.host_update_seconds
        + t.state_elements[counts.nvme_state] * (work.nvme_update_seconds - work.host_update_seconds),
        "collective": collective,
    }
    return {lane: np.broadcast_to(seconds, np.shape(counts.state)) for lane, seconds in found.items()}


def _streamed_seconds(work: StepWork, counts: Counts) -> Times:
    """Of the disk until the last chunk has been read: by then all is written but the last two chunks."""
    t = work.tables
    moved = t.nvme_state[counts.nvme_state] + t.nvme_parameters[counts.nvme_parameters]
    whole = zip(work.nvme_state_bytes, work.nvme_weight_bytes, work.update_chunks, strict=True)
    chunk = max(((state + weights) / chunks for state, weights, chunks in whole), default=0.0)
    return np.maximum(0.0, moved / work.read_rate + (moved - 2 * chunk) / work.write_rate)


def _forward_left(work: StepWork) -> np.ndarray:
    """Seconds of forward from the last unit on that waits for its update, by how many units of the chain do."""
    seconds = work.by_unit[:, FORWARD].copy()
    after = np.cumsum(seconds[::-1])[::-1] + float(work.passes.rest[FORWARD])
    left = np.zeros(work.units + 1)
    last = -1
    for position, unit in enumerate(work.chain):
        if work.state_elements[unit]:
            last = max(last, unit)
        left[position + 1] = after[last] if last >= 0 else 0.0
    return left
