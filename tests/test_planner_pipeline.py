import itertools
import random
import statistics
from collections import defaultdict
from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.bounds import least_seconds
from memplan.memory import ChainTables, Counts, chain_order
from memplan.passes import BACKWARD, BACKWARD_ISSUE, FORWARD, FORWARD_ISSUE, PassSeconds
from memplan.pipeline import step_seconds, timeline
from memplan.quick_rates import REFERENCE
from memplan.rates import PLANNED, Curve, Rates
from memplan.sharding import Sharding
from memplan.shared_update import shared_update
from memplan.work import StepWork
from offload.plan import Buckets, Precision, StateFormat
from offload.residency import UnitShape, state_bytes
from tests.step_simulation import simulate
from tests.synthetic_profiles import RATES

SLOW = settings(deadline=None, max_examples=60)
FULLY_SIMULATED = 4
"""Micro-batches up to which the planner's model plays every one."""


def work_of(
    shapes: list[UnitShape],
    seconds: np.ndarray,
    rest: np.ndarray,
    buckets: Buckets,
    micro_batches: int,
    *,
    precision: Precision = Precision.BF16,
    rates: Rates = RATES,
    sharding: Sharding = Sharding(0, 1),  # noqa: B008 - frozen
    inputs: tuple[int, ...] | None = None,
) -> StepWork:
    tables = ChainTables([shapes[i] for i in chain_order(shapes)], buckets, StateFormat(precision), sharding)
    passes = PassSeconds(seconds, rest)
    return StepWork(
        tuple(shapes),
        tables,
        sharding,
        buckets,
        StateFormat(precision),
        passes,
        micro_batches,
        rates,
        (1,) * len(shapes),
        inputs or (0,) * len(shapes),
    )


def counts_for(r: random.Random, units: int) -> Counts:
    """Any candidate: what is on NVMe, and what leaves the GPU, from the start of the chain."""
    state = r.choice([0, units, r.randint(0, units), r.randint(0, units)])
    gradients, parameters = r.randint(0, state), r.randint(0, state)
    nvme_state = r.choice([0, 0, state, r.randint(0, state)])
    return Counts(state, gradients, parameters, nvme_state, r.randint(0, parameters) if nvme_state == state else 0)


def small(seed: int) -> tuple[StepWork, Counts]:
    """One to six blocks, equal or not, with or without embedding, head and root, and lanes of any speed."""
    r = random.Random(seed)
    equal = r.random() < 0.7
    block = r.randint(10_000, 300_000)
    blocks = [UnitShape.of(f"b{i}", [block if equal else r.randint(10_000, 300_000)]) for i in range(r.randint(1, 6))]
    root = [UnitShape.of("", [r.choice([100, 2000, 400_000])])] if r.random() < 0.7 else []  # a norm, or tied weights
    embedding = [UnitShape.of("embed", [r.randint(10_000, 600_000)])] if r.random() < 0.5 else []
    head = [UnitShape.of("head", [r.randint(10_000, 600_000)])] if r.random() < 0.5 else []
    shapes = [*root, *embedding, *blocks, *head]
    # Seconds that a unit computes are a tenth to ten times those in which its weights come.
    speed = 4e-6 * 10 ** r.uniform(-1, 1)
    computing = np.array([s.elements * speed if s.name else 0.0 for s in shapes])
    named = np.array([bool(s.name) for s in shapes])
    issue = computing.mean() * r.choice([0.0, 0.3, 1.2]) * named
    seconds = np.stack([computing / 3, issue / 3, computing * 2 / 3, issue / 2], axis=1)
    rest = computing.mean() * np.array([0.03, 0.0, 0.06, 0.0])
    rates = replace(
        RATES,
        cpu_update_seconds=dict.fromkeys(Precision, 10 ** r.uniform(-6.5, -5)),
        nvme_read_bytes_per_second=10 ** r.uniform(5, 6.5),
        nvme_write_bytes_per_second=10 ** r.uniform(5, 6.5),
        streamed_update_seconds=r.choice([{}, dict.fromkeys(Precision, 10 ** r.uniform(-6.5, -5))]),
    )
    buckets = Buckets(prefetch_units=r.choice([1, 2]), update_elements=r.choice([1 << 14, 1 << 16, 1 << 20]))
    precision = r.choice(PLANNED)
    micro_batches = r.randint(1, 5)
    # An input takes a tenth to twice the time that its block computes in forward.
    leaving = r.choice([0, 0, r.randint(0, len(blocks))])
    first = len(root) + len(embedding)
    each = int(computing[first] / 3 * r.uniform(0.1, 2.0) * rates.device_to_host.at(1))
    inputs = tuple(each if first <= i < first + leaving else 0 for i in range(len(shapes)))
    work = work_of(shapes, seconds, rest, buckets, micro_batches, precision=precision, rates=rates, inputs=inputs)
    return work, counts_for(r, len(shapes))


