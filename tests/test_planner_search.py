import itertools
import json
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memplan import candidates
from memplan.audit import audit
from memplan.bounds import least_seconds
from memplan.candidates import PREFETCH_DEPTHS, FamilySearch, rounded, search, update_sizes
from memplan.errors import NothingFits, PlanningError
from memplan.memory import Counts
from memplan.pipeline import step_seconds
from memplan.search import plan, problem_of, smallest_budget
from memplan.sizes import parse_bytes
from memplan.units import units_of
from offload.plan import Buckets, MomentFormat, OptimizerKind, Plan, Precision, StateFormat, Target, Tier
from offload.residency import footprint, streamed_slot_bytes
from tests.synthetic_profiles import CALLING_RATES, RATES, SHARED_RATES, cases, machine_of, transformer

SLOW = settings(deadline=None, max_examples=60)
TIE = 1 + 2**-7
"""Counts of one family whose seconds agree to a quarter of a percent are a tie, decided by what moves less."""


@pytest.mark.parametrize("target", [Target.MEMPLAN, Target.DEEPSPEED])
@pytest.mark.parametrize("left_out", range(6))
def test_what_could_not_be_traced_is_no_way_to_train(left_out: int, target: Target) -> None:
    profile = transformer(2, inputs=0.1, precision="bf16")
    points = profile.activations
    assert len(points) == 6
    profile = replace(profile, activations=(*points[:left_out], *points[left_out + 1 :]))
    machine = machine_of(1 << 40, 1 << 40, device="cuda", gpus=2)
    problem = problem_of(profile, machine, RATES, 8, None, target)
    assert all(problem.knows(family.way) for family in problem.families())
    assert plan(profile, machine, RATES, batch_size=8, target=target).micro_batch_size in (1, 2, 4)


def test_a_model_with_more_parameters_than_can_be_counted_is_refused() -> None:
    profile = transformer(1, 1 << 55)
    with pytest.raises(PlanningError, match=r"Synthetic has 3.6e\+16 parameters; at most 1.8e\+16 can be planned for"):
        problem_of(profile, machine_of(1 << 40, 1 << 40), RATES, 4, None)


def every_count(units: int):
    for state in range(units + 1):
        for gradients, parameters in itertools.product(range(state + 1), repeat=2):
            yield Counts(state, gradients, parameters)
            for nvme_state in range(1, state + 1):
                yield Counts(state, gradients, parameters, nvme_state)
            for nvme_parameters in range(1, parameters + 1):
                yield Counts(state, gradients, parameters, state, nvme_parameters)


def brute_force(problem, machine):
    """By family, seconds and bytes off the GPU of its best counts, all of them priced; empty where nothing fits."""
    ranks = machine.gpus // machine.nodes
    for size in update_sizes(problem):
        best = {}
        for family, depth in itertools.product(problem.families(), PREFETCH_DEPTHS):
            search = FamilySearch(problem, family, Buckets(prefetch_units=depth, update_elements=size))
            t = search.tables
            fitting = {
                counts
                for counts in every_count(len(problem.shapes))
                if search.gpu_upper_bytes(counts) <= machine.gpu_bytes
                and search.host_upper_bytes(counts) <= machine.host_bytes
                and t.nvme_bytes(counts) <= machine.nvme_bytes // ranks
            }
            in_memory = {(c.state, c.gradients, c.parameters) for c in fitting if not c.nvme_state}

            def needless(c, in_memory=in_memory):
                """Whether one unit's weights could stay on the GPU with no more state off it."""
                return any((state, c.gradients, c.parameters - 1) in in_memory for state in range(c.state + 1))

            fitting = [c for c in fitting if not needless(c)]
            if not fitting:
                continue
            columns = (np.array(column) for column in zip(*map(astuple, fitting), strict=True))
            arrays = Counts(*columns)
            seconds, offloaded = search.seconds(arrays), t.offloaded_bytes(arrays)
            first = np.lexsort((seconds, offloaded, rounded(seconds)))[0]
            key = float(rounded(seconds[first])), int(offloaded[first]), float(seconds[first])
            best[family] = min(key, best.get(family, key))
        if best:
            return [(seconds, offloaded) for _, offloaded, seconds in best.values()]
    return []


