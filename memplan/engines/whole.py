"""Engines that move whole tiers: DeepSpeed and FSDP2. Every way to set one up is priced; there are few thousands.

They do one thing after another: forward, backward, then the update, with the links busy beside forward and backward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from memplan.activations import FIXED_MARGIN_BYTES
from memplan.candidates import rounded
from memplan.engines.held import ATTACH, BACKWARD, FORWARD, PHASES, STEP, Held
from memplan.engines.traffic import Traffic
from memplan.passes import BACKWARD as BACKWARD_COLUMN
from memplan.passes import BACKWARD_ISSUE, FORWARD_ISSUE
from memplan.passes import FORWARD as FORWARD_COLUMN
from memplan.problem import Family, Problem
from memplan.spans import Span, Timeline
from offload.plan import Buckets, Placement, Tier

HELD_MARGIN = 1.02
"""Upper bound of an engine's own bytes over their estimate: buffers that its allocator splits otherwise."""


@dataclass(frozen=True)
class Setup:
    """One way to set an engine up."""

    family: Family
    buckets: Buckets
    parameters: Tier
    optimizer: Tier
    gpu_update_share: float = 0.0

    @property
    def gradients(self) -> Tier:
        """They go where they are updated."""
        return Tier.GPU if self.optimizer is Tier.GPU else Tier.HOST

    @property
    def depth(self) -> int:
        """How much is away, and how far."""
        return self.parameters.depth + self.optimizer.depth

    def placements(self, problem: Problem) -> tuple[Placement, ...]:
        """The same for every unit."""
        tiers = (self.parameters, self.gradients, self.optimizer)
        return tuple(Placement(s.name, *tiers) for s in problem.shapes)


class WholeEngine(Protocol):
    """What is known of such an engine."""

    @property
    def update_seconds(self) -> float:
        """Of one element, by its own Adam on the CPU."""

    def setups(self, problem: Problem) -> Iterator[Setup]:
        """All of them."""

    def held(self, problem: Problem, setup: Setup) -> Held:
        """Bytes beside activations."""

    def traffic(self, problem: Problem, setup: Setup) -> Traffic:
        """Bytes of a step."""


@dataclass(frozen=True)
class Priced:
    """A setup with its bytes and seconds."""

    setup: Setup
    held: Held
    gpu_peak_bytes: int
    gpu_upper_bytes: int
    gpu_phases: dict[str, int]
    timeline: Timeline

    @property
    def rank(self) -> tuple[float, int, int, int, int]:
        """The smaller the better."""
        way, sharding = self.setup.family.way, self.setup.family.sharding
        return (
            float(rounded(self.timeline.seconds)),
            self.setup.depth,
            way.recomputed_blocks,
            -way.micro_batch_size,
            sharding.zero_stage,
        )

    def shortage(self, problem: Problem) -> dict[Tier, int]:
        """Bytes that a tier is short of; empty where it fits."""
        short = {
            Tier.GPU: self.gpu_upper_bytes - problem.budget.gpu_bytes,
            Tier.HOST: self.held.host_peak_bytes - problem.budget.host_bytes,
            Tier.NVME: self.held.nvme_bytes - problem.budget.nvme_bytes,
        }
        return {tier: size for tier, size in short.items() if size > 0}


def families_of(problem: Problem) -> Iterator[Family]:
    """What these engines' users can say in a configuration: all blocks are recomputed or none, the loss is whole."""
    for family in problem.families():
        way = family.way
        whole = way.recomputed_blocks in (0, len(problem.profile.blocks))
        if whole and way.loss_chunks == 1 and way.checkpoints is Tier.GPU:
            yield family


def search_setups(problem: Problem, engine: WholeEngine) -> list[Priced]:
    """All setups that fit, best first."""
    return fitting(problem, price_all(problem, engine))


def fitting(problem: Problem, priced: Sequence[Priced]) -> list[Priced]:
    """Those that fit, best first."""
    return sorted((p for p in priced if not p.shortage(problem)), key=lambda p: p.rank)


