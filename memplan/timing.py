"""The seconds of one optimizer step, by lane: what each resource is busy for, and how far the lanes overlap.

The runtime prefetches weights, so the link works while the device computes. An exactly clipped update can start only
when the last gradient has landed; it then runs beside the next forward pass, unit by unit in forward order. So a step
takes as long as its busiest lane, and an update longer than the first forward pass shows.

Where the CPU is the compute device, computing, updating and copying share its cores and add up; only the disk works
beside them.
"""

from dataclasses import dataclass

import numpy as np

from memplan.memory import ChainTables, Counts
from memplan.rates import Rates

Seconds = float | np.ndarray
LANES = ("compute", "host_to_device", "device_to_host", "nvme", "cpu_update", "collective")


@dataclass(frozen=True)
class Work:
    """What one GPU does in one optimizer step, whatever lies where."""

    device: str
    micro_batches: int
    micro_batch_flops: int
    """Executed: forward, recompute and backward."""
    micro_batch_calls: int
    """Calls of modules without children."""
    forward_share: float
    """Of the executed FLOPs, those of the forward pass."""


@dataclass(frozen=True)
class Lanes:
    """Busy seconds; ``update`` is the part of the other lanes' work that starts only after the last gradient."""

    compute: Seconds
    host_to_device: Seconds
    device_to_host: Seconds
    nvme: Seconds
    cpu_update: Seconds
    collective: Seconds
    forward: float
    """Of ``compute``: the first forward pass, beside which the update runs."""
    update: Seconds
    first_fetch: Seconds

    def busy_seconds(self) -> dict[str, float]:
        """By lane, those that do nothing left out."""
        return {name: float(getattr(self, name)) for name in LANES if getattr(self, name) > 0}


def lanes(tables: ChainTables, counts: Counts, work: Work, rates: Rates) -> Lanes:
    """The lanes of one step of one GPU for a candidate, or for arrays of them."""
    w, k, t = tables.precision.weight_bytes, work.micro_batches, tables
    gpus = t.sharding.gpus
    h2d, d2h = (c.at(64 << 20) * rates.duplex_share for c in (rates.host_to_device, rates.device_to_host))
    read, write = rates.nvme_read_bytes_per_second, rates.nvme_write_bytes_per_second

    # Fetched for forward and for backward, but for the units that are still in their slots at the turn.
    fetched = (2 * t.parameter_elements[counts.parameters] - t.slot_elements[counts.parameters]) * w * k
    gradients = t.gradient_elements[counts.gradients] * w
    returned = (t.state_elements[counts.state] - t.state_elements[counts.parameters]).clip(0) * w
    late_gradients = (t.gradient_elements[counts.state] - t.gradient_elements[counts.gradients]).clip(0) * w

    # Weights on NVMe are read for every fetch, and read and written by their update; the ranks share the disk.
    c = counts.nvme_parameters
    weight_reads = (2 * t.parameter_elements[c] - t.slot_elements[c]) * w * k
    update_io = (t.nvme_state[counts.nvme_state] + t.nvme_parameters[c]) * gpus * (1 / read + 1 / write)
    # The ranks share the cores, too. A CPU that computes updates every unit itself, wherever its state lives.
    updated = t.state_elements[t.units if work.device == "cpu" else counts.state]
    cpu_update = updated * gpus * rates.cpu_update_seconds[t.precision] * rates.cpu_update_beside_links

    flops_per_second = rates.compute_flops_per_second[t.precision]
    # A GPU passes over every weight, gradient and norm once a step wherever the state lives, so that a plan never gains
    # by moving away what fits.
    step_pass = 0.0 if work.device == "cpu" else t.state_elements[-1] * rates.gpu_update_seconds[t.precision]
    # Each call costs the framework's own time: a GPU computes beside it, a CPU does not. Each micro-batch's gradients
    # pass through memory once more on their way into the flat buffers: read, added to what is there, written.
    math, calls = work.micro_batch_flops / flops_per_second, work.micro_batch_calls * rates.call_seconds
    gathering = 3 * t.trainable_elements * w / rates.device_bytes_per_second
    micro_batch = (math + calls if work.device == "cpu" else max(math, calls)) + gathering
    # Before the first unit is there nothing computes; its followers arrive beside it.
    first = np.where(np.asarray(counts.parameters) > 0, t.parameter_elements[min(1, t.units)], 0) * w
    return Lanes(
        compute=micro_batch * k + step_pass,
        host_to_device=(fetched + returned + gradients * (k - 1)) / h2d,
        device_to_host=(gradients * k + late_gradients) / d2h,
        nvme=update_io + weight_reads * gpus / read,
        cpu_update=cpu_update,
        collective=_collective_bytes(t, k) / rates.collective.at(64 << 20) if gpus > 1 else 0.0,
        forward=micro_batch * work.forward_share,
        update=np.maximum(np.maximum(cpu_update, update_io), np.maximum(returned / h2d, late_gradients / d2h)),
        first_fetch=first / h2d,
    )


def step_seconds(busy: Lanes, device: str) -> Seconds:
    """Seconds of one optimizer step in the steady state."""
    if device == "cpu":
        shared = busy.compute + busy.cpu_update + busy.host_to_device + busy.device_to_host
        return np.maximum(shared, busy.nvme)
    longest = busy.compute + np.maximum(0.0, busy.update - busy.forward)
    for lane in (busy.host_to_device, busy.device_to_host, busy.nvme, busy.cpu_update, busy.collective):
        longest = np.maximum(longest, lane)
    return longest + busy.first_fetch


def bottleneck(busy: Lanes) -> str:
    """The busiest lane, which bounds the step."""
    seconds = busy.busy_seconds()
    return max(seconds, key=lambda name: seconds[name])


def _collective_bytes(t: ChainTables, micro_batches: int) -> float:
    """Bytes that one GPU sends in a step to bring gradients together and weights apart."""
    n, w = t.sharding.gpus, t.precision.weight_bytes
    share = (n - 1) / n
    weights = int(t.parameter_elements[-1]) * w * (n if t.sharding.zero_stage == 3 else 1)
    gradients = int(t.gradient_elements[-1]) * w * (n if t.sharding.zero_stage >= 2 else 1)
    if t.sharding.zero_stage == 3:
        return share * (2 * weights + gradients) * micro_batches
    if t.sharding.zero_stage == 2:
        return share * (gradients * micro_batches + weights)
    return share * 2 * gradients