def large(seed: int) -> tuple[StepWork, Counts]:
    """A language model of one to sixteen billion parameters at rates that were measured, or on better disks."""
    r = random.Random(seed)
    vocabulary, tied = r.choice([130_000_000, 394_000_000]), r.random() < 0.5
    block = r.choice([60_000_000, 100_000_000, 400_000_000])
    blocks = [UnitShape.of(f"b{i}", [block]) for i in range(r.choice([16, 28, 40]))]
    root = UnitShape.of("", [vocabulary if tied else 10_000])
    ends = [] if tied else [[UnitShape.of(name, [vocabulary])] for name in ("embed", "head")]
    shapes = [root, *(ends[0] if ends else []), *blocks, *(ends[1] if ends else [])]
    per_element = 2 * r.choice([2048, 8192, 16384]) / 450e12
    seconds = np.array([[s.elements * per_element, 1e-3, s.elements * 3 * per_element, 4e-3] for s in shapes])
    for i, s in enumerate(shapes):
        if s.name in ("", "embed"):
            seconds[i] = [1e-4, 1e-5, 1e-4, 1e-5] if s.name else 0.0
    fast = replace(
        REFERENCE,
        nvme_read_bytes_per_second=7e9,
        nvme_write_bytes_per_second=5e9,
        cpu_update_seconds=dict.fromkeys(Precision, 0.15e-9),
    )
    buckets = Buckets(prefetch_units=r.choice([1, 2]), update_elements=1 << 24)
    rest = np.array([0.002, 0.001, 0.004, 0.001])
    work = work_of(shapes, seconds, rest, buckets, r.choice([1, 2, 4, 8]), rates=r.choice([REFERENCE, fast]))
    return work, counts_for(r, len(shapes))


def arrays(*chosen: Counts) -> Counts:
    return Counts(*(np.array(column) for column in zip(*map(astuple, chosen), strict=True)))


def price(work: StepWork, counts: Counts) -> float:
    return float(step_seconds(work, arrays(counts))[0])


def errors(cases: list[tuple[StepWork, Counts]], first_gradient: float, steps: int) -> list[float]:
    """How far prices are from what the simulation takes, as shares of it, ascending."""
    simulated = (simulate(work, counts, first_gradient, steps).seconds for work, counts in cases)
    return sorted(abs(price(*case) / seconds - 1) for case, seconds in zip(cases, simulated, strict=True))


def within(found: list[float], share: float) -> float:
    """The error that this share of all stays within."""
    return found[min(len(found) - 1, int(share * len(found)))]


small_cases = st.integers(0, 10**6).map(small)


# Beside the simulation of the engine's threads


def test_large_models_take_what_the_engine_simulated_takes():
    found = errors([large(seed) for seed in range(60)], first_gradient=0.3, steps=4)
    assert statistics.median(found) < 0.002
    assert within(found, 0.9) < 0.01
    assert found[-1] < 0.05


@pytest.mark.parametrize("first_gradient", [0.0, 0.4])
def test_small_models_in_memory_take_what_the_engine_simulated_takes(first_gradient):
    cases = [case for case in map(small, range(350)) if case[1].state and not case[1].nvme_state]
    found = errors(cases, first_gradient, steps=5)
    assert statistics.median(found) < 0.002
    assert within(found, 0.9) < 0.04
    assert within(found, 0.98) < 0.12


def test_small_models_on_disk_take_what_the_engine_simulated_takes():
    """The engine reads, updates and writes chunk by chunk: units of one or two chunks show how coarse the model is."""
    found = errors([case for case in map(small, range(350)) if case[1].nvme_state], first_gradient=0.0, steps=5)
    assert statistics.median(found) < 0.01
    assert within(found, 0.9) < 0.08