def price_all(problem: Problem, engine: WholeEngine) -> list[Priced]:
    """Every setup, whether it fits or not. What does not depend on the pass is worked out once."""
    known: dict[object, tuple[Held, Traffic]] = {}
    found = []
    for setup in engine.setups(problem):
        family = setup.family
        key = (family.sharding, family.micro_batches, setup.buckets, setup.parameters, setup.optimizer,
               setup.gpu_update_share)  # fmt: skip
        if key not in known:
            known[key] = engine.held(problem, setup), engine.traffic(problem, setup)
        found.append(price(problem, setup, *known[key], engine.update_seconds))
    return found


def price(problem: Problem, setup: Setup, held: Held, traffic: Traffic, update_seconds: float) -> Priced:
    """The bytes and seconds of one setup."""
    activations = problem.activations(setup.family.way)
    before = [size for name, size in activations.phase_bytes.items() if name != BACKWARD]
    passing = {
        ATTACH: 0,
        FORWARD: max(before, default=activations.peak_bytes),
        BACKWARD: activations.phase_bytes.get(BACKWARD, activations.peak_bytes),
        STEP: 0,
    }
    phases = {phase: held.gpu[phase] + passing[phase] for phase in PHASES}
    margin = activations.upper_bytes - activations.peak_bytes
    upper = max(int(held.gpu[p] * HELD_MARGIN) + passing[p] for p in PHASES) + max(
        margin, FIXED_MARGIN_BYTES[problem.device]
    )
    return Priced(setup, held, max(phases.values()), upper, phases, _timeline(problem, setup, traffic, update_seconds))


def _timeline(problem: Problem, setup: Setup, traffic: Traffic, update_seconds: float) -> Timeline:
    rates, family = problem.rates, setup.family
    passes = problem.passes(family.way)
    columns = (passes.by_unit.sum(axis=0) + passes.rest) * family.micro_batches
    up, down = (curve.at(setup.buckets.gather_elements * 2) for curve in (rates.host_to_device, rates.device_to_host))
    duplex = rates.duplex_share if traffic.h2d_backward_bytes and traffic.d2h_backward_bytes else 1.0
    # Shards of a node are gathered there for backward; forward's, and all gradients, come from everywhere.
    within, network = (
        family.sharding.network_bytes_per_second(setup.buckets.reduce_elements * 2, rates, everywhere=everywhere)
        for everywhere in (False, True)
    )
    gathers = traffic.gather_bytes / network
    again = setup.family.sharding.zero_stage == 3
    ranks = problem.gpus_per_node
    forward = {
        "compute": float(max(columns[FORWARD_COLUMN], columns[FORWARD_ISSUE])),
        "host_to_device": traffic.h2d_forward_bytes / up,
        "collective": gathers / 2 if again else 0.0,
    }
    backward = {
        "compute": float(max(columns[BACKWARD_COLUMN], columns[BACKWARD_ISSUE])),
        "host_to_device": traffic.h2d_backward_bytes / up / duplex,
        "device_to_host": traffic.d2h_backward_bytes / down / duplex,
        "collective": (traffic.gather_bytes / 2 / within if again else 0.0) + traffic.reduce_bytes / network,
    }
    read = traffic.nvme_read_bytes * ranks / rates.nvme_read_bytes_per_second
    written = traffic.nvme_write_bytes * ranks / rates.nvme_write_bytes_per_second
    update = {
        "compute": traffic.gpu_update_elements * rates.gpu_update_seconds[problem.precision],
        "nvme": read + written,
        "cpu_update": traffic.cpu_update_elements * update_seconds * ranks,
        "device_to_host": traffic.d2h_step_bytes / down,
        "host_to_device": traffic.h2d_step_bytes / up,
        "collective": 0.0 if again else gathers,
    }
    spans: list[Span] = []
    now = _together(spans, 0.0, "forward", forward)
    now = _together(spans, now, "backward", backward)
    for lane, seconds in update.items():  # one after another
        now = _together(spans, now, "update", {lane: seconds})
    return Timeline(now, tuple(spans))


def _together(spans: list[Span], start: float, label: str, lanes: dict[str, float]) -> float:
    """Lanes that work beside each other; returns when the last is done."""
    spans += [Span(lane, label, start, start + seconds) for lane, seconds in lanes.items() if seconds > 0]
    return start + max(lanes.values())


def least_short(problem: Problem, priced: Sequence[Priced]) -> Priced:
    """Of setups that do not fit the one that is short of the least."""
    return min(priced, key=lambda p: sum(p.shortage(problem).values()))
