"""Why a plan is what it is, and why the others were not taken: sentences with numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from memplan.activations import activations_of, largest_batch
from memplan.candidates import Candidate, FamilySearch, best_of
from memplan.formatting import format_bytes, format_seconds
from memplan.machine import Machine
from memplan.memory import RESIDENT, Counts
from memplan.problem import Family, Problem, profiled_optimizer
from offload.plan import Alternative, MomentFormat, Prediction, Target, Tier
from offload.residency import streamed_slot_bytes

FEWEST_ALTERNATIVES, MOST_ALTERNATIVES = 3, 5


def reasons_for(problem: Problem, best: Candidate, expected: Prediction, machine: Machine) -> tuple[str, ...]:
    """One sentence a decision; ``expected`` is the prediction of ``best``."""
    search, context = FamilySearch(problem, best.family, best.buckets), machine.context_bytes
    said = [
        _placement_reason(problem, best, search),
        f"On the GPU tier at most {format_bytes(expected.gpu_upper_bytes)} are expected, of "
        f"{format_bytes(problem.budget.gpu_bytes)}: {format_bytes(int(search.tables.gpu_bytes(best.counts)))} of model "
        "state, the rest activations and a margin."
        + (f" The driver's context takes {format_bytes(context)} beside that." if context else ""),
        *_recompute_reason(problem, best),
        _batch_reason(problem, best),
    ]
    if best.counts.nvme_state:
        said.append(
            f"The host tier of {format_bytes(problem.budget.host_bytes)} has no room for more, so the optimizer state "
            f"of {best.counts.nvme_state} units goes to NVMe"
            + (f", and the weights of {best.counts.nvme_parameters}." if best.counts.nvme_parameters else ".")
        )
    said += _update_reason(problem, best)
    said += _start_reason(problem, expected)
    said += [step_reason(best.seconds, expected.lane_seconds), problem.rates.source]
    if best.counts.nvme_state and machine.disk is not None and machine.disk.trouble:
        read, written = problem.rates.nvme_read_bytes_per_second, problem.rates.nvme_write_bytes_per_second
        said.append(f"{machine.disk.trouble}: it reads {read / 1e9:.2f} GB/s and writes {written / 1e9:.2f} GB/s.")
    if machine.memlock_bytes is not None and expected.pinned_bytes > machine.memlock_bytes:
        said.append(
            f"{format_bytes(expected.pinned_bytes)} of host memory will be pinned, over this user's memory-lock limit "
            f"of {format_bytes(machine.memlock_bytes)}; if pinning is refused, raise it (ulimit -l unlimited)."
        )
    trained_with = problem.form.optimizer
    if profiled_optimizer(problem.profile) is not trained_with:
        said.append(f"The profile was made with {problem.profile.optimizer}; the plan trains with {trained_with}.")
    if problem.form.moments is not MomentFormat.FP32:
        said.append(
            f"Moments are stored in {problem.form.moments}, as was asked for: training makes other numbers than with "
            "moments in fp32. The seconds of such updates are rough."
        )
    return tuple(said)


def alternatives_to(problem: Problem, found: Sequence[Candidate]) -> tuple[Alternative, ...]:
    """The best plan's neighbours in each direction: nothing offloaded, recompute, micro-batch, stage, loss."""
    best = found[0]
    by_family = {candidate.family: candidate for candidate in found}
    near = _neighbours(problem, best.family)
    rows = [_resident(problem, best)] if best.counts.state else []
    for family in near[: MOST_ALTERNATIVES - len(rows)]:
        candidate = by_family.get(family) or best_of(problem, family, best.buckets.update_elements)
        rows.append(_misfit(problem, family, best) if candidate is None else _slower(problem, candidate, best))
    others = [c for c in found if c.family != best.family and c.family not in near]
    rows += [_slower(problem, c, best) for c in others[: max(0, FEWEST_ALTERNATIVES - len(rows))]]
    return tuple(rows)


