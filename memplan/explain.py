"""Why a plan is what it is, and why the others were not taken: sentences with numbers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from memplan.candidates import Candidate, Family, FamilySearch, Problem
from memplan.formatting import format_bytes, format_seconds
from memplan.machine import Machine
from memplan.memory import Counts
from memplan.timing import bottleneck, lanes
from offload.plan import Alternative

RESIDENT = Counts(0, 0, 0)
FEWEST_ALTERNATIVES, MOST_ALTERNATIVES = 3, 5


def reasons_for(problem: Problem, best: Candidate, machine: Machine) -> tuple[str, ...]:
    """One sentence a decision."""
    search = FamilySearch(problem, best.family, best.buckets)
    upper = search.gpu_upper_bytes(best.counts)
    said = [
        _placement_reason(problem, best, search),
        f"On the GPU tier at most {format_bytes(upper)} are expected, of {format_bytes(problem.budget.gpu_bytes)}: "
        f"{format_bytes(int(search.tables.gpu_bytes(best.counts)))} of model state, the rest activations and a margin.",
        *_recompute_reason(problem, best),
        _batch_reason(problem, best),
    ]
    if best.counts.nvme_state:
        said.append(
            f"The host tier of {format_bytes(problem.budget.host_bytes)} has no room for more, so the optimizer state "
            f"of {best.counts.nvme_state} units goes to NVMe"
            + (f", and the weights of {best.counts.nvme_parameters}." if best.counts.nvme_parameters else ".")
        )
    busy = lanes(search.tables, best.counts, search.work, problem.rates)
    said.append(
        f"A step is expected to take {format_seconds(best.seconds)}; the busiest lane is "
        f"{bottleneck(busy).replace('_', ' ')}, with {format_seconds(max(busy.busy_seconds().values()))}."
    )
    said.append(problem.rates.source)
    pinned = int(search.tables.host_bytes(best.counts)) * problem.gpus if problem.device == "cuda" else 0
    if machine.memlock_bytes is not None and pinned > machine.memlock_bytes:
        said.append(
            f"{format_bytes(pinned)} of host memory will be pinned, over this user's memory-lock limit of "
            f"{format_bytes(machine.memlock_bytes)}; if pinning is refused, raise it (ulimit -l unlimited)."
        )
    if not problem.profile.optimizer.startswith("adam"):
        said.append(f"The profile was made with {problem.profile.optimizer}; the runtime trains with AdamW.")
    return tuple(said)


def alternatives_to(problem: Problem, best: Candidate, found: Sequence[Candidate]) -> tuple[Alternative, ...]:
    """The plan's neighbours in each direction: nothing offloaded, recompute, micro-batch, stage."""
    by_family = {candidate.family: candidate for candidate in found}
    near = _neighbours(problem, best.family)
    rows = [_resident(problem, best)] if best.counts.state else []
    for family in near:
        candidate = by_family.get(family)
        rows.append(_misfit(problem, family, best) if candidate is None else _slower(problem, candidate, best))
    others = [c for c in found if c.family != best.family and c.family not in near]
    rows += [_slower(problem, c, best) for c in others[: max(0, FEWEST_ALTERNATIVES - len(rows))]]
    return tuple(rows[:MOST_ALTERNATIVES])


def describe_candidate(problem: Problem, candidate: Candidate) -> str:
    """One line: batch, stage, recompute, and what is not on the GPU."""
    return f"{_family_text(problem, candidate.family)}; {_counts_text(problem, candidate.counts)}"


def _placement_reason(problem: Problem, best: Candidate, search: FamilySearch) -> str:
    resident = search.gpu_upper_bytes(RESIDENT)
    budget = format_bytes(problem.budget.gpu_bytes)
    if not best.counts.state:
        return f"Everything stays on the GPU tier: {format_bytes(resident)} of {budget}, and nothing is gained by less."
    return (
        f"With everything on the GPU tier {format_bytes(resident)} would be needed of {budget}. What fits stays; "
        f"{_counts_text(problem, best.counts)}."
    )


def _recompute_reason(problem: Problem, best: Candidate) -> list[str]:
    kept = problem.activations(replace(best.family, recompute=False))
    again = problem.activations(replace(best.family, recompute=True))
    if kept is None or again is None:
        return []
    full, less = format_bytes(kept.peak_bytes), format_bytes(again.peak_bytes)
    if best.family.recompute:
        return [f"Blocks are recomputed in backward: activations take {less}, not {full}."]
    return [
        f"Nothing is recomputed: activations take {full} where recompute would leave {less}, "
        "at the price of another forward pass."
    ]


