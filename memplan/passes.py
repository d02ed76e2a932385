"""The seconds of one micro-batch by unit: how long its kernels run, and how long the CPU takes to issue them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memplan.activations import Way, recompute_share
from memplan.rates import Rates
from memplan.units import owner
from offload.plan import Precision
from profiler.profile import ActivationPoint, LayerProfile, ModelProfile, ModuleSeconds

FORWARD, FORWARD_ISSUE, BACKWARD, BACKWARD_ISSUE = range(4)


@dataclass(frozen=True)
class PassSeconds:
    """One forward and backward. Rows are units in forward order, columns as numbered above."""

    by_unit: np.ndarray
    rest: np.ndarray
    """Of what belongs to no unit but the root: the loss, norms, what is between the units. It comes last in forward."""


def pass_seconds(profile: ModelProfile, paths: Sequence[str], way: Way, rates: Rates) -> PassSeconds:
    """The seconds of a way by unit, ``paths`` being the units in forward order.

    From the profile's seconds where it was made for a device, else from FLOPs at the rates' share of the peak.
    """
    known = [p for p in profile.activations if p.loss_chunks == way.loss_chunks]
    recomputed = set(profile.blocks[: way.recomputed_blocks])
    share = recompute_share(profile, way)
    again = _rows([p for p in known if p.recompute], profile, way, rates) if share else {}
    kept = _rows([p for p in known if not p.recompute], profile, way, rates) if share < 1 else again
    rows = kept | {path: row for path, row in again.items() if path in recomputed or path not in kept}
    index = {path: i for i, path in enumerate(paths)}
    units = frozenset(paths)
    by_unit, rest = np.zeros((len(paths), 4)), np.zeros(4)
    for path, row in rows.items():
        unit = owner([f"{path}."], units)
        if unit:
            by_unit[index[unit]] += row
        else:
            rest += row
    return PassSeconds(by_unit, rest)


def _rows(points: Sequence[ActivationPoint], profile: ModelProfile, way: Way, rates: Rates) -> dict[str, np.ndarray]:
    """Seconds by path, linear between the batch sizes."""
    points = sorted((p for p in points if not p.checkpoints_on_host), key=lambda p: p.batch_size)
    if any(not p.modules for p in points):
        return _from_flops(points, profile, way, rates)
    above = next(p for p in points if p.batch_size >= way.micro_batch_size)
    below = next((p for p in reversed(points) if p.batch_size <= way.micro_batch_size), above)
    span = above.batch_size - below.batch_size
    weight = (way.micro_batch_size - below.batch_size) / span if span else 1.0
    low, high = ({m.path: _row(m) for m in p.modules} for p in (below, above))
    return {path: weight * row + (1 - weight) * low.get(path, row) for path, row in high.items()}


def _row(module: ModuleSeconds) -> np.ndarray:
    m = module
    return np.array([m.forward_seconds, m.forward_issue_seconds, m.backward_seconds, m.backward_issue_seconds])


def _from_flops(
    points: Sequence[ActivationPoint], profile: ModelProfile, way: Way, rates: Rates
) -> dict[str, np.ndarray]:
    """FLOPs of every layer without those below it, at what training sustains; what is recomputed runs once more."""
    flops_per_second = rates.compute_flops_per_second[Precision(profile.precision)]
    scale = way.micro_batch_size / profile.batch_size
    again = {b for b in profile.blocks if any(p.recompute for p in points)}
    below: dict[str, list[LayerProfile]] = defaultdict(list)
    for layer in profile.layers:
        if layer.path:
            below[layer.path.rpartition(".")[0]].append(layer)
    rows = {}
    for layer in profile.layers:
        children = below[layer.path]
        forward = max(0, layer.forward_flops - sum(c.forward_flops for c in children)) * scale / flops_per_second
        backward = max(0, layer.backward_flops - sum(c.backward_flops for c in children)) * scale / flops_per_second
        # A call is a forward and a backward, the backward twice as long; a layer with others inside costs none itself.
        issue = 0.0 if children else layer.calls * rates.call_seconds / 3
        repeats = owner([f"{layer.path}."], again) != ""
        rows[layer.path] = np.array([forward, issue, backward + repeats * forward, (2 + repeats) * issue])
    return rows
