"""How CPU and GPU share the update of state that lives on the host, and what an element takes then. Pure.

Both are at work at once, each slowed by the other as a calibration measured it, and end together where the split is
right. A piece of the GPU's share brings weights, gradients and state over the link to it, which also carries the
weights that the next forward pass fetches meanwhile: what it carries in a second bounds the share too. The engine
begins with this split and moves it by what its first steps take.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from memplan.rates import Rates
from offload.plan import MomentFormat, StateFormat
from offload.residency import state_bytes, update_traffic_bytes

LEAST_SHARE = 0.05
"""A smaller share of the GPU is not worth its slots."""
COPY_BYTES = 16 << 20
"""Of a typical copy of a piece."""
WIDENED = {MomentFormat.BF16: 3.0, MomentFormat.EIGHT_BIT: 9.0}
"""How many times as long an update takes with moments in fewer bits, where torch's operations widen and round them: on
a CPU that computes, and on a GPU. Measured on one core of an AMD EPYC (3 to 4, and 6 to 10), and on no GPU."""
COMPILED = {MomentFormat.BF16: 1.7, MomentFormat.EIGHT_BIT: 4.6}
"""The same of the host's compiled update beside a GPU, AdamW of bf16 weights on the same core: ``host-update.json`` of
the benchmarks. It is arithmetic that takes this time, so where memory bounds the update of many cores it is less."""


@dataclass(frozen=True)
class SharedUpdate:
    """The split of an update, and its seconds."""

    gpu_share: float
    seconds: float
    """Of one element, with both at work."""
    cpu_seconds: float
    """Of one element that only the CPU can update, alone: what is on NVMe."""


def beside_adam(form: StateFormat, longer: Mapping[MomentFormat, float] = WIDENED) -> float:
    """What an update takes of Adam's, which the rates are of: memory bounds both, so as much as its bytes.

    Moments in fewer bits are widened and rounded beside the update, which takes ``longer`` than their bytes save.
    """
    wide = replace(form, moments=MomentFormat.FP32)
    bytes_of = update_traffic_bytes(1 << 20, wide) / update_traffic_bytes(1 << 20, StateFormat(form.precision))
    return bytes_of * longer.get(form.moments, 1.0)


def shared_update(rates: Rates, form: StateFormat, device: str, ranks: int) -> SharedUpdate:
    """Of one rank, where ``ranks`` share a node's cores, and each has a GPU and a link of its own.

    With a share s the CPU takes (1 - s) c an element, the GPU s g, and the link (s b + w) / r, for b bytes of weight,
    gradient and state and w bytes of weight; s is the largest for which the CPU is the last.
    """
    longer = WIDENED if device == "cpu" else COMPILED
    alone = rates.cpu_update_seconds[form.precision] * beside_adam(form, longer) * ranks
    streamed = rates.streamed_update_seconds.get(form.precision)
    if device == "cpu" or streamed is None:
        return SharedUpdate(0.0, alone, alone)
    cpu = alone * rates.cpu_update_beside_streamed
    gpu = streamed * beside_adam(form) * rates.streamed_update_beside_cpu
    weight_bytes = form.precision.weight_bytes
    piece_bytes = 2 * weight_bytes + state_bytes(1 << 20, form) / (1 << 20)
    rate = rates.host_to_device.at(COPY_BYTES) * rates.duplex_share
    share = min(cpu / (cpu + gpu), (cpu - weight_bytes / rate) / (cpu + piece_bytes / rate))
    seconds = (1 - share) * cpu
    if share < LEAST_SHARE or seconds >= alone:
        return SharedUpdate(0.0, alone, alone)
    return SharedUpdate(share, seconds, alone)
