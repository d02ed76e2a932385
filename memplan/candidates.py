"""The best plan: every candidate of a small space is priced, or shown to be no better than one that was.

The space: ZeRO stage (with several GPUs), recompute of all blocks or none, micro-batch (divisors of a GPU's batch) -
together a *family* - and, in each, prefetch depth and the five counts of ``memplan.memory.Counts``. Weights go to NVMe
only when all optimizer state that left the GPU is there. Exact over this space: within a family the cheapest bound of
all (gradients, parameters) pairs is looked at first, and the search ends when no other bound is better.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from memplan.memory import (
    Activations,
    ChainTables,
    Counts,
    Sharding,
    activations_of,
    chain_order,
    executed_flops,
)
from memplan.rates import Rates
from memplan.timing import Work, lanes, step_seconds
from offload.plan import Buckets, Budget, Precision, Tier
from offload.residency import UnitShape, state_bytes
from profiler.profile import ModelProfile

PREFETCH_DEPTHS = (1, 2)
SMALLEST_UPDATE = 1 << 16
LARGEST_UPDATE = 1 << 24
STAGING_SHARE = 1 / 16
"""Of the host budget, for the chunks in which state is updated and streamed."""
RANK_BITS = 30
"""Seconds that agree this far are a tie: what differs is rounding."""


@dataclass(frozen=True)
class Family:
    """Candidates that differ only in where things live."""

    zero_stage: int
    recompute: bool
    micro_batch_size: int
    micro_batches: int


@dataclass(frozen=True)
class Problem:
    """What is searched: one model on one machine, with the batch one GPU sees in a step."""

    profile: ModelProfile
    shapes: tuple[UnitShape, ...]
    device: str
    gpus: int
    budget: Budget
    """Of each GPU, and of the whole machine's host memory and NVMe."""
    rates: Rates
    precision: Precision
    gpu_batch_size: int

    def work(self, family: Family) -> Work:
        """What one GPU does in a step of this family."""
        flops = executed_flops(self.profile.activations, family.micro_batch_size, family.recompute)
        forward, backward = self.profile.forward_flops, self.profile.backward_flops
        executed = 2 * forward + backward if family.recompute else forward + backward
        share = forward / executed if executed else 0.0
        # A call is a forward and a backward; recompute is a third forward-sized part more.
        calls = _leaf_calls(self.profile) * (4 if family.recompute else 3) // 3
        return Work(self.device, family.micro_batches, flops, calls, share)

    def with_budget(self, tier: Tier, size: int) -> "Problem":
        """The same with another budget in one tier."""
        return replace(self, budget=replace(self.budget, **{f"{tier.value}_bytes": size}))

    def activations(self, family: Family) -> Activations | None:
        """Bytes beside the model's state; ``None`` where this recompute was not profiled."""
        return activations_of(self.profile, family.micro_batch_size, family.recompute, self.device)

    def families(self) -> Iterator[Family]:
        """All of them."""
        divisors = [m for m in range(1, self.gpu_batch_size + 1) if self.gpu_batch_size % m == 0]
        for stage in range(4) if self.gpus > 1 else (0,):
            for recompute in sorted({p.recompute for p in self.profile.activations}):
                for micro in divisors:
                    yield Family(stage, recompute, micro, self.gpu_batch_size // micro)


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
    def rank(self) -> tuple[float, int, bool, int, int, int]:
        """The smaller the better; the batch of a step is the same in all candidates, so its seconds decide."""
        return (
            float(rounded(self.seconds)),
            self.offloaded_bytes,
            self.family.recompute,
            -self.family.micro_batch_size,
            self.family.zero_stage,
            -self.buckets.prefetch_units,
        )


def _leaf_calls(profile: ModelProfile) -> int:
    """Calls of modules without children in one forward pass."""
    parents = {layer.path.rpartition(".")[0] for layer in profile.layers if layer.path}
    return sum(layer.calls for layer in profile.layers if layer.path not in parents)


def rounded(seconds: float | np.ndarray) -> np.ndarray:
    """Seconds without the digits that only say in which order they were added."""
    mantissa, exponent = np.frexp(seconds)
    return np.ldexp(np.round(np.ldexp(mantissa, RANK_BITS)), exponent - RANK_BITS)


def chain_of(shapes: Sequence[UnitShape]) -> list[UnitShape]:
    """The shapes in the order in which they leave the GPU."""
    return [shapes[i] for i in chain_order(shapes)]


def update_sizes(problem: Problem) -> Iterator[int]:
    """Elements of one chunk to try: as many as its share of the host budget allows, then fewer."""
    chunk_bytes = 3 * (3 * problem.precision.weight_bytes + state_bytes(problem.precision))
    largest = max((s.elements for s in problem.shapes), default=0)
    size = LARGEST_UPDATE
    while size > SMALLEST_UPDATE and (
        size // 2 >= largest or size * chunk_bytes > problem.budget.host_bytes * STAGING_SHARE
    ):
        size //= 2
    while size >= SMALLEST_UPDATE:
        yield size
        size //= 2


def search(problem: Problem) -> list[Candidate]:
    """The best candidate of every family that has one, best first; empty where nothing fits."""
    if not feasible(problem):
        return []
    for size in update_sizes(problem):
        found = [best for family in problem.families() if (best := best_of(problem, family, size)) is not None]
        if found:
            return sorted(found, key=lambda candidate: candidate.rank)
    return []


def feasible(problem: Problem) -> bool:
    """Whether anything fits: asked of the candidates that need the least."""
    buckets = Buckets(prefetch_units=min(PREFETCH_DEPTHS), update_elements=SMALLEST_UPDATE)
    return any(
        FamilySearch(problem, family, buckets).fits() for family in problem.families() if family.micro_batch_size == 1
    )


def best_of(problem: Problem, family: Family, update_elements: int) -> Candidate | None:
    """The best candidate of one family; ``None`` where none fits."""
    best: Candidate | None = None
    for depth in PREFETCH_DEPTHS:
        buckets = Buckets(prefetch_units=depth, update_elements=update_elements)
        candidate = FamilySearch(problem, family, buckets).best()
        if candidate is not None and (best is None or candidate.rank < best.rank):
            best = candidate
        if candidate is not None and candidate.counts.parameters == 0:
            break  # nothing is fetched, so nothing is fetched ahead
    return best


class FamilySearch:
    """One family at one prefetch depth."""

    def __init__(self, problem: Problem, family: Family, buckets: Buckets) -> None:
        self.problem, self.family, self.buckets = problem, family, buckets
        self.sharding = Sharding(family.zero_stage, problem.gpus)
        self.tables = ChainTables(chain_of(problem.shapes), buckets, problem.precision, self.sharding)
        self.work = problem.work(family)
        activations = problem.activations(family)
        assert activations is not None  # families are made from what was profiled
        self.activations = activations
        # The ranks share what the host and the disk have.
        self.host_budget = problem.budget.host_bytes // problem.gpus
        self.nvme_budget = problem.budget.nvme_bytes // problem.gpus

    def seconds(self, counts: Counts) -> float | np.ndarray:
        """Of one step."""
        return step_seconds(lanes(self.tables, counts, self.work, self.problem.rates), self.problem.device)

    def best(self) -> Candidate | None:
        """The best candidate that fits."""
        pairs = self._pairs()
        if pairs is None:
            return None
        counts, excess, floor = pairs
        offloaded = self.tables.offloaded_bytes(counts)
        best: Candidate | None = None
        for i in np.lexsort((offloaded, floor)):
            if best is not None and (float(floor[i]), int(offloaded[i])) >= best.rank[:2]:
                break
            pair = Counts(int(counts.state[i]), int(counts.gradients[i]), int(counts.parameters[i]))
            fitted = pair if excess[i] <= 0 else self._overflow(pair)
            if fitted is None:
                continue
            candidate = Candidate(
                self.family,
                self.buckets,
                fitted,
                float(self.seconds(fitted)),
                int(self.tables.offloaded_bytes(fitted)),
            )
            if best is None or candidate.rank < best.rank:
                best = candidate
        return best

    def fits(self) -> bool:
        """Whether any candidate does."""
        pairs = self._pairs()
        if pairs is None:
            return False
        counts, excess, _ = pairs
        return any(
            excess[i] <= 0
            or self._overflow(Counts(int(counts.state[i]), int(counts.gradients[i]), int(counts.parameters[i])))
            for i in np.argsort(excess)
        )

    def gpu_peak_bytes(self, counts: Counts) -> int:
        """The peak to expect on one GPU."""
        return int(self.tables.gpu_bytes(counts)) + self.activations.peak_bytes

    def gpu_upper_bytes(self, counts: Counts) -> int:
        """The largest peak to expect on one GPU: what decides whether a candidate fits."""
        return int(self.tables.gpu_bytes(counts)) + self.activations.upper_bytes

    def _pairs(self) -> tuple[Counts, np.ndarray, np.ndarray] | None:
        """Every (gradients, parameters) pair with the least state off the GPU that makes it fit there.

        With it come the host bytes that must go to NVMe (none where that is not positive), and seconds that no
        candidate of the pair can go below.
        """
        t, n = self.tables, self.tables.units
        gradients, parameters = (grid.ravel() for grid in np.mgrid[0 : n + 1, 0 : n + 1])
        resident = t.gpu_bytes(Counts(0, gradients, parameters))
        over = resident + self.activations.upper_bytes - self.problem.budget.gpu_bytes
        freed = t.state_elements * state_bytes(t.precision)
        state = np.maximum(np.searchsorted(freed, over), np.maximum(gradients, parameters))
        kept = state <= n
        counts = Counts(state[kept], gradients[kept], parameters[kept])
        excess = t.host_bytes(counts) - self.host_budget
        possible = excess <= self._movable_host_bytes(counts)
        if not possible.any():
            return None
        counts = Counts(counts.state[possible], counts.gradients[possible], counts.parameters[possible])
        excess = excess[possible]
        # Staging only adds to what must go, so no candidate of a pair moves less than whole units of this many bytes.
        state = np.minimum(np.searchsorted(t.host_state, excess), counts.state)
        weights = np.minimum(np.searchsorted(t.host_parameters, excess - t.host_state[state]), counts.parameters)
        least = replace(counts, nvme_state=state, nvme_parameters=np.where(state == counts.state, weights, 0))
        return counts, excess, rounded(self.seconds(least))

    def _movable_host_bytes(self, counts: Counts) -> np.ndarray:
        """The most that NVMe can take off the host, staging left out: state as far as it has room, then weights."""
        t = self.tables
        state = np.minimum(counts.state, _most(t.nvme_state, self.nvme_budget))
        room = np.maximum(self.nvme_budget - t.nvme_state[state], 0)
        weights = np.minimum(counts.parameters, _most(t.nvme_parameters, room))
        return t.host_state[state] + np.where(state == counts.state, t.host_parameters[weights], 0)

    def _overflow(self, pair: Counts) -> Counts | None:
        """The least that goes to NVMe for the host to fit, state before weights; ``None`` where that is too much."""
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


def _most(table: np.ndarray, room: int | np.ndarray) -> np.ndarray:
    """How many units of a table of prefix sums fit into this room."""
    return np.searchsorted(table, room, side="right") - 1