@given(
    st.sampled_from([1, 1, 2]).flatmap(lambda gpus: cases(gpus, most_blocks=3)),
    st.sampled_from([2, 4, 6]),
    st.sampled_from([RATES, SHARED_RATES, CALLING_RATES]),
    st.sampled_from([candidates.DOUBT, 0.5]),
)
@settings(deadline=None, max_examples=40)
def test_the_search_finds_what_brute_force_finds(case, batch_size, rates, doubt):
    """With much doubt, too: families that are as fast as the fastest are few otherwise."""
    profile, machine = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "DOUBT", doubt)
        compare_with_brute_force(profile, machine, batch_size, rates, doubt)


def compare_with_brute_force(profile, machine, batch_size, rates, doubt):
    problem = problem_of(profile, machine, rates, batch_size, None)
    expected = brute_force(problem, machine)
    if not expected:
        with pytest.raises(NothingFits):
            plan(profile, machine, rates, batch_size=batch_size)
        return
    found = search(problem)[0]
    assert plan(profile, machine, rates, batch_size=batch_size).prediction.step_seconds == found.seconds
    fastest = min(expected)[0]
    assert found.seconds <= fastest * (1 + doubt) * TIE
    assert found.offloaded_bytes <= min(moved for seconds, moved in expected if seconds <= fastest * (1 + doubt) / TIE)


@pytest.mark.parametrize("doubt", [candidates.DOUBT, 0.1, 0.5])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("activation", [10_000, 100_000, 1_000_000])
def test_of_ways_that_are_as_fast_as_predictions_can_tell_the_one_is_taken_that_moves_least(
    activation, share, doubt, monkeypatch
):
    monkeypatch.setattr(candidates, "DOUBT", doubt)
    profile = transformer(6, activation=activation)
    moved_less = 0
    for beside in (2, 4, 8, 16):
        state = int(profile.parameter_elements * 16 * share)
        machine = machine_of((128 << 20) + state + activation * beside, 1 << 32, device="cuda")
        problem = problem_of(profile, machine, RATES, 4, None)
        found = search(problem)
        if not found:
            continue
        size = found[0].buckets.update_elements
        every = [c for family in problem.families() if (c := candidates.best_of(problem, family, size)) is not None]
        fastest = min(c.seconds for c in every)
        tied = [c for c in every if c.seconds <= fastest * (1 + doubt)]
        assert found[0].offloaded_bytes == min(c.offloaded_bytes for c in tied)
        assert found[0] in tied
        moved_less += found[0].seconds > fastest
    if (activation, share) == (100_000, 0.9):
        assert moved_less, "a case that tells the rule from taking the fastest"


@given(
    st.sampled_from([1, 2]).flatmap(lambda gpus: cases(gpus, most_blocks=4)),
    st.sampled_from(PREFETCH_DEPTHS),
    st.sampled_from([2, 4, 6]),
    st.sampled_from([RATES, SHARED_RATES, CALLING_RATES]),
    st.data(),
)
@settings(deadline=None, max_examples=80)
def test_no_candidate_is_priced_below_its_bound(case, depth, batch_size, rates, data):
    profile, machine = case
    problem = problem_of(profile, replace(machine, device="cuda"), rates, batch_size, None)
    family = data.draw(st.sampled_from(sorted(problem.families(), key=repr)))
    work = problem.work(family, Buckets(prefetch_units=depth, update_elements=1 << 16))
    all_counts = list(every_count(len(problem.shapes)))
    chosen = data.draw(st.lists(st.sampled_from(all_counts), min_size=1, max_size=20))
    columns = (np.array(column) for column in zip(*map(astuple, chosen), strict=True))
    arrays = Counts(*columns)
    assert (least_seconds(work, arrays) <= step_seconds(work, arrays)).all()
    one = Counts(*(np.array([n]) for n in astuple(chosen[0])))
    assert step_seconds(work, one)[0] == step_seconds(work, arrays)[0], "a price does not depend on its neighbours"


@given(
    cases(),
    st.sampled_from([1, 6, 8]),
    st.sampled_from(OptimizerKind),
    st.sampled_from(MomentFormat),
    st.sampled_from([RATES, SHARED_RATES]),
)
@SLOW
def test_a_plan_fits_its_budget_and_passes_the_audit(case, batch_size, optimizer, moments, rates):
    profile, machine = case
    wish = moments if optimizer.moments else None
    try:
        found = plan(profile, machine, rates, batch_size=batch_size, optimizer=optimizer, moments=wish)
    except NothingFits:
        assume(False)
    shapes = units_of(profile)
    held = footprint(shapes, found.placements, found.buckets, found.state_format, found.gpu_update_share)
    assert held.gpu_bytes <= found.prediction.gpu_peak_bytes <= found.prediction.gpu_upper_bytes <= machine.gpu_bytes
    host = held.host_bytes + found.prediction.made_for.checkpoint_bytes
    assert host == found.prediction.host_bytes <= found.prediction.host_upper_bytes <= machine.host_bytes
    assert held.nvme_bytes == found.prediction.nvme_bytes <= machine.nvme_bytes
    assert found.micro_batch_size * found.gradient_accumulation_steps == batch_size
    assert audit(found, shapes) == []
    if any(p.parameters is Tier.NVME for p in found.placements):
        assert all(p.optimizer is not Tier.HOST for p in found.placements)


