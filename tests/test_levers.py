"""What would make a step faster, beside planning for the changed machine itself."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.activations import FIXED_MARGIN_BYTES
from memplan.candidates import DOUBT, SMALLEST_UPDATE, best_of, floor_of, search, update_sizes
from memplan.explanation import explanation_of
from memplan.levers import LEAST_SPEEDUP, MOST_LEVERS, Lever, buyable, fastest_seconds, levers
from memplan.planned import counts_of, family_of, timeline_of
from memplan.search import plan, problem_of
from offload.plan import Target
from tests.synthetic_profiles import RATES, cases, machine_of, transformer

SLOW = settings(deadline=None, max_examples=80)
TIE = 1 + 2**-7
"""Candidates whose seconds agree to a quarter of a percent are a tie, decided by other things."""
MARGIN = FIXED_MARGIN_BYTES["cuda"]
PASSING = 2 * 4 * 200_064
"""Of the host at the start, while a block is on its way."""


def on_disk(gpus=1):
    """A plan that keeps optimizer state on NVMe, and what it was made with."""
    profile = transformer(6, block_elements=200_000, batch_size=4)
    machine = machine_of(MARGIN + 9_000_000, 9_000_000 + gpus * PASSING, 1 << 30, device="cuda", gpus=gpus)
    found = plan(profile, machine, RATES, batch_size=4)
    assert found.prediction.nvme_bytes > 0
    return profile, machine, found


@SLOW
@given(cases())
def test_no_candidate_of_a_family_goes_below_its_floor(case):
    profile, machine = case
    problem = problem_of(profile, machine, RATES, profile.batch_size, None)
    size = next(update_sizes(problem))
    for family in problem.families():
        candidate = best_of(problem, family, size)
        if candidate is not None:
            floor = floor_of(problem, family, size)
            assert floor <= candidate.seconds


@SLOW
@given(cases(gpus=2))
def test_the_fastest_is_what_the_search_finds(case):
    profile, machine = case
    problem = problem_of(profile, machine, RATES, profile.batch_size * 2, None)
    best = next(iter(search(problem)), None)
    if best is None:
        assert fastest_seconds(problem, SMALLEST_UPDATE) is None
        return
    seconds = fastest_seconds(problem, best.buckets.update_elements)
    assert best.seconds / (1 + DOUBT) / TIE <= seconds <= best.seconds * TIE


@SLOW
@given(cases(), st.integers(0, 4_000_000), st.integers(0, 4_000_000))
def test_more_memory_is_never_slower(case, more_gpu, more_host):
    profile, machine = case
    problem = problem_of(profile, machine, RATES, profile.batch_size, None)
    best = next(iter(search(problem)), None)
    larger = replace(machine, gpu_bytes=machine.gpu_bytes + more_gpu, host_bytes=machine.host_bytes + more_host)
    changed = problem_of(profile, larger, RATES, profile.batch_size, None)
    if best is not None:
        assert fastest_seconds(changed, best.buckets.update_elements) <= best.seconds * TIE


def test_what_is_no_faster_than_the_limit_is_not_found():
    profile, machine, found = on_disk()
    problem = problem_of(profile, machine, RATES, 4, None)
    size, seconds = found.buckets.update_elements, found.prediction.step_seconds
    assert fastest_seconds(problem, size, seconds * TIE) == pytest.approx(seconds, rel=0.01)
    assert fastest_seconds(problem, size, seconds / TIE) is None


def test_levers_are_what_planning_for_the_changed_machine_says():
    profile, machine, found = on_disk()
    said = {lever.change: lever for lever in levers(profile, machine, RATES, found)}
    r = RATES
    disk = replace(
        r,
        nvme_read_bytes_per_second=2 * r.nvme_read_bytes_per_second,
        nvme_write_bytes_per_second=2 * r.nvme_write_bytes_per_second,
    )
    host = replace(machine, host_bytes=machine.host_bytes + buyable(found.prediction.nvme_bytes))
    for start, changed, rates in (("a disk twice", machine, disk), (_more_host(said), host, RATES)):
        lever = next(lever for change, lever in said.items() if change.startswith(start))
        direct = plan(profile, changed, rates, batch_size=4).prediction.step_seconds
        assert lever.step_seconds == pytest.approx(direct, rel=0.01)
        assert lever.speedup == pytest.approx(found.prediction.step_seconds / direct, rel=0.01)


def _more_host(said):
    """The larger of the additions: it needs no disk."""
    changes = [change for change in said if change.endswith("host memory")]
    return min(changes, key=lambda change: said[change].step_seconds)


@pytest.mark.parametrize("target", [Target.DEEPSPEED, Target.FSDP2])
def test_levers_of_another_engine_are_plans_for_that_engine(target):
    profile = transformer(6, block_elements=50_000_000, batch_size=2)
    machine = machine_of(2_500_000_000, 1 << 36, device="cuda", gpus=2)
    found = plan(profile, machine, RATES, batch_size=8, target=target)
    said = {lever.change: lever for lever in levers(profile, machine, RATES, found)}
    direct = plan(profile, replace(machine, gpus=4), RATES, batch_size=8, target=target).prediction.step_seconds
    assert said["4 GPUs"].step_seconds == pytest.approx(direct)
    assert said["4 GPUs"].speedup == pytest.approx(found.prediction.step_seconds / direct)


def test_levers_come_best_first_and_only_where_they_gain():
    profile, machine, found = on_disk()
    speedups = [lever.speedup for lever in levers(profile, machine, RATES, found)]
    assert 1 < len(speedups) <= MOST_LEVERS
    assert speedups == sorted(speedups, reverse=True)
    assert speedups[-1] >= LEAST_SPEEDUP


def test_where_the_gpu_computes_all_the_time_only_computing_and_sharing_it_help():
    profile = transformer(4, flops=10**10)
    machine = replace(machine_of(1 << 30, 1 << 30, device="cuda"), described=True)
    found = plan(profile, machine, RATES, batch_size=4)
    changes = {lever.change for lever in levers(profile, machine, RATES, found)}
    assert changes == {"a GPU that computes twice as fast", "2 GPUs"}


def test_gpus_that_share_no_batch_get_a_larger_one_and_are_compared_by_samples():
    profile = transformer(4, flops=10**10)
    machine = machine_of(1 << 30, 1 << 30, device="cuda", gpus=8)
    found = plan(profile, machine, RATES, batch_size=8)
    lever = next(x for x in levers(profile, machine, RATES, found) if "nodes" in x.change)
    assert lever.change == "2 nodes of 8 GPUs and a batch of 16"
    assert lever.larger_batch
    assert lever.speedup == pytest.approx(2 * found.prediction.step_seconds / lever.step_seconds)
    assert "x the samples a second" in lever.sentence


def test_nodes_that_are_not_there_yet_are_joined_at_a_rate_that_is_said():
    profile = transformer(4, flops=10**10)
    machine, rates = (
        machine_of(1 << 30, 1 << 30, device="cuda", gpus=8),
        replace(RATES, inter_node_bytes_per_second=None),
    )
    found = plan(profile, machine, rates, batch_size=8)
    changes = [lever.change for lever in levers(profile, machine, rates, found)]
    assert "2 nodes of 8 GPUs that are joined at 25 GB/s a GPU and a batch of 16" in changes


def test_a_network_that_a_machine_says_is_doubled_with_the_other_links():
    profile = transformer(4, batch_size=2)
    machine = replace(machine_of(1 << 34, 1 << 34, device="cuda", gpus=16), nodes=2)
    slow, fast = (replace(machine, inter_node_bytes_per_second=rate) for rate in (1e5, 2e5))
    found = plan(profile, slow, RATES, batch_size=32)
    said = {lever.change: lever for lever in levers(profile, slow, RATES, found)}
    doubled = replace(RATES, collective=RATES.collective.scaled(2))
    direct = plan(profile, fast, doubled, batch_size=32).prediction.step_seconds
    assert said["links between the GPUs twice as fast"].step_seconds == pytest.approx(direct)


def test_where_the_cpu_computes_it_is_the_cpu_that_would_help():
    profile = transformer(4, flops=10**10)
    machine = machine_of(1 << 30, 1 << 30)
    found = plan(profile, machine, RATES, batch_size=4)
    (lever,) = levers(profile, machine, RATES, found)
    assert lever.change == "a CPU twice as fast"


@pytest.mark.parametrize(
    ("lever", "sentence"),
    [
        (Lever("16 GiB more host memory", 1.4123, 0.8211), "with 16 GiB more host memory: 1.4 x (821 ms a step)"),
        (Lever("a disk twice as fast", 1.0412, 12.5), "with a disk twice as fast: 1.04 x (12.5 s a step)"),
    ],
)
def test_a_lever_is_a_sentence(lever, sentence):
    assert lever.sentence == sentence


@given(st.integers(1, 1 << 50))
def test_memory_comes_in_powers_of_two_and_three_halves_of_them(size):
    found = buyable(size)
    assert size <= found <= max(1, 1.5 * size)
    assert found // (found & -found) in (1, 3)


@SLOW
@given(cases())
def test_a_plan_stands_for_the_candidate_that_it_was_made_from(case):
    profile, machine = case
    problem = problem_of(profile, machine, RATES, profile.batch_size, None)
    best = next(iter(search(problem)), None)
    if best is None:
        return
    found = plan(profile, machine, RATES, batch_size=profile.batch_size)
    assert counts_of(found) == best.counts
    assert family_of(found) == best.family
    timeline = timeline_of(profile, machine, RATES, found)
    if machine.device == "cpu":
        assert timeline is None
    else:
        assert timeline.seconds == pytest.approx(found.prediction.step_seconds)
        assert timeline.busy_seconds == pytest.approx(found.prediction.lane_seconds)


def test_what_is_explained_is_the_plan_s_own_prediction():
    profile, machine, found = on_disk()
    shown = explanation_of(profile, machine, RATES, found)
    assert shown.seconds == pytest.approx(found.prediction.step_seconds)
    assert shown.busiest == found.prediction.bottleneck
