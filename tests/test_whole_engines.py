"""Plans for DeepSpeed and FSDP2, which move whole tiers: every setup is priced, and the best that fits is taken."""

from dataclasses import replace
from json import dumps

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.activations import FIXED_MARGIN_BYTES
from memplan.audit import audit
from memplan.candidates import rounded
from memplan.configs.deepspeed import ds_config
from memplan.engines.deepspeed import OFFLOADS, DeepSpeed
from memplan.engines.deepspeed_setup import setup_of
from memplan.engines.fsdp2 import FSDP2, fsdp2_setup
from memplan.engines.fsdp2_memory import fsdp2_held
from memplan.engines.held import FORWARD, PHASES
from memplan.engines.plans import ENGINES, plan_of_setup
from memplan.engines.whole import Priced, price, price_all, search_setups
from memplan.errors import NothingFits
from memplan.lint.document import parse_document
from memplan.lint.rules import lint_document
from memplan.lint.view import Facts
from memplan.machine import Machine
from memplan.problem import Problem
from memplan.search import plan, problem_of
from memplan.sizes import parse_bytes
from offload.plan import Target, Tier
from tests.synthetic_profiles import RATES, machine_of, transformer, transformers

WHOLE = (Target.DEEPSPEED, Target.FSDP2)
SOME = settings(deadline=None, max_examples=15)


@st.composite
def problems(draw: st.DrawFn, target: Target = Target.DEEPSPEED) -> tuple[Problem, Machine]:
    """One to four GPUs of one or two nodes: ample, tight for DeepSpeed's buckets, or too small."""
    profile = draw(transformers(most_blocks=3))
    nodes, per_node = draw(st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)]))
    sizes = st.one_of(st.just(0), st.floats(1e-3, 8.0).map(lambda gib: int(gib * 2**30)))
    machine = machine_of(FIXED_MARGIN_BYTES["cuda"] + draw(sizes), draw(sizes), draw(sizes), device="cuda")
    machine = replace(machine, gpus=nodes * per_node, nodes=nodes)
    batch_size = machine.gpus * draw(st.sampled_from([1, 2, 6]))
    return problem_of(profile, machine, RATES, batch_size, None, target), machine


def both() -> st.SearchStrategy[tuple[Problem, Machine]]:
    return st.sampled_from(WHOLE).flatmap(problems)


def fits(problem: Problem, priced: Priced) -> bool:
    b, waiting = problem.budget, problem.activations(priced.setup.family.way).host_bytes * problem.gpus_per_node
    on_host = max(priced.held.host.values()) + waiting
    return priced.gpu_upper_bytes <= b.gpu_bytes and on_host <= b.host_bytes and priced.held.nvme_bytes <= b.nvme_bytes


