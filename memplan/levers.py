"""What would make a plan's step faster: one thing of the machine or the batch changed at a time, and planned again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memplan.candidates import FamilySearch, best_of, floor_of, least_of
from memplan.engines.plans import ENGINES
from memplan.engines.whole import WholeEngine, price_all, search_setups
from memplan.formatting import format_bytes, format_seconds
from memplan.machine import Machine
from memplan.memory import RESIDENT
from memplan.planned import batch_size_of, family_of
from memplan.problem import Problem
from memplan.rates import Rates
from memplan.search import problem_of
from memplan.sharding import ASSUMED_INTER_NODE_BYTES_PER_SECOND
from offload.plan import MomentFormat, OptimizerKind, Plan, Target
from profiler.profile import ActivationPoint, ModelProfile

LEAST_SPEEDUP = 1.03
"""What gains less is not worth a sentence: rates are not known that well."""
MOST_LEVERS = 6
GPUS_OF_A_NODE = 8
"""More GPUs than that come in another node."""
MORE_GPU_BYTES = 8 << 30
WHERE = {"gpu": "GPU memory", "host": "host memory"}


@dataclass(frozen=True)
class Lever:
    """One change, and what the best plan would then do."""

    change: str
    """As it follows "with"."""
    speedup: float
    """Samples a second, over those of the plan."""
    step_seconds: float
    larger_batch: bool = False
    """A step is then of more samples."""

    @property
    def sentence(self) -> str:
        """``with 16 GiB more host memory: 1.4 x (0.82 s a step)``."""
        what = " the samples a second" if self.larger_batch else ""
        digits = 0 if self.speedup >= 99.5 else 1 if self.speedup >= 1.095 else 2
        return f"with {self.change}: {self.speedup:.{digits}f} x{what} ({format_seconds(self.step_seconds)} a step)"


@dataclass(frozen=True)
class _Case:
    """What is planned for."""

    profile: ModelProfile
    machine: Machine
    rates: Rates
    batch_size: int
    target: Target
    optimizer: OptimizerKind
    moments: MomentFormat
    engine: WholeEngine | None
    """One that moves whole tiers; ``None`` for memplan's."""

    @property
    def problem(self) -> Problem:
        """What is to be searched: a new one each time, since what a problem knows depends on all of this."""
        wishes = None, self.target, self.optimizer, self.moments
        return problem_of(self.profile, self.machine, self.rates, self.batch_size, *wishes)

    def on(self, **machine: Any) -> "_Case":
        """The same on a machine that differs in these."""
        return replace(self, machine=replace(self.machine, **machine))


Trials = Sequence[tuple[str, _Case]]
"""Changes of one kind with the case that follows, the smallest first."""


def levers(
    profile: ModelProfile, machine: Machine, rates: Rates, plan: Plan, engine: WholeEngine | None = None
) -> tuple[Lever, ...]:
    """What would gain at least 3 %, best first, each the best plan of a machine that differs in one thing.

    ``profile``, ``machine`` and ``rates`` are those that the plan was made with, and ``engine`` too, by default the
    target's.
    """
    before, size = plan.prediction.step_seconds, batch_size_of(plan)
    if before is None:
        return ()
    found = []
    case = _Case(
        profile, machine, rates, size, plan.target, plan.optimizer, plan.moments, engine or ENGINES.get(plan.target)
    )
    for trials in _kinds(case, plan):
        sample_seconds = before / size
        for change, case in trials:
            limit = sample_seconds / LEAST_SPEEDUP * case.batch_size
            seconds = fastest_seconds(case.problem, plan.buckets.update_elements, limit, case.engine)
            if seconds is not None:
                sample_seconds = seconds / case.batch_size
                found.append(Lever(change, before / size / sample_seconds, seconds, case.batch_size > size))
    return tuple(sorted(found, key=lambda lever: -lever.speedup)[:MOST_LEVERS])


def fastest_seconds(
    problem: Problem, update_elements: int, limit: float = float("inf"), engine: WholeEngine | None = None
) -> float | None:
    """Seconds of the best candidate's step; ``None`` where none stays below ``limit``.

    ``update_elements`` is the chunk of an update, which memplan's engine alone is searched with.
    """
    if problem.target is not Target.MEMPLAN:
        setups = search_setups(problem, engine or ENGINES[problem.target])
        return setups[0].timeline.seconds if setups and setups[0].timeline.seconds < limit else None
    floors = {
        family: floor_of(problem, family, update_elements)
        for family in problem.families()
        if least_of(problem, family) < limit
    }
    best = None
    for family in sorted(floors, key=floors.__getitem__):
        if floors[family] >= limit:
            break
        candidate = best_of(problem, family, update_elements)
        if candidate is not None and candidate.seconds < limit:
            best = limit = candidate.seconds
    return best


def buyable(size: int) -> int:
    """The smallest size that is no less and that memory comes in: a power of two, or three halves of one."""
    power = 1 << max(0, (size - 1).bit_length())
    return power // 4 * 3 if power // 4 * 3 >= size else power


