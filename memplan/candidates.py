"""The best plan: every candidate of a pruned space is priced, or shown to be no better than one that was.

The space: sharding (with several GPUs), micro-batch, recomputed blocks, where checkpoints wait, loss chunks - together
a *family* - and, in each, prefetch depth and the five counts of ``memplan.memory.Counts``. Weights go to NVMe only when
all optimizer state that left the GPU is there, and weights leave the GPU only where that keeps optimizer state on it.
Exact over this space: bounds (``memplan.bounds``) only leave out what can not be better.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from memplan.activations import FIXED_MARGIN_BYTES
from memplan.bounds import cpu_step_seconds, least_seconds
from memplan.memory import RESIDENT, Counts
from memplan.pipeline import step_seconds
from memplan.problem import Family, Problem
from memplan.spans import Times
from memplan.work import StepWork
from offload.optimizer import DEVICE_ELEMENTS
from offload.plan import Buckets, MomentFormat, Tier
from offload.residency import state_bytes, streamed_slot_bytes
from offload.shards import ALIGN_ELEMENTS

PREFETCH_DEPTHS = (1, 2)
SMALLEST_UPDATE = 1 << 16
LARGEST_UPDATE = 1 << 24
STAGING_SHARE = 1 / 16
"""Of a tier's budget, for the chunks in which state is updated and streamed."""
RANK_BITS = 8
"""Seconds that agree this far, to a quarter of a percent, are a tie: then what moves less is the better."""
DOUBT = 0.02
"""Of seconds: a family is as fast as the fastest if no more than that separates them, for no prediction is better.
Measured steps are 7 % off in the median, and those with state on the host are longer than predicted."""
UPDATE_COPIES = 5
"""fp32 tensors of one span that ``offload.optimizer.update_in_torch`` holds at once on a device."""
FIRST_BATCH, LARGEST_BATCH = 256, 4096
"""Candidates priced at a time: at first few, not to price what a bound would leave out, then what keeps NumPy busy."""

Price = Callable[[StepWork, Counts], Times]
"""Seconds of one step of each candidate."""


@dataclass(frozen=True)
class Candidate:
    """One way to train, priced."""

    family: Family
    buckets: Buckets
    counts: Counts
    seconds: float
    """Of one optimizer step."""
    offloaded_bytes: int

    @property
    def rank(self) -> tuple[float, int, int, bool, int, int, int, int]:
        """The smaller the better; the batch of a step is the same in all candidates, so its seconds decide."""
        way, sharding = self.family.way, self.family.sharding
        return (
            float(rounded(self.seconds)),
            self.offloaded_bytes,
            way.recomputed_blocks,
            way.loss_chunks > 1,
            -way.micro_batch_size,
            sharding.zero_stage,
            -sharding.group,
            -self.buckets.prefetch_units,
        )


def rounded(seconds: float | np.ndarray) -> np.ndarray:
    """Seconds without the digits that do not decide."""
    mantissa, exponent = np.frexp(seconds)
    return np.ldexp(np.round(np.ldexp(mantissa, RANK_BITS)), exponent - RANK_BITS)


