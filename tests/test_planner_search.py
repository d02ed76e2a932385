import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memplan.audit import audit
from memplan.candidates import PREFETCH_DEPTHS, FamilySearch, rounded, update_sizes
from memplan.errors import NothingFits, PlanningError
from memplan.memory import Counts
from memplan.search import plan, problem_of
from memplan.sizes import parse_bytes
from memplan.timing import lanes, step_seconds
from memplan.units import units_of
from offload.plan import Buckets, Placement, Plan, Precision, Tier
from offload.residency import footprint
from tests.synthetic_profiles import RATES, cases, machine_of, transformer

SLOW = settings(deadline=None, max_examples=60)


def every_count(units: int):
    for state in range(units + 1):
        for gradients, parameters in itertools.product(range(state + 1), repeat=2):
            yield Counts(state, gradients, parameters)
            for nvme_state in range(1, state + 1):
                yield Counts(state, gradients, parameters, nvme_state)
            for nvme_parameters in range(1, parameters + 1):
                yield Counts(state, gradients, parameters, state, nvme_parameters)


def brute_force(profile, machine, batch_size):
    """The best seconds of every count of every family, priced one by one."""
    problem = problem_of(profile, machine, RATES, batch_size, None)
    for size in update_sizes(problem):
        best = None
        for family, depth in itertools.product(problem.families(), PREFETCH_DEPTHS):
            search = FamilySearch(problem, family, Buckets(prefetch_units=depth, update_elements=size))
            for counts in every_count(len(problem.shapes)):
                t = search.tables
                if search.gpu_upper_bytes(counts) > machine.gpu_bytes:
                    continue
                if t.host_bytes(counts) > machine.host_bytes // machine.gpus:
                    continue
                if t.nvme_bytes(counts) > machine.nvme_bytes // machine.gpus:
                    continue
                seconds = float(rounded(step_seconds(lanes(t, counts, search.work, RATES), machine.device)))
                key = (seconds, int(t.offloaded_bytes(counts)))
                best = key if best is None or key < best else best
        if best is not None:
            return best
    return None


@given(st.sampled_from([1, 1, 2]).flatmap(lambda gpus: cases(gpus, most_blocks=3)), st.sampled_from([2, 4, 6]))
@settings(deadline=None, max_examples=25)
def test_the_search_finds_what_brute_force_finds(case, batch_size):
    profile, machine = case
    expected = brute_force(profile, machine, batch_size)
    if expected is None:
        with pytest.raises(NothingFits):
            plan(profile, machine, RATES, batch_size=batch_size)
    else:
        found = plan(profile, machine, RATES, batch_size=batch_size)
        assert float(rounded(found.prediction.step_seconds)) == expected[0]


LEGAL = [
    (p, g, o)
    for p, g, o in itertools.product(Tier, repeat=3)
    if g is not Tier.NVME and o.depth >= p.depth and not (o is Tier.GPU and g is not Tier.GPU)
]


