from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.activations import FIXED_MARGIN_BYTES, Way, activations_of
from memplan.memory import ChainTables, Counts, chain_order, placements_of
from memplan.sharding import Sharding
from offload.plan import Buckets, MomentFormat, OptimizerKind, Precision, StateFormat
from offload.residency import UnitShape, footprint
from offload.shards import Shards
from profiler.profile import ActivationPoint
from tests.synthetic_profiles import transformer

sizes = st.lists(st.integers(1, 200_000), max_size=3)
shape_lists = st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5).map(
    lambda units: [UnitShape.of("" if i == 0 else f"u{i}", *unit) for i, unit in enumerate(units)]
)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[UnitShape], Counts]:
    shapes = draw(shape_lists)
    if draw(st.booleans()):  # identical blocks share slots
        shapes += [UnitShape.of(f"block{i}", [1000, 70_000], [64]) for i in range(4)]
    state = draw(st.integers(0, len(shapes)))
    parameters = draw(st.integers(0, state))
    nvme_state = draw(st.integers(0, state))
    return shapes, Counts(
        state,
        draw(st.integers(0, state)),
        parameters,
        nvme_state,
        draw(st.integers(0, min(parameters, nvme_state))),
    )


SHARDINGS = [Sharding(0, 1), *(Sharding(stage, n) for stage in range(4) for n in (2, 3, 8)), Sharding(3, 8, 2, 4)]


@given(
    chains(),
    st.builds(StateFormat, st.sampled_from(Precision), st.sampled_from(OptimizerKind), st.sampled_from(MomentFormat)),
    st.integers(0, 3),
    st.sampled_from([1 << 10, 1 << 16, 1 << 24]),
    st.sampled_from(SHARDINGS),
    st.sampled_from([(0.0, 3), (0.4, 3), (0.4, 20)]),
)
@settings(deadline=None, max_examples=200)
def test_the_tables_agree_with_the_runtimes_footprint_to_the_byte(
    chain, form, prefetch, update_elements, sharding, update
):
    shapes, counts = chain
    share, slots = update
    buckets = Buckets(prefetch_units=prefetch, update_elements=update_elements, update_slots=slots)
    order, shards = chain_order(shapes), sharding.shards
    tables = ChainTables([shapes[i] for i in order], buckets, form, sharding, shared_update=share > 0)
    padded, placements = [s.padded(shards) for s in shapes], placements_of(shapes, order, counts)
    expected = footprint(padded, placements, buckets, form, share, shards)
    assert int(tables.gpu_bytes(counts)) == expected.gpu_bytes
    assert int(tables.host_bytes(counts)) == expected.host_bytes
    assert int(tables.nvme_bytes(counts)) == expected.nvme_bytes


@given(shape_lists, st.integers(2, 8))
def test_a_higher_zero_stage_never_holds_more_model_state(shapes, gpus):
    shapes = [s.padded(Shards(3, gpus)) for s in shapes]
    held = [
        int(t.parameter_elements[-1] + t.gradient_elements[-1] + t.state_elements[-1])
        for t in (
            ChainTables(shapes, Buckets(), StateFormat(Precision.BF16), Sharding(stage, gpus)) for stage in range(4)
        )
    ]
    assert held == sorted(held, reverse=True)


def test_zero_divides_what_its_stage_says():
    stages = [Sharding(stage, 4) for stage in range(4)]
    assert [s.state(10) for s in stages] == [10, 3, 3, 3]
    assert [s.gradients(10) for s in stages] == [10, 10, 3, 3]
    assert [s.parameters(10) for s in stages] == [10, 10, 10, 3]


def test_the_root_leaves_the_gpu_last_and_the_last_of_equal_blocks_first():
    shapes = [UnitShape.of("", [10]), UnitShape.of("embed", [9000]), *(UnitShape.of(f"b{i}", [500]) for i in range(3))]
    assert [shapes[i].name for i in chain_order(shapes)] == ["b2", "b1", "b0", "embed", ""]


def profile_with(*known: tuple[int, int], workspace_bytes: int = 0):
    points = (ActivationPoint(batch, False, value, 1, value - workspace_bytes) for batch, value in known)
    return replace(transformer(2), activations=tuple(points))


def peaks(profile, *batches: int, device: str = "cpu") -> list[int]:
    return [activations_of(profile, Way(batch), device).peak_bytes for batch in batches]


def test_activations_lie_on_the_line_through_the_profiled_batches():
    assert peaks(profile_with((1, 100), (5, 300)), 1, 3, 5) == [100, 200, 300]


def test_one_point_bounds_smaller_batches_and_says_nothing_about_larger_ones():
    assert peaks(profile_with((4, 100)), 1, 4) == [100, 100]
    assert activations_of(profile_with((4, 100)), Way(5), "cpu") is None


def test_what_fits_is_decided_by_more_than_what_is_expected():
    profile = profile_with((4, 1 << 30))
    for device in ("cuda", "cpu"):
        found = activations_of(profile, Way(4), device)
        assert found.upper_bytes > 1.005 * found.peak_bytes + FIXED_MARGIN_BYTES[device] // 2


def test_recompute_of_some_blocks_lies_between_all_and_none():
    # Each of four blocks keeps 200 for backward, and one that is recomputed has that again for a moment.
    points = (ActivationPoint(4, False, 900, 1, 900), ActivationPoint(4, True, 300, 1, 300))
    points = (
        replace(points[0], held_bytes=850, freed_bytes=(200, 400, 600, 800)),
        replace(points[1], held_bytes=50, input_bytes=(0,) * 4, device_input_bytes=(0,) * 4),
    )
    profile = replace(transformer(4), activations=points)
    held = [activations_of(profile, Way(4, n), "cuda").peak_bytes for n in range(5)]
    assert held == [900, 700, 500, 300, 300]


def test_a_batch_that_the_engine_casts_has_room_twice():
    profile = profile_with((4, 1 << 30))
    given = replace(profile, activations=(replace(profile.activations[0], given_bytes=1 << 20),))
    found = [activations_of(p, Way(4), "cuda") for p in (profile, given)]
    assert found[1].upper_bytes - found[0].upper_bytes == 1 << 20
    assert found[1].peak_bytes == found[0].peak_bytes


def test_the_workspaces_of_cuda_are_not_expected_on_the_cpu():
    profile = profile_with((4, 100), workspace_bytes=30)
    assert peaks(profile, 4) == [70]
    assert peaks(profile, 4, device="cuda") == [100]


def test_recompute_that_was_not_profiled_has_no_activations():
    assert activations_of(profile_with((4, 100)), Way(4, 1), "cpu") is None