def _batch_reason(problem: Problem, best: Candidate) -> str:
    family = best.family
    profiled = max(p.batch_size for p in problem.profile.activations)
    text = (
        f"The batch of {problem.gpu_batch_size * problem.gpus} is {problem.gpus} GPU(s) x micro-batch "
        f"{family.micro_batch_size} x {family.micro_batches} accumulated"
    )
    if family.micro_batch_size > profiled:
        return f"{text}; activations were profiled up to a batch of {profiled} and are extrapolated."
    return f"{text}."


def _counts_text(problem: Problem, counts: Counts) -> str:
    if not counts.state:
        return "everything on gpu"
    total = len(problem.shapes)
    parts = [
        f"{what} of {off}" + (f" ({nvme} on nvme)" if nvme else "")
        for what, off, nvme in (
            ("optimizer state", counts.state, counts.nvme_state),
            ("gradients", counts.gradients, 0),
            ("parameters", counts.parameters, counts.nvme_parameters),
        )
        if off
    ]
    return f"off the gpu, of {total} units: {', '.join(parts)}"


def _family_text(problem: Problem, family: Family) -> str:
    stage = f"ZeRO stage {family.zero_stage}, " if problem.gpus > 1 else ""
    recompute = "recompute" if family.recompute else "no recompute"
    return f"{stage}micro-batch {family.micro_batch_size} x {family.micro_batches}, {recompute}"


def _neighbours(problem: Problem, family: Family) -> list[Family]:
    """The families one decision away, those of other stages last."""
    everything = list(problem.families())
    micros = sorted({f.micro_batch_size for f in everything})
    at = micros.index(family.micro_batch_size)
    near = [
        replace(family, micro_batch_size=m, micro_batches=problem.gpu_batch_size // m)
        for m in (*micros[at + 1 : at + 2], *micros[max(0, at - 1) : at])
    ]
    wanted = [replace(family, recompute=not family.recompute), *near]
    wanted += [replace(family, zero_stage=stage) for stage in range(4) if stage != family.zero_stage]
    return [f for f in wanted if f in everything]


def _resident(problem: Problem, best: Candidate) -> Alternative:
    search = FamilySearch(problem, best.family, best.buckets)
    short = search.gpu_upper_bytes(RESIDENT) - problem.budget.gpu_bytes
    return Alternative(
        description=f"{_family_text(problem, best.family)}; everything on gpu",
        step_seconds=float(search.seconds(RESIDENT)),
        gpu_peak_bytes=search.gpu_peak_bytes(RESIDENT),
        host_bytes=0,
        nvme_bytes=0,
        why_not=f"does not fit: short {format_bytes(short)} in the gpu tier",
    )


def _slower(problem: Problem, candidate: Candidate, best: Candidate) -> Alternative:
    search = FamilySearch(problem, candidate.family, candidate.buckets)
    percent = 100 * (candidate.seconds / best.seconds - 1)
    if percent >= 0.05:
        why_not = f"slower by {percent:.1f} %"
    elif candidate.offloaded_bytes > best.offloaded_bytes:
        why_not = "as fast, but more leaves the GPU"
    else:
        why_not = "as fast, but of two equals the one with less recompute, larger micro-batches, less sharding is taken"
    return Alternative(
        description=describe_candidate(problem, candidate),
        step_seconds=candidate.seconds,
        gpu_peak_bytes=search.gpu_peak_bytes(candidate.counts),
        host_bytes=int(search.tables.host_bytes(candidate.counts)) * problem.gpus,
        nvme_bytes=int(search.tables.nvme_bytes(candidate.counts)) * problem.gpus,
        why_not=why_not,
    )


def _misfit(problem: Problem, family: Family, best: Candidate) -> Alternative:
    """A family in which nothing fits, as its candidate with everything off the GPU."""
    search = FamilySearch(problem, family, replace(best.buckets, prefetch_units=1))
    n = search.tables.units
    counts = Counts(n, n, n)
    short = search.gpu_upper_bytes(counts) - problem.budget.gpu_bytes
    why_not = (
        f"does not fit: short {format_bytes(short)} in the gpu tier even with everything offloaded"
        if short > 0
        else "does not fit: what leaves the GPU is more than the host and NVMe tiers hold"
    )
    return Alternative(
        description=f"{_family_text(problem, family)}; {_counts_text(problem, counts)}",
        step_seconds=float(np.asarray(search.seconds(counts))),
        gpu_peak_bytes=search.gpu_peak_bytes(counts),
        host_bytes=int(search.tables.host_bytes(counts)) * problem.gpus,
        nvme_bytes=0,
        why_not=why_not,
    )