@given(cases(), st.sampled_from([1, 8]), st.sampled_from([RATES, SHARED_RATES]))
@SLOW
def test_the_smallest_change_that_is_named_makes_it_fit(case, batch_size, rates):
    profile, machine = case
    try:
        plan(profile, machine, rates, batch_size=batch_size)
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
        plan(profile, changed, rates, batch_size=batch_size)
        grain = 1 << 10 if wanted < 1 << 23 else 1 << 20  # what the size was rounded up to
        with pytest.raises(NothingFits):
            plan(profile, replace(changed, **{f"{tier}_bytes": wanted - grain}), rates, batch_size=batch_size)


@given(cases(gpus=4))
@SLOW
def test_plans_for_several_gpus_keep_every_rank_inside_its_share(case):
    profile, machine = case
    try:
        found = plan(profile, machine, RATES, batch_size=8)
    except NothingFits:
        assume(False)
    assert found.prediction.gpu_peak_bytes <= machine.gpu_bytes
    assert found.prediction.host_bytes <= found.prediction.host_upper_bytes <= machine.host_bytes
    assert found.prediction.nvme_bytes <= machine.nvme_bytes
    assert found.micro_batch_size * found.gradient_accumulation_steps * 4 == 8
    assert audit(found, units_of(profile)) == []


@given(cases(), st.sampled_from([k for k in OptimizerKind if k.moments]), st.sampled_from(MomentFormat))
@SLOW
def test_a_plan_survives_its_json(case, optimizer, moments):
    profile, machine = case
    try:
        found = plan(profile, machine, RATES, batch_size=4, optimizer=optimizer, moments=moments)
    except NothingFits:
        assume(False)
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_plan_of_before_there_was_a_choice_is_for_adamw():
    written = plan(transformer(3), machine_of(1 << 30, 1 << 30), RATES, batch_size=4).to_dict()
    del written["optimizer"], written["moments"]
    assert Plan.from_dict(written).state_format == StateFormat(Precision.FP32)


@pytest.mark.parametrize(
    ("profiled", "wished", "expected"),
    [
        ("adamw-fused", None, OptimizerKind.ADAMW),
        ("sgd-momentum", None, OptimizerKind.SGD_MOMENTUM),
        ("sgd", OptimizerKind.LION, OptimizerKind.LION),
        ("adafactor", None, OptimizerKind.ADAMW),
    ],
)
def test_the_optimizer_is_the_one_wished_or_profiled(profiled, wished, expected):
    profile = replace(transformer(3), optimizer=profiled)
    found = plan(profile, machine_of(1 << 30, 1 << 30), RATES, batch_size=4, optimizer=wished)
    assert found.optimizer is expected
    remarks = [reason for reason in found.reasons if "The profile was made with" in reason]
    assert bool(remarks) is (profiled in ("adafactor", "sgd"))


def test_what_keeps_less_needs_less():
    machine = machine_of(1 << 30, 1 << 30)
    kinds = (OptimizerKind.SGD, OptimizerKind.LION, OptimizerKind.ADAM)
    peaks = [
        plan(transformer(3), machine, RATES, batch_size=4, optimizer=kind).prediction.phases["gpu"]["attach"]
        for kind in kinds
    ]
    elements = sum(s.trainable_elements for s in units_of(transformer(3)))
    assert [b - a for a, b in itertools.pairwise(peaks)] == [4 * elements] * 2