def seconds_of_placements(problem, family, placements):
    """The step's seconds from the placements of equal units in any order, traffic counted unit by unit."""
    work, rates, k = problem.work(family), problem.rates, family.micro_batches
    (elements,) = {s.elements for s in problem.shapes}
    w = problem.precision.weight_bytes
    away = sum(p is not Tier.GPU for p, _, _ in placements)
    slots = min(away, 2)
    h2d = (2 * away - slots) * elements * w * k
    d2h = nvme = cpu = 0.0
    for p, g, o in placements:
        if g is not Tier.GPU:
            d2h += elements * w * k
            h2d += elements * w * (k - 1)
        elif o is not Tier.GPU:
            d2h += elements * w
        if o is not Tier.GPU:
            cpu += elements * rates.cpu_update_seconds_per_element
            h2d += elements * w if p is Tier.GPU else 0
    both = 1 / rates.nvme_read_bytes_per_second + 1 / rates.nvme_write_bytes_per_second
    state = 10 if w == 2 else 8
    blocks = lambda n: -(-n // 4096) * 4096  # noqa: E731
    update_io = both * sum(
        (blocks(elements * state) if o is Tier.NVME else 0) + (blocks(elements * w) if p is Tier.NVME else 0)
        for p, _, o in placements
    )
    read = sum(p is Tier.NVME for p, _, _ in placements)
    nvme = update_io + (2 * read - min(read, 2)) * elements * w * k / rates.nvme_read_bytes_per_second
    returned = sum(elements * w for p, _, o in placements if p is Tier.GPU and o is not Tier.GPU)
    late = sum(elements * w for _, g, o in placements if g is Tier.GPU and o is not Tier.GPU)
    flops = work.micro_batch_flops / rates.compute_flops_per_second[problem.precision]
    compute = flops * k + len(placements) * elements * rates.gpu_update_seconds_per_element
    to_device, to_host = h2d / rates.host_to_device_bytes_per_second, d2h / rates.device_to_host_bytes_per_second
    update = max(
        cpu,
        update_io,
        returned / rates.host_to_device_bytes_per_second,
        late / rates.device_to_host_bytes_per_second,
    )
    longest = max(compute + max(0.0, update - flops * work.forward_share), to_device, to_host, nvme, cpu)
    return longest + (elements * w / rates.host_to_device_bytes_per_second if away else 0)


@given(
    st.integers(100, 200_000),
    st.sampled_from(["fp32", "bf16"]),
    st.integers(0, 10**7),
    st.floats(0.3, 1.1),
    st.floats(0.0, 1.3),
    st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_with_equal_units_no_placement_of_any_kind_is_faster(elements, precision, flops, gpu, host, disk):
    """Every tier for everything of every unit, but that weights go to disk only when all state off the GPU is there."""
    profile = transformer(
        3, elements, 0, 0, precision=precision, flops=flops, activation=1000, batch_size=2, recompute=False
    )
    total = 3 * elements * (14 if precision == "bf16" else 16)
    machine = machine_of(int(gpu * total) + (64 << 20), int(host * total), total * 3 if disk else 0, device="cuda")
    problem = problem_of(profile, machine, RATES, 2, None)
    size = next(update_sizes(problem))
    best = None
    for family in problem.families():
        search = FamilySearch(problem, family, Buckets(prefetch_units=1, update_elements=size))
        names = [s.name for s in problem.shapes]
        for combination in itertools.product(LEGAL, repeat=3):
            on_disk = any(p is Tier.NVME for p, _, _ in combination)
            if on_disk and any(o is Tier.HOST for _, _, o in combination):
                continue
            placements = [Placement(name, *tiers) for name, tiers in zip(names, combination, strict=True)]
            bytes_ = footprint(problem.shapes, placements, search.buckets, problem.precision)
            upper = bytes_.gpu_bytes + search.activations.upper_bytes
            if upper > machine.gpu_bytes or bytes_.host_bytes > machine.host_bytes:
                continue
            if bytes_.nvme_bytes > machine.nvme_bytes:
                continue
            seconds = seconds_of_placements(problem, family, combination)
            best = seconds if best is None else min(best, seconds)
    assume(best is not None)
    found = plan(profile, machine, RATES, batch_size=2)
    assume(found.buckets.update_elements == size)
    assert found.prediction.step_seconds <= best * (1 + 1e-6)


@given(cases(), st.sampled_from([1, 6, 8]))
@SLOW
def test_a_plan_fits_its_budget_and_passes_the_audit(case, batch_size):
    profile, machine = case
    try:
        found = plan(profile, machine, RATES, batch_size=batch_size)
    except NothingFits:
        assume(False)
    shapes = units_of(profile)
    held = footprint(shapes, found.placements, found.buckets, found.precision)
    assert held.gpu_bytes <= found.prediction.gpu_peak_bytes <= machine.gpu_bytes
    assert held.host_bytes == found.prediction.host_bytes <= machine.host_bytes
    assert held.nvme_bytes == found.prediction.nvme_bytes <= machine.nvme_bytes
    assert found.micro_batch_size * found.gradient_accumulation_steps == batch_size
    assert audit(found, shapes) == []
    if any(p.parameters is Tier.NVME for p in found.placements):
        assert all(p.optimizer is not Tier.HOST for p in found.placements)


@given(cases(), st.sampled_from([1, 8]))
@SLOW
def test_the_smallest_change_that_is_named_makes_it_fit(case, batch_size):
    profile, machine = case
    try:
        plan(profile, machine, RATES, batch_size=batch_size)
    except NothingFits as error:
        short = error
    else:
        assume(False)
    assert short.short_bytes > 0
    for change in short.changes:
        words = change.split()
        changed = replace(machine, nvme_dir=Path("/swap"))
        for option, size in zip(words[::2], words[1::2], strict=True):
            tier = {"--gpu-memory": "gpu", "--host-memory": "host", "--nvme": "nvme"}[option]
            wanted = parse_bytes(size.removeprefix("DIR:"))
            changed = replace(changed, **{f"{tier}_bytes": wanted})
        plan(profile, changed, RATES, batch_size=batch_size)
        grain = 1 << 10 if wanted < 1 << 23 else 1 << 20  # what the size was rounded up to
        with pytest.raises(NothingFits):
            plan(profile, replace(changed, **{f"{tier}_bytes": wanted - grain}), RATES, batch_size=batch_size)


@given(cases(gpus=4))
@SLOW
def test_plans_for_several_gpus_keep_every_rank_inside_its_share(case):
    profile, machine = case
    try:
        found = plan(profile, machine, RATES, batch_size=8)
    except NothingFits:
        assume(False)
    assert found.prediction.gpu_peak_bytes <= machine.gpu_bytes
    assert found.prediction.host_bytes <= machine.host_bytes
    assert found.prediction.nvme_bytes <= machine.nvme_bytes
    assert found.micro_batch_size * found.gradient_accumulation_steps * 4 == 8


@given(cases())
@SLOW
def test_a_plan_survives_its_json(case):
    profile, machine = case
    try:
        found = plan(profile, machine, RATES, batch_size=4)
    except NothingFits:
        assume(False)
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_fits_is_never_offloaded():
    found = plan(transformer(4), machine_of(1 << 30, 1 << 30, 1 << 30, device="cuda"), RATES, batch_size=8)
    assert {t for p in found.placements for t in (p.parameters, p.gradients, p.optimizer)} == {Tier.GPU}
    assert found.nvme_dir is None
    assert found.recompute == ()


def test_a_host_that_is_too_small_sends_optimizer_state_to_nvme():
    profile = transformer(8, block_elements=100_000, embedding=0, activation=1000)
    ample = plan(profile, machine_of(9_500_000, 16_000_000, 1 << 30), RATES, batch_size=4)
    tight = plan(profile, machine_of(9_500_000, 4_000_000, 1 << 30), RATES, batch_size=4)
    assert Tier.NVME not in [p.optimizer for p in ample.placements]
    assert Tier.HOST in [p.optimizer for p in ample.placements]
    assert Tier.NVME in [p.optimizer for p in tight.placements]
    assert tight.nvme_dir == "/swap"


def test_runners_up_say_why_they_lost():
    found = plan(transformer(8, activation=500_000), machine_of(8_000_000, 1 << 30), RATES, batch_size=4)
    assert 3 <= len(found.alternatives) <= 5
    assert all(a.why_not for a in found.alternatives)
    assert len({a.description for a in found.alternatives}) == len(found.alternatives)
    assert any(RATES.source == reason for reason in found.reasons)


def test_wishes_that_contradict_the_profile_are_refused():
    machine = machine_of(1 << 30, 1 << 30)
    with pytest.raises(PlanningError, match="batch size is 0"):
        plan(transformer(2), machine, RATES, batch_size=0)
    with pytest.raises(PlanningError, match="divided evenly over 4 GPUs"):
        plan(transformer(2), replace(machine, gpus=4, device="cuda"), RATES, batch_size=6)
    with pytest.raises(PlanningError, match="--precision bf16"):
        plan(transformer(2), machine, RATES, batch_size=6, precision=Precision.BF16)
    with pytest.raises(PlanningError, match="activations"):
        plan(replace(transformer(2), activations=()), machine, RATES, batch_size=6)


def test_nothing_fits_names_the_tier_the_shortage_and_the_change():
    with pytest.raises(NothingFits, match=r"Nothing fits: the \w+ tier is short .*smallest change: --") as caught:
        plan(transformer(4, activation=5_000_000), machine_of(2_000_000, 1_000), RATES, batch_size=4)
    assert caught.value.tier in ("gpu", "host", "nvme")