@given(problems())
@SOME
def test_every_setup_is_one_that_deepspeed_takes_and_reads_back_from_its_plan(case):
    problem, machine = case
    engine = DeepSpeed()
    found = price_all(problem, engine)
    assert {p.setup.family.sharding.zero_stage for p in found} == ({0, 1, 3} if problem.gpus == 1 else {0, 1, 2, 3})
    for priced in found[:: max(1, len(found) // 40)]:
        mine = engine.setup_of(problem, priced.setup)  # refuses what DeepSpeed can not do
        assert (mine.parameters, mine.optimizer) in OFFLOADS[mine.zero_stage]
        assert setup_of(plan_of_setup(problem, priced, machine)) == mine


@given(both())
@SOME
def test_the_plan_is_the_fastest_setup_that_fits(case):
    problem, machine = case
    everything = price_all(problem, ENGINES[problem.target])
    fitting = [p for p in everything if fits(problem, p)]
    assert fitting == [p for p in everything if not p.shortage(problem)]
    assert sorted(fitting, key=lambda p: p.rank) == search_setups(problem, ENGINES[problem.target])
    size = problem.gpu_batch_size * problem.gpus
    if not fitting:
        with pytest.raises(NothingFits):
            plan(problem.profile, machine, RATES, batch_size=size, target=problem.target)
        return
    found = plan(problem.profile, machine, RATES, batch_size=size, target=problem.target)
    least = min(float(rounded(p.timeline.seconds)) for p in fitting)
    assert float(rounded(found.prediction.step_seconds)) == least
    assert found.prediction.gpu_upper_bytes <= machine.gpu_bytes
    assert found.prediction.host_upper_bytes <= machine.host_bytes
    assert found.prediction.nvme_bytes <= machine.nvme_bytes
    assert found.micro_batch_size * found.gradient_accumulation_steps * found.gpus == size
    assert audit(found, problem.shapes) == []


@given(both())
@SOME
def test_what_is_kept_between_setups_changes_no_price(case):
    problem, _ = case
    engine = ENGINES[problem.target]
    for priced in price_all(problem, engine)[::17]:
        setup = priced.setup
        alone = replace(problem)
        again = price(alone, setup, engine.held(alone, setup), engine.traffic(alone, setup), engine.update_seconds)
        assert again == priced


@given(both())
@SOME
def test_a_step_lasts_as_long_as_its_phases_one_after_another(case):
    problem, _ = case
    for priced in price_all(problem, ENGINES[problem.target])[::17]:
        spans = priced.timeline.spans
        seconds = 0.0
        for label in ("forward", "backward"):
            lasted = [s.end_seconds - s.start_seconds for s in spans if s.label == label]
            assert len({s.start_seconds for s in spans if s.label == label}) <= 1, "they begin together"
            seconds += max(lasted, default=0.0)
        seconds += sum(s.end_seconds - s.start_seconds for s in spans if s.label == "update")
        assert priced.timeline.seconds == pytest.approx(seconds)
        assert priced.timeline.seconds == pytest.approx(max((s.end_seconds for s in spans), default=0.0))


@given(both())
@SOME
def test_blocks_are_recomputed_all_or_none_and_the_loss_is_whole(case):
    problem, _ = case
    for priced in price_all(problem, ENGINES[problem.target]):
        way = priced.setup.family.way
        assert way.recomputed_blocks in (0, len(problem.profile.blocks))
        assert (way.loss_chunks, way.checkpoints) == (1, Tier.GPU)


@given(both())
@SOME
def test_phases_and_peak_agree(case):
    problem, _ = case
    for priced in price_all(problem, ENGINES[problem.target])[::17]:
        assert set(priced.gpu_phases) == set(PHASES)
        assert max(priced.gpu_phases.values()) == priced.gpu_peak_bytes <= priced.gpu_upper_bytes
        assert max(priced.held.gpu.values()) <= priced.gpu_peak_bytes


@given(problems())
@SOME
def test_lint_finds_no_error_in_a_configuration_that_was_planned(case):
    problem, machine = case
    everything = price_all(problem, DeepSpeed())
    elements = tuple(p.elements for p in problem.profile.parameters)
    facts = Facts(gpus=problem.gpus, parameter_elements=elements)
    for priced in everything[:: max(1, len(everything) // 6)]:
        config, _ = ds_config(plan_of_setup(problem, priced, machine))
        found = lint_document(parse_document(dumps(config)), facts)
        assert [f for f in found if f.severity == "error"] == []


@pytest.mark.parametrize("target", WHOLE)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_rank_updates_what_its_stage_gives_it(target, stage):
    machine = machine_of(1 << 40, 1 << 40, device="cuda", gpus=4)
    profile = transformer(4, 4_000, 8_000, 0, precision="bf16")
    problem = problem_of(profile, machine, RATES, 4, None, target)
    for priced in price_all(problem, ENGINES[target]):
        if priced.setup.depth or priced.setup.family.sharding.zero_stage != stage:
            continue
        updated = profile.trainable_elements // (4 if stage else 1)
        spans = [s for s in priced.timeline.spans if (s.label, s.lane) == ("update", "compute")]
        took = sum(s.end_seconds - s.start_seconds for s in spans)
        assert took == pytest.approx(updated * RATES.gpu_update_seconds[problem.precision], rel=0.01)  # with padding


@pytest.mark.parametrize("target", WHOLE)
def test_the_changes_that_are_named_make_it_fit(target):
    profile = transformer(4, 3_000_000, 5_000_000, precision="bf16")
    small = machine_of(FIXED_MARGIN_BYTES["cuda"] + (20 << 20), 1 << 20, device="cuda", gpus=2)
    small = replace(small, context_bytes=123_456)
    with pytest.raises(NothingFits) as refused:
        plan(profile, small, RATES, batch_size=4, target=target)
    assert str(target) in str(refused.value)
    (change,) = refused.value.changes
    assert change in str(refused.value)
    words, larger = change.split(), small
    for option, size in zip(words[::2], words[1::2], strict=True):
        field = {"--gpu-memory": "gpu_bytes", "--host-memory": "host_bytes", "--nvme": "nvme_bytes"}[option]
        less = small.context_bytes if option == "--gpu-memory" else 0
        larger = replace(larger, **{field: parse_bytes(size.removeprefix("DIR:")) - less})
    plan(profile, larger, RATES, batch_size=4, target=target)


@pytest.mark.parametrize("target", WHOLE)
def test_a_model_without_blocks_is_not_said_to_recompute(target):
    found = plan(transformer(0), machine_of(1 << 40, 1 << 40, device="cuda"), RATES, batch_size=4, target=target)
    assert ", no recompute, " in found.reasons[0]


@given(problems(Target.FSDP2))
@SOME
def test_a_plan_for_fsdp2_has_room_for_what_its_files_shard_by_class(case):
    """They name the classes of blocks, so that embedding and head are gathered with the root, and stay."""
    problem, _ = case
    sharded = set(problem.profile.blocks)
    by_class = [shape for shape in problem.shapes if not shape.name or shape.name in sharded]
    for priced in price_all(problem, FSDP2())[::7]:
        as_named = fsdp2_held(by_class, problem.profile.parameters, fsdp2_setup(problem, priced.setup))
        assert all(priced.held.gpu[phase] >= as_named.gpu[phase] for phase in PHASES)
        assert all(priced.held.host[phase] >= as_named.host[phase] for phase in PHASES)


def test_that_room_is_more_than_the_units_of_the_plan_need_where_the_vocabulary_is_large():
    profile = transformer(2, embedding=40_000_000)
    machine = machine_of(1 << 40, 1 << 40, device="cuda", gpus=8)
    problem = problem_of(profile, machine, RATES, 8, None, Target.FSDP2)
    resident = next(p for p in price_all(problem, FSDP2()) if p.setup.parameters is Tier.GPU)
    alone = fsdp2_held(problem.shapes, profile.parameters, fsdp2_setup(problem, resident.setup))
    assert resident.held.gpu[FORWARD] > alone.gpu[FORWARD]