def test_the_simulation_settles_after_a_step_or_two():
    for seed in range(60):
        work, counts = small(seed)
        ends = np.diff(simulate(work, counts).ends)
        assert ends[-2] == pytest.approx(ends[-1], rel=0.02)


@given(small_cases)
@SLOW
def test_lanes_are_busy_as_long_as_those_of_the_simulated_engine(case):
    """Bytes over rates, told twice: what is fetched, sent home, brought back, read and written in one step."""
    work, counts = case
    longer, shorter = (busy(simulate(work, counts, steps=steps).spans) for steps in (5, 4))
    found = timeline(work, counts).busy_seconds
    for lane in ("host_to_device", "device_to_host", "inputs", "nvme", "cpu_update"):
        assert found.get(lane, 0.0) == pytest.approx(longer.get(lane, 0.0) - shorter.get(lane, 0.0), rel=1e-6, abs=1e-9)


def busy(spans: dict[str, list[tuple[str, float, float]]]) -> dict[str, float]:
    return {lane: sum(end - start for _, start, end in listed) for lane, listed in spans.items()}


# Facts


@given(small_cases)
@SLOW
def test_a_resident_step_takes_what_it_computes(case):
    work, _ = case
    work = replace(work, input_bytes=(0,) * work.units)
    columns = work.by_unit.sum(axis=0) + work.passes.rest
    if columns[FORWARD_ISSUE] + columns[BACKWARD_ISSUE] > 0:  # a GPU that waits for the CPU takes longer
        work = replace(work, passes=PassSeconds(work.passes.by_unit * [1, 0, 1, 0], work.passes.rest))
    computing = work.micro_batches * (columns[FORWARD] + columns[BACKWARD]) + work.gpu_update_seconds
    assert price(work, Counts(0, 0, 0)) == pytest.approx(computing)


@given(small_cases, st.floats(1.0, 20.0), st.integers(0, 4))
@SLOW
def test_a_faster_lane_never_makes_a_step_longer(case, factor, which):
    work, counts = case
    work = replace(work, micro_batches=min(work.micro_batches, FULLY_SIMULATED))
    r = work.rates
    faster = [
        replace(r, host_to_device=r.host_to_device.scaled(factor)),
        replace(r, device_to_host=r.device_to_host.scaled(factor)),
        replace(r, nvme_read_bytes_per_second=r.nvme_read_bytes_per_second * factor),
        replace(r, nvme_write_bytes_per_second=r.nvme_write_bytes_per_second * factor),
        replace(r, cpu_update_seconds={p: s / factor for p, s in r.cpu_update_seconds.items()}),
    ][which]
    assert price(replace(work, rates=faster), counts) <= price(work, counts) * (1 + 1e-9)


@given(small_cases)
@SLOW
def test_what_a_lane_does_never_overlaps(case):
    lanes = defaultdict(list)
    for span in timeline(*case).spans:
        assert span.end_seconds > span.start_seconds
        lanes[span.lane].append(span)
    for spans in lanes.values():
        for before, after in itertools.pairwise(spans):
            assert after.start_seconds >= before.end_seconds - 1e-9


@given(small_cases)
@SLOW
def test_state_that_leaves_the_gpu_is_updated_and_streamed_once_a_step(case):
    work, counts = case
    found = timeline(work, counts).busy_seconds
    units = [work.shapes[i] for i in chain_order(work.shapes)]
    nvme, host = (
        sum(u.trainable_elements for u in part)
        for part in (units[: counts.nvme_state], units[counts.nvme_state : counts.state])
    )
    factor = work.rates.cpu_update_beside_links if counts.parameters else 1.0
    seconds = work.rates.cpu_update_seconds[work.precision] * factor
    shared = shared_update(work.rates, work.form, "cuda", 1).seconds * factor
    assert found.get("cpu_update", 0.0) == pytest.approx(nvme * seconds + host * shared)
    if counts.nvme_parameters == 0:
        whole = work.nvme_state_bytes
        moved = sum(whole[i] for i in chain_order(work.shapes)[: counts.nvme_state])
        r = work.rates
        seconds = moved / r.nvme_read_bytes_per_second + moved / r.nvme_write_bytes_per_second
        assert found.get("nvme", 0.0) == pytest.approx(seconds)
        least = sum(u.trainable_elements for u in units[: counts.nvme_state]) * state_bytes(1, work.form)
        assert moved >= least