def test_moments_in_fewer_bits_are_what_somebody_asks_for_by_name():
    profile, machine = transformer(3), machine_of(1 << 30, 1 << 30)
    plans = [plan(profile, machine, RATES, batch_size=4, moments=m) for m in (None, *MomentFormat)]
    assert [p.moments for p in plans] == [MomentFormat.FP32, *MomentFormat]
    said = [[r for r in p.reasons if "as was asked for: training makes other numbers" in r] for p in plans]
    assert [len(remarks) for remarks in said] == [0, 0, 1, 1]
    elements = sum(s.trainable_elements for s in units_of(profile))
    state = [p.prediction.phases["gpu"]["attach"] for p in plans[1:]]
    assert [a - b for a, b in itertools.pairwise(state)] == [2 * 2 * elements, 2 * elements * (64 - 4) // 64]


@pytest.mark.parametrize("target", [Target.DEEPSPEED, Target.FSDP2])
def test_moments_that_nobody_would_store_so_are_refused(target):
    machine = machine_of(1 << 30, 1 << 30, device="cuda")
    with pytest.raises(PlanningError, match=f"plans for {target} count moments in fp32; leave --moments 8bit out"):
        plan(transformer(3), machine, RATES, batch_size=4, target=target, moments=MomentFormat.EIGHT_BIT)
    with pytest.raises(PlanningError, match="sgd keeps no moments; leave --moments bf16 out"):
        plan(transformer(3), machine, RATES, batch_size=4, optimizer=OptimizerKind.SGD, moments=MomentFormat.BF16)


def test_where_nothing_fits_moments_in_fewer_bits_are_offered_and_not_taken():
    profile = transformer(4)
    needed = {m: smallest(profile, m) for m in MomentFormat}
    assert needed[MomentFormat.FP32] > needed[MomentFormat.BF16] > needed[MomentFormat.EIGHT_BIT]
    for moments, offered in ((MomentFormat.FP32, MomentFormat.BF16), (MomentFormat.BF16, MomentFormat.EIGHT_BIT)):
        machine = machine_of(needed[offered], 0)
        with pytest.raises(NothingFits, match=f"it would fit with --moments {offered}, which changes the numbers"):
            plan(profile, machine, RATES, batch_size=1, moments=moments)
        assert plan(profile, machine, RATES, batch_size=1, moments=offered).moments is offered
    with pytest.raises(NothingFits) as refused:
        plan(profile, machine_of(1 << 10, 0), RATES, batch_size=1)
    assert "--moments" not in str(refused.value)


def smallest(profile, moments):
    """GPU bytes with which it fits, without a host."""
    problem = problem_of(profile, machine_of(1 << 10, 0), RATES, 1, None, moments=moments)
    return smallest_budget(problem, Tier.GPU)


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


@pytest.mark.parametrize("target", [Target.MEMPLAN, Target.DEEPSPEED])
def test_the_network_that_a_machine_says_is_what_its_plans_are_priced_with(target):
    profile = transformer(4, batch_size=2)
    machine = replace(machine_of(1 << 34, 1 << 34, device="cuda", gpus=16), nodes=2)
    unknown = replace(RATES, inter_node_bytes_per_second=None)

    def seconds(network, rates):
        there = replace(machine, inter_node_bytes_per_second=network)
        return plan(profile, there, rates, batch_size=32, target=target).prediction.step_seconds

    for rates in (RATES, unknown):
        assert seconds(1e5, rates) > seconds(4e5, rates)
    assert seconds(1e5, unknown) == seconds(1e5, RATES)


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


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_host_that_holds_the_tiers_but_not_the_start_is_no_host_that_fits(gpus):
    """The largest unit is on its way into the tiers in every process."""
    profile = transformer(6, 3_000_000, embedding=0, precision="bf16", flops=10**9)

    def planned(host: int) -> Plan:
        return plan(profile, machine_of(400_000_000, host, device="cuda", gpus=gpus), SHARED_RATES, batch_size=8)

    problem = problem_of(profile, machine_of(400_000_000, 0, device="cuda", gpus=gpus), SHARED_RATES, 8, None)
    least = smallest_budget(problem, Tier.HOST)
    assert planned(least).prediction.host_bytes < least
    with pytest.raises(NothingFits):
        planned(least - (1 << 20))
    seen = set()
    for share in range(100, 500, 20):
        found = planned(least * share // 100)
        assert found.prediction.host_upper_bytes <= found.budget.host_bytes
        models = gpus * 4 * profile.parameter_elements
        assert found.on_meta or models <= found.prediction.host_upper_bytes
        seen.add(found.on_meta)
    assert seen == ({True, False} if gpus > 1 else {False})


def test_what_the_start_needs_of_the_host_is_named_even_where_the_gpu_is_too_small_as_well():
    profile = transformer(4, 300_000, activation=5_000_000)
    for gpu in (10**10, 2_000_000):
        with pytest.raises(NothingFits) as caught:
            plan(profile, machine_of(gpu, 1_000, device="cuda"), RATES, batch_size=4)
        assert caught.value.tier == "host"
        assert "is short 2.29 MiB at the start, when every process has a unit of its model on the way" in str(
            caught.value
        )
        words = [change.split()[::2] for change in caught.value.changes]
        both = [["--gpu-memory", "--host-memory"]]
        assert words[:1] == ([["--host-memory"]] if gpu == 10**10 else both)


def test_nothing_fits_names_the_tier_the_shortage_and_the_change():
    with pytest.raises(NothingFits, match=r"Nothing fits: the \w+ tier is short .*smallest change: --") as caught:
        plan(transformer(4, activation=5_000_000), machine_of(2_000_000, 1_000), RATES, batch_size=4)
    assert caught.value.tier in ("gpu", "host", "nvme")


def test_what_room_is_left_on_the_gpu_becomes_slots_of_the_shared_update():
    profile = transformer(6, 3_000_000, embedding=0, precision="bf16", flops=10**9)
    found = {}
    for gpu in range(240_000_000, 440_000_000, 20_000_000):
        machine = machine_of(gpu, 10**9, device="cuda")
        found[gpu] = plan(profile, machine, SHARED_RATES, batch_size=4)
        assert found[gpu].gpu_update_share > 0
        slots = found[gpu].buckets.update_slots
        said = next(reason for reason in found[gpu].reasons if "The GPU makes 59% of the update" in reason)
        assert f" of its memory ({slots} slots) " in said
        assert found[gpu].prediction.gpu_upper_bytes <= gpu
    assert all(p.buckets.update_slots >= 3 for p in found.values())
    assert any(p.buckets.update_slots > 3 for p in found.values())
    resident = plan(profile, machine_of(10**10, 10**9, device="cuda"), SHARED_RATES, batch_size=4)
    assert (resident.gpu_update_share, resident.buckets.update_slots) == (0.0, 3)


@pytest.mark.parametrize("moments", MomentFormat)
def test_moments_in_fewer_bits_are_widened_beside_forward_and_there_is_room_for_that(moments):
    profile = transformer(6, 3_000_000, embedding=0, precision="bf16", flops=10**9)
    problem = problem_of(profile, machine_of(10**9, 10**9, device="cuda"), SHARED_RATES, 4, None, moments=moments)
    family = next(iter(problem.families()))
    search = FamilySearch(problem, family, Buckets(update_elements=1 << 20))
    slots, widened = search.tables.update_slots_bytes, 0 if moments is MomentFormat.FP32 else search.update_bytes
    beyond = {Counts(0, 0, 0): 0, Counts(2, 0, 0): widened, Counts(2, 0, 0, 2): slots + widened}
    for counts, more in beyond.items():  # the slots of state on the host are in the tables
        assert search.gpu_upper_bytes(counts) == int(search.tables.gpu_bytes(counts)) + search.upper_bytes + more
    assert search.gpu_peak_bytes(Counts(2, 0, 0)) <= search.gpu_upper_bytes(Counts(2, 0, 0))


def test_what_the_host_needs_only_at_the_start_is_said():
    profile = transformer(6, 3_000_000, embedding=0, precision="bf16", flops=10**9)
    found = plan(profile, machine_of(10**10, 10**9, device="cuda"), SHARED_RATES, batch_size=4)
    assert found.prediction.host_upper_bytes > found.prediction.host_bytes
    assert any("At the start the host holds up to" in reason for reason in found.reasons)


def test_what_the_drivers_context_takes_is_said():
    machine = replace(machine_of(10**10, 10**9, device="cuda"), context_bytes=500 << 20)
    found = plan(transformer(6, precision="bf16"), machine, SHARED_RATES, batch_size=4)
    assert any("The driver's context takes 500 MiB beside that." in reason for reason in found.reasons)


def test_slots_that_somebody_adds_are_audited():
    profile = transformer(6, 3_000_000, embedding=0, precision="bf16", flops=10**9)
    machine = machine_of(440_000_000, 10**9, device="cuda")
    found = plan(profile, machine, SHARED_RATES, batch_size=4)
    slot = streamed_slot_bytes(found.buckets.update_elements, found.state_format)
    room = (machine.gpu_bytes - found.prediction.gpu_upper_bytes) // slot

    def with_slots(more: int) -> list[str]:
        buckets = replace(found.buckets, update_slots=found.buckets.update_slots + more)
        return audit(replace(found, buckets=buckets), units_of(profile))

    assert with_slots(room) == []
    (problem, _) = with_slots(room + 1)
    assert problem.startswith("prediction.gpu_peak_bytes is")