def _kinds(case: _Case, plan: Plan) -> Iterator[Trials]:
    """Every change worth trying."""
    yield _more_gpu_memory(case, plan)
    yield _more_host_memory(case, plan)
    for change, profile, rates in _faster_parts(case, plan):
        yield [(change, replace(case, profile=profile, rates=rates))]
    if case.machine.gpus > 1:
        yield [_faster_links(case)]
    if case.machine.gpus > 1 or case.machine.described:
        yield [_more_gpus(case)]
    yield [(f"a batch of {2 * case.batch_size}", replace(case, batch_size=2 * case.batch_size))]


def _more_gpu_memory(case: _Case, plan: Plan) -> Trials:
    """A little more, and as much as keeps everything on the GPU where that is at most twice of what is there."""
    have = case.machine.gpu_bytes
    short = _resident_bytes(case, plan) - have
    sizes = {min(MORE_GPU_BYTES, buyable(have // 4)), *((buyable(short),) if 0 < short <= have else ())}
    return [(_more(n, "gpu", case), case.on(gpu_bytes=have + n)) for n in sorted(sizes)]


def _resident_bytes(case: _Case, plan: Plan) -> int:
    """What a GPU must have for nothing to be anywhere else."""
    problem = case.problem
    if case.engine is None:
        return FamilySearch(problem, family_of(plan), plan.buckets).gpu_upper_bytes(RESIDENT)
    setups = price_all(problem, case.engine)
    return min(priced.gpu_upper_bytes for priced in setups if not priced.setup.depth)


def _more_host_memory(case: _Case, plan: Plan) -> Trials:
    """A quarter more, and as much as needs no disk."""
    have, on_disk = case.machine.host_bytes, plan.prediction.nvme_bytes
    sizes = {buyable(size) for size in (have // 4, on_disk) if size}
    return [(_more(n, "host", case), case.on(host_bytes=have + n)) for n in sorted(sizes)]


def _more(size: int, tier: str, case: _Case) -> str:
    """Where the CPU computes, both tiers are budgets of the same memory."""
    where = f"in the {tier} tier" if case.machine.device == "cpu" else WHERE[tier]
    number, unit = format_bytes(size).split()
    return f"{float(number):g} {unit} more {where}"


def _faster_parts(case: _Case, plan: Plan) -> Iterator[tuple[str, ModelProfile, Rates]]:
    """Each part of the machine that the plan uses, twice as fast."""
    profile, r = case.profile, case.rates
    halved = {p: seconds / 2 for p, seconds in r.cpu_update_seconds.items()}
    doubled = {p: 2 * flops for p, flops in r.compute_flops_per_second.items()}
    if case.machine.device == "cpu":
        rates = replace(r, compute_flops_per_second=doubled, cpu_update_seconds=halved, call_seconds=r.call_seconds / 2)
        yield "a CPU twice as fast", _twice_as_fast(profile), rates
    else:
        yield "a GPU that computes twice as fast", _twice_as_fast(profile), replace(r, compute_flops_per_second=doubled)
        links = {name: getattr(r, name).scaled(2) for name in ("host_to_device", "device_to_host")}
        yield "a link to the GPU twice as fast", profile, replace(r, **links)
        if case.target is Target.MEMPLAN:  # the others' own updates are constants of theirs
            yield "an update on the CPU twice as fast", profile, replace(r, cpu_update_seconds=halved)
    if plan.prediction.nvme_bytes:
        read, write = 2 * r.nvme_read_bytes_per_second, 2 * r.nvme_write_bytes_per_second
        rates = replace(r, nvme_read_bytes_per_second=read, nvme_write_bytes_per_second=write)
        yield "a disk twice as fast", profile, rates


def _faster_links(case: _Case) -> tuple[str, _Case]:
    """Within nodes and between them."""
    across = 2 * (case.problem.rates.inter_node_bytes_per_second or ASSUMED_INTER_NODE_BYTES_PER_SECOND)
    rates = replace(case.rates, collective=case.rates.collective.scaled(2))
    faster = replace(case.on(inter_node_bytes_per_second=across), rates=rates)
    return "links between the GPUs twice as fast", faster


def _twice_as_fast(profile: ModelProfile) -> ModelProfile:
    """The profile as of a device whose kernels take half the time; what the CPU takes to issue them stays."""

    def faster(point: ActivationPoint) -> ActivationPoint:
        modules = (
            replace(m, forward_seconds=m.forward_seconds / 2, backward_seconds=m.backward_seconds / 2)
            for m in point.modules
        )
        return replace(point, modules=tuple(modules))

    return replace(profile, activations=tuple(faster(point) for point in profile.activations))


def _more_gpus(case: _Case) -> tuple[str, _Case]:
    """Twice as many; the batch grows with them where it can not be divided further."""
    m, batch = case.machine, case.batch_size
    gpus = 2 * m.gpus
    nodes = m.nodes if m.nodes == 1 and gpus <= GPUS_OF_A_NODE else 2 * m.nodes
    change = f"{gpus} GPUs" if nodes == 1 else f"{nodes} nodes of {gpus // nodes} GPUs"
    if nodes > 1 and case.problem.rates.inter_node_bytes_per_second is None and m.nodes == 1:
        change += f" that are joined at {ASSUMED_INTER_NODE_BYTES_PER_SECOND / 1e9:g} GB/s a GPU"
    if batch % gpus:
        batch *= 2
        change += f" and a batch of {batch}"
    return change, replace(case.on(gpus=gpus, nodes=nodes), batch_size=batch)