@given(small_cases)
@SLOW
def test_the_timeline_takes_as_long_as_the_price(case):
    work, counts = case
    exact = work.micro_batches <= FULLY_SIMULATED
    assert timeline(work, counts).seconds == pytest.approx(price(work, counts), rel=1e-12 if exact else 0.1)


@given(small_cases, st.integers(0, 10**6))
@SLOW
def test_a_price_does_not_depend_on_what_is_priced_beside_it(case, seed):
    work, counts = case
    r = random.Random(seed)
    others = [counts_for(r, work.units) for _ in range(5)]
    beside = step_seconds(work, arrays(counts, *others))
    assert beside.tolist() == [price(work, c) for c in (counts, *others)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_collective_lane_moves_what_each_stage_of_zero_moves(stage, micro_batches):
    gpus, rate = 4, 5e5
    rates = replace(RATES, collective=Curve.flat(rate))
    shapes = [UnitShape.of("", [1000]), *(UnitShape.of(f"b{i}", [20_000]) for i in range(3)), UnitShape.of("h", [5000])]
    seconds = np.full((len(shapes), 4), 0.1)
    sharding = Sharding(stage, gpus)
    work = work_of(shapes, seconds, np.zeros(4), Buckets(), micro_batches, rates=rates, sharding=sharding)
    elements = [s.padded(sharding.shards).elements for s in shapes]  # so the ranks hold and move them
    ring = sum(elements) * Precision.BF16.weight_bytes * (gpus - 1) / gpus / rate
    root = ring * elements[0] / sum(elements)
    expected = {
        0: 2 * ring,  # all-reduce, once
        1: ring + ring,  # reduce-scatter once, gather after the update
        2: micro_batches * ring + ring,
        3: micro_batches * ring + micro_batches * (2 * ring - root),  # the root stays from forward to backward
    }[stage]
    for counts in (Counts(0, 0, 0), Counts(5, 5, 5), Counts(4, 2, 1, 3)):
        assert timeline(work, counts).busy_seconds["collective"] == pytest.approx(expected)


@given(small_cases)
@SLOW
def test_no_step_is_shorter_than_what_its_lanes_have_to_do(case):
    work, counts = case
    assert least_seconds(work, arrays(counts))[0] <= price(work, counts)


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=4), st.sampled_from([0, 1, 2, 3]), st.sampled_from([1, 2, 3, 5])
)
@SLOW
def test_the_work_of_a_step_and_the_tables_of_its_bytes_count_the_same_elements(sizes, stage, gpus):
    shapes = [UnitShape.of(f"b{i}", [size]) for i, size in enumerate(sizes)]
    sharding = Sharding(stage, gpus) if gpus > 1 else Sharding(0, 1)
    work = work_of(shapes, np.zeros((len(shapes), 4)), np.zeros(4), Buckets(), 1, sharding=sharding)
    tables, w = work.tables, work.precision.weight_bytes
    assert sum(work.state_elements) == tables.state_elements[-1]
    assert sum(work.nvme_state_bytes) == tables.nvme_state[-1]
    assert sum(work.gradient_bytes) == tables.gradient_elements[-1] * w
    assert sum(work.weight_bytes) == tables.parameter_elements[-1] * w


@pytest.mark.parametrize("seed", range(12))
def test_a_step_whose_last_blocks_left_the_gpu_is_no_slower_than_one_whose_first_did(seed: int):
    work, _ = large(seed)
    blocks = sum(s.name.startswith("b") for s in work.shapes)
    first = replace(work)
    first.__dict__["chain"] = sorted(work.chain[:blocks]) + work.chain[blocks:]
    sooner = 0
    for part in (0.25, 0.5, 0.75):
        away = round(blocks * part)
        for weights in (0, away):
            counts = Counts(*(np.array([n]) for n in (away, away, weights, 0, 0)))
            ours, theirs = float(step_seconds(work, counts)[0]), float(step_seconds(first, counts)[0])
            assert ours <= 1.005 * theirs
            sooner += ours < 0.99 * theirs
    assert sooner