def describe_family(problem: Problem, family: Family) -> str:
    """Stage, batch, recompute and loss. On one GPU memplan's engine has no stages; others offload by them."""
    way, sharding = family.way, family.sharding
    parts = []
    if problem.gpus > 1 or problem.target is not Target.MEMPLAN:
        parts.append(f"ZeRO stage {sharding.zero_stage}" + (" within each node" if sharding.shard_gpus else ""))
    parts.append(f"micro-batch {way.micro_batch_size} x {family.micro_batches}")
    again, blocks = way.recomputed_blocks, len(problem.profile.blocks)
    parts.append("no recompute" if not again else "recompute" if again == blocks else f"recompute {again} of {blocks}")
    if way.checkpoints is Tier.HOST:
        parts[-1] += ", checkpoints on host"
    if way.loss_chunks > 1:
        parts.append(f"loss in {way.loss_chunks} pieces")
    return ", ".join(parts)


def step_reason(seconds: float, busy_seconds: Mapping[str, float]) -> str:
    """How long a step takes, and the lane that bounds it."""
    lane = max(busy_seconds, key=busy_seconds.__getitem__)
    return (
        f"A step is expected to take {format_seconds(seconds)}; the busiest lane is {lane.replace('_', ' ')}, "
        f"with {format_seconds(busy_seconds[lane])}."
    )


def _placement_reason(problem: Problem, best: Candidate, search: FamilySearch) -> str:
    resident = search.gpu_upper_bytes(RESIDENT)
    budget = format_bytes(problem.budget.gpu_bytes)
    if not best.counts.state:
        return f"Everything stays on the GPU tier: {format_bytes(resident)} of {budget}, and nothing is gained by less."
    return (
        f"With everything on the GPU tier {format_bytes(resident)} would be needed of {budget}. What fits stays; "
        f"{_counts_text(problem, best.counts)}."
    )


def _start_reason(problem: Problem, expected: Prediction) -> list[str]:
    """Why the host needs more for a while than the plan keeps there, and why a model is not built whole."""
    said, processes = [], problem.gpus_per_node
    if problem.on_meta and problem.device == "cuda":
        built = format_bytes(processes * problem.start.model_bytes)
        which = "The model takes" if processes == 1 else f"The models of {processes} processes take"
        said.append(
            f"{which} {built} of a node's memory as they are built in fp32, which with a unit on its way is over the "
            f"{format_bytes(problem.budget.host_bytes)} that training may hold there: build them under "
            "memplan.on_meta(), as memplan train does, and they are made unit by unit."
        )
    if expected.host_upper_bytes > expected.host_bytes:
        how = "made unit by unit" if problem.on_meta else "built and taken into the tiers"
        each = "the model is" if processes == 1 else f"each of {processes} processes has its model"
        said.append(
            f"At the start the host holds up to {format_bytes(expected.host_upper_bytes)}, while {each} {how}; "
            f"then {format_bytes(expected.host_bytes)}."
        )
    return said


def _update_reason(problem: Problem, best: Candidate) -> list[str]:
    share = problem.gpu_update_share
    if not share or best.counts.state == best.counts.nvme_state:
        return []
    slots, pieces = best.buckets.update_slots, best.buckets.update_elements
    return [
        f"The GPU makes {share:.0%} of the update of state on the host, which streams through "
        f"{format_bytes(slots * streamed_slot_bytes(pieces, problem.form))} of its memory ({slots} slots) while the "
        "CPU makes the rest; the engine moves that by what its first steps take."
    ]