def update_sizes(problem: Problem) -> Iterator[int]:
    """Elements of one chunk to try: as many as its share of the budgets allows, then fewer."""
    budget, shared = problem.budget, problem.gpu_update_share > 0
    state = state_bytes(ALIGN_ELEMENTS, problem.form) / ALIGN_ELEMENTS
    chunk_bytes = 3 * (3 * problem.precision.weight_bytes + state)
    largest = max((s.elements for s in problem.shapes), default=0)

    def staged(size: int) -> bool:
        on_gpu = Buckets().update_slots * streamed_slot_bytes(size, problem.form) if shared else 0
        return size * chunk_bytes <= budget.host_bytes * STAGING_SHARE and on_gpu <= budget.gpu_bytes * STAGING_SHARE

    size = LARGEST_UPDATE
    while size > SMALLEST_UPDATE and (size // 2 >= largest or not staged(size)):
        size //= 2
    while size >= SMALLEST_UPDATE:
        yield size
        size //= 2


def search(problem: Problem) -> list[Candidate]:
    """The best candidate of each family that could hold the best of all, best first; empty where nothing fits.

    Of the families that are as fast as the fastest the one is best that moves least.
    """
    if not feasible(problem):
        return []
    families = list(problem.families())
    for size in update_sizes(problem):
        found: list[Candidate] = []
        best = float("inf")
        # The most promising family first; what it must move off the GPU is worked out only when its turn comes.
        waiting = [(least_of(problem, family), i, False) for i, family in enumerate(families)]
        heapify(waiting)
        while waiting:
            floor, i, known = heappop(waiting)
            if floor > best * (1 + DOUBT):
                break
            if not known:
                heappush(waiting, (max(floor, floor_of(problem, families[i], size)), i, True))
            elif (candidate := best_of(problem, families[i], size)) is not None:
                found.append(candidate)
                best = min(best, candidate.seconds)
        if found:
            return in_order(found, best)
    return []


def in_order(found: Sequence[Candidate], fastest_seconds: float) -> list[Candidate]:
    """Best first: those that are as fast as the fastest by what they move, then the others by rank."""

    def key(candidate: Candidate) -> tuple[bool, int, bool, Any]:
        if candidate.seconds > fastest_seconds * (1 + DOUBT):
            return True, 0, False, candidate.rank
        return False, candidate.offloaded_bytes, candidate.family.way.checkpoints is Tier.HOST, candidate.rank

    return sorted(found, key=key)


def least_of(problem: Problem, family: Family) -> float:
    """Seconds that no candidate of a family can go below."""
    search = FamilySearch(problem, family, Buckets())
    return float(search.bound(search.work, _as_arrays([RESIDENT]))[0])


def floor_of(problem: Problem, family: Family, update_elements: int) -> float:
    """Seconds that no candidate of a family that fits can go below; infinite where none fits."""
    return min(search.floor() for search in _at_every_depth(problem, family, update_elements))


def feasible(problem: Problem) -> bool:
    """Whether anything fits: asked of the candidates that need the least."""
    buckets = Buckets(prefetch_units=min(PREFETCH_DEPTHS), update_elements=SMALLEST_UPDATE)
    return any(
        FamilySearch(problem, family, buckets).fits()
        for family in problem.families()
        if family.way.micro_batch_size == 1
    )


def best_of(problem: Problem, family: Family, update_elements: int) -> Candidate | None:
    """The best candidate of one family; ``None`` where none fits."""
    best: Candidate | None = None
    for search in _at_every_depth(problem, family, update_elements):
        candidate = search.best()
        if candidate is None:
            continue
        best = candidate if best is None else min(best, candidate, key=lambda c: c.rank)
        if candidate.counts.parameters == 0:
            break  # nothing is fetched, so nothing is fetched ahead
    return best


def _at_every_depth(problem: Problem, family: Family, update_elements: int) -> Iterator["FamilySearch"]:
    for depth in PREFETCH_DEPTHS:
        yield FamilySearch(problem, family, Buckets(prefetch_units=depth, update_elements=update_elements))


def update_scratch_bytes(problem: Problem) -> int:
    """What an update on the GPU holds for a moment: a span's gradient, master, denominator and bits in fp32."""
    if problem.device == "cpu":
        return 0
    return UPDATE_COPIES * 4 * min(DEVICE_ELEMENTS, max(s.trainable_elements for s in problem.shapes))


class FamilySearch:
    """One family at one prefetch depth."""

    def __init__(self, problem: Problem, family: Family, buckets: Buckets) -> None:
        self.problem, self.family, self.buckets = problem, family, buckets
        self.work = problem.work(family, buckets)
        self.tables = self.work.tables
        self.activations = problem.activations(family.way)
        self.update_bytes = update_scratch_bytes(problem)
        # The ranks of a node share what its memory and its disk have.
        ranks = problem.gpus_per_node
        # What the start needs beside the tiers is gone before the first inputs of blocks wait on the host.
        beside = max(self.activations.host_bytes, problem.beside_tiers_bytes)
        self.host_budget = problem.budget.host_bytes // ranks - beside
        self.nvme_budget = problem.budget.nvme_bytes // ranks
        cpu = problem.device == "cpu"
        self.price: Price = cpu_step_seconds if cpu else step_seconds
        self.bound: Price = cpu_step_seconds if cpu else least_seconds
        """Never above the price."""

    def seconds(self, counts: Counts) -> Times:
        """Of one step, for arrays of candidates."""
        return self.price(self.work, counts)

    def seconds_of(self, counts: Counts) -> float:
        """Of one step of one candidate."""
        return float(self.seconds(_as_arrays([counts]))[0])

    def best(self) -> Candidate | None:
        """The best candidate that fits."""
        pairs = self._pairs()
        if pairs is None:
            return None
        counts, excess = pairs
        floor = rounded(self._least(counts, excess))
        offloaded = self.tables.offloaded_bytes(counts)
        order = np.lexsort((offloaded, floor))
        best: Candidate | None = None
        start, size = 0, FIRST_BATCH
        while start < len(order):
            rows = order[start : start + size]
            start, size = start + size, min(2 * size, LARGEST_BATCH)
            if best is not None and (float(floor[rows[0]]), int(offloaded[rows[0]])) >= best.rank[:2]:
                break
            fitted = [fit for i in rows if (fit := self._fitted(_at(counts, i), int(excess[i]))) is not None]
            if fitted:
                best = min((b for b in (best, self._cheapest(fitted)) if b is not None), key=lambda c: c.rank)
        return best

    def floor(self) -> float:
        """Seconds that no candidate that fits can go below; infinite where none fits."""
        pairs = self._pairs()
        return float(self._least(*pairs).min()) if pairs is not None else float("inf")

    def fits(self) -> bool:
        """Whether any candidate does."""
        pairs = self._pairs()
        if pairs is None:
            return False
        counts, excess = pairs
        return any(self._fitted(_at(counts, i), int(excess[i])) is not None for i in np.argsort(excess))

    def gpu_peak_bytes(self, counts: Counts) -> int:
        """The peak to expect on one GPU."""
        beside = self.beside_forward_bytes if counts.state > counts.nvme_state else 0
        return int(self.tables.gpu_bytes(counts)) + max(self.activations.peak_bytes + beside, self.update_bytes)

    def gpu_upper_bytes(self, counts: Counts) -> int:
        """The largest peak to expect on one GPU: what decides whether a candidate fits.

        Where state leaves the GPU there is room for the slots of a shared update, although all of it may go to NVMe.
        """
        kept = self.tables.update_slots_bytes if counts.state and counts.state == counts.nvme_state else 0
        beside = self.beside_forward_bytes if counts.state else 0
        return int(self.tables.gpu_bytes(counts)) + kept + beside + self.upper_bytes

    @property
    def upper_bytes(self) -> int:
        """The most to expect on one GPU beside the model's state."""
        return max(self.activations.upper_bytes, self.update_bytes + FIXED_MARGIN_BYTES[self.problem.device])

    @property
    def beside_forward_bytes(self) -> int:
        """What the GPU's share of an update holds for a moment while forward runs: moments in fewer bits, widened."""
        narrow = self.problem.form.moments is not MomentFormat.FP32
        return self.update_bytes if self.tables.update_slots_bytes and narrow else 0

    def host_bytes(self, counts: Counts) -> int:
        """Of one node."""
        return (int(self.tables.host_bytes(counts)) + self.activations.host_bytes) * self.problem.gpus_per_node

    def attach_bytes(self, counts: Counts) -> int:
        """Of one node's host, the most until the tiers are full."""
        return self.problem.attach_bytes(int(self.tables.host_bytes(counts))) * self.problem.gpus_per_node

    def host_upper_bytes(self, counts: Counts) -> int:
        """Of one node, the most from the start on: what decides whether a candidate fits."""
        return max(self.host_bytes(counts), self.attach_bytes(counts))

    def nvme_bytes(self, counts: Counts) -> int:
        """Of one node."""
        return int(self.tables.nvme_bytes(counts)) * self.problem.gpus_per_node

    def _cheapest(self, fitted: Sequence[Counts]) -> Candidate:
        arrays = _as_arrays(fitted)
        seconds, offloaded = self.seconds(arrays), self.tables.offloaded_bytes(arrays)
        first = np.lexsort((offloaded, rounded(seconds)))[0]
        return Candidate(self.family, self.buckets, fitted[first], float(seconds[first]), int(offloaded[first]))

    def _pairs(self) -> tuple[Counts, np.ndarray] | None:
        """Every (gradients, parameters) pair with the least state off the GPU that makes it fit there.

        With it come the host bytes that must go to NVMe (none where that is not positive).
        """
        t, n = self.tables, self.tables.units
        gradients, parameters = np.mgrid[0 : n + 1, 0 : n + 1]
        resident = t.gpu_bytes(Counts(0, gradients, parameters))
        over = resident + self.upper_bytes - self.problem.budget.gpu_bytes
        # As soon as anything leaves there are the slots of its update, too.
        needed = t.update_slots_bytes + self.beside_forward_bytes
        over = np.where((over > 0) | (gradients > 0) | (parameters > 0), over + needed, over)
        state = np.maximum(np.searchsorted(t.state_bytes, over), np.maximum(gradients, parameters))
        grid = Counts(state, gradients, parameters)
        excess = t.host_bytes(replace(grid, state=np.minimum(state, n))) - self.host_budget
        kept = (state <= n) & (excess <= self._movable_host_bytes(replace(grid, state=np.minimum(state, n))))
        # Never offload what fits: not where one unit's weights less need no more state off the GPU, nor the disk.
        kept[:, 1:] &= ~(kept[:, :-1] & (state[:, :-1] <= state[:, 1:]) & (excess[:, :-1] <= 0))
        if not kept.any():
            return None
        return Counts(state[kept], gradients[kept], parameters[kept]), excess[kept]

    def _least(self, counts: Counts, excess: np.ndarray) -> Times:
        """Seconds that no candidate of a pair can go below."""
        t = self.tables
        # Staging only adds to what must go, so no candidate of a pair moves less than whole units of this many bytes.
        state = np.minimum(np.searchsorted(t.host_state, excess), counts.state)
        weights = np.minimum(np.searchsorted(t.host_parameters, excess - t.host_state[state]), counts.parameters)
        least = replace(counts, nvme_state=state, nvme_parameters=np.where(state == counts.state, weights, 0))
        return self.bound(self.work, least)

    def _movable_host_bytes(self, counts: Counts) -> np.ndarray:
        """The most that NVMe can take off the host, staging left out: state as far as it has room, then weights."""
        t = self.tables
        state = np.minimum(counts.state, _most(t.nvme_state, self.nvme_budget))
        room = np.maximum(self.nvme_budget - t.nvme_state[state], 0)
        weights = np.minimum(counts.parameters, _most(t.nvme_parameters, room))
        return t.host_state[state] + np.where(state == counts.state, t.host_parameters[weights], 0)

    def _fitted(self, pair: Counts, excess: int) -> Counts | None:
        """The pair with the least that goes to NVMe for the host to fit; ``None`` where that is too much."""
        if excess <= 0:
            return pair
        moves = np.arange(1, pair.state + pair.parameters + 1)
        counts = replace(
            pair, nvme_state=np.minimum(moves, pair.state), nvme_parameters=np.maximum(moves - pair.state, 0)
        )
        fits = (self.tables.host_bytes(counts) <= self.host_budget) & (
            self.tables.nvme_bytes(counts) <= self.nvme_budget
        )
        if not fits.any():
            return None
        first = int(np.argmax(fits))
        return replace(
            pair, nvme_state=int(counts.nvme_state[first]), nvme_parameters=int(counts.nvme_parameters[first])
        )


def _at(counts: Counts, index: int) -> Counts:
    return Counts(int(counts.state[index]), int(counts.gradients[index]), int(counts.parameters[index]))


def _as_arrays(counts: Sequence[Counts]) -> Counts:
    fields = ("state", "gradients", "parameters", "nvme_state", "nvme_parameters")
    return Counts(*(np.array([getattr(c, name) for c in counts], dtype=np.int64) for name in fields))


def _most(table: np.ndarray, room: int | np.ndarray) -> np.ndarray:
    """How many units of a table of prefix sums fit into this room."""
    return np.searchsorted(table, room, side="right") - 1