def _recompute_reason(problem: Problem, best: Candidate) -> list[str]:
    way, blocks = best.family.way, len(problem.profile.blocks)
    plain = [replace(way, recomputed_blocks=n, checkpoints=Tier.GPU) for n in (0, blocks)]
    kept, again = (activations_of(problem.profile, other, problem.device) for other in plain)
    here = problem.activations(way)
    if kept is None or again is None or not blocks:
        return []
    full, least = format_bytes(kept.peak_bytes), format_bytes(again.peak_bytes)
    said = f"Nothing is recomputed: activations take {full} where recompute of all blocks would leave {least}."
    if way.recomputed_blocks:
        which = "All" if way.recomputed_blocks == blocks else f"The first {way.recomputed_blocks} of {blocks}"
        said = (
            f"{which} blocks are recomputed in backward: activations take {format_bytes(here.peak_bytes)}, not {full}."
        )
    if way.checkpoints is Tier.HOST:
        said += f" Their inputs wait in host memory, {format_bytes(here.host_bytes)}"
        said += " for each GPU." if problem.gpus_per_node > 1 else "."
    if way.loss_chunks > 1:
        said += f" Head and loss are computed in {way.loss_chunks} pieces, so that the logits never exist as a whole."
    return [said]


def _batch_reason(problem: Problem, best: Candidate) -> str:
    family = best.family
    profiled = largest_batch(problem.profile)
    text = (
        f"The batch of {problem.gpu_batch_size * problem.gpus} is {problem.gpus} GPU(s) x micro-batch "
        f"{family.way.micro_batch_size} x {family.micro_batches} accumulated"
    )
    if profiled < problem.gpu_batch_size:
        return f"{text}; the profile knows micro-batches up to {profiled}: profile a larger batch to consider others."
    return f"{text}."


def _described(problem: Problem, family: Family, counts: Counts) -> str:
    return f"{describe_family(problem, family)}; {_counts_text(problem, counts)}"


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


def _neighbours(problem: Problem, family: Family) -> list[Family]:
    """The families one decision away, those of other stages last."""
    everything = set(problem.families())
    way, blocks = family.way, len(problem.profile.blocks)
    wanted = [
        replace(way, recomputed_blocks=n, checkpoints=Tier.GPU) for n in (0, blocks) if n != way.recomputed_blocks
    ]
    wanted += [replace(way, loss_chunks=n) for n in {p.loss_chunks for p in problem.profile.activations}]
    micros = problem.micro_batch_sizes()
    at = micros.index(way.micro_batch_size)
    wanted += [replace(way, micro_batch_size=m) for m in (*micros[at + 1 : at + 2], *micros[max(0, at - 1) : at])]
    near = [replace(family, way=w, micro_batches=problem.gpu_batch_size // w.micro_batch_size) for w in wanted]
    near += [replace(family, sharding=sharding) for sharding in problem.shardings()]
    return [f for f in dict.fromkeys(near) if f in everything and f != family]


def _resident(problem: Problem, best: Candidate) -> Alternative:
    search = FamilySearch(problem, best.family, best.buckets)
    short = search.gpu_upper_bytes(RESIDENT) - problem.budget.gpu_bytes
    return Alternative(
        description=_described(problem, best.family, RESIDENT),
        step_seconds=search.seconds_of(RESIDENT),
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
    elif percent <= -0.05 and _moves_more(candidate, best):
        why_not = f"faster by {-percent:.1f} %, which is less than predictions tell, but more leaves the GPU"
    elif _moves_more(candidate, best):
        why_not = "as fast, but more leaves the GPU"
    else:
        why_not = "as fast, but of two equals the one with less recompute, larger micro-batches, less sharding is taken"
    return Alternative(
        description=_described(problem, candidate.family, candidate.counts),
        step_seconds=candidate.seconds,
        gpu_peak_bytes=search.gpu_peak_bytes(candidate.counts),
        host_bytes=search.host_bytes(candidate.counts),
        nvme_bytes=search.nvme_bytes(candidate.counts),
        why_not=why_not,
    )


def _moves_more(candidate: Candidate, best: Candidate) -> bool:
    away = [(c.offloaded_bytes, c.family.way.checkpoints is Tier.HOST) for c in (candidate, best)]
    return away[0] > away[1]


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
        description=_described(problem, family, counts),
        step_seconds=search.seconds_of(counts),
        gpu_peak_bytes=search.gpu_peak_bytes(counts),
        host_bytes=search.host_bytes(counts),
        nvme_bytes=0,
        why_not=why_not,
    )
