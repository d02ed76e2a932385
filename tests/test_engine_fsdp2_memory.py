from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.engines.fsdp2_memory import FSDP2Setup, fsdp2_held, fsdp2_traffic
from memplan.engines.held import ATTACH, BACKWARD, FORWARD, PHASES, STEP
from offload.plan import Precision
from offload.residency import UnitShape
from profiler.profile import ParameterProfile

GB = 10**9


def parameter(name: str, *shape: int, trainable: bool = True) -> ParameterProfile:
    return ParameterProfile(name, shape, "float32", trainable)


def llama_3b() -> tuple[tuple[UnitShape, ...], tuple[ParameterProfile, ...]]:
    """3.21e9 parameters, as measured; the embedding is tied to the head, so that the root owns it."""
    hidden, layers, key_value, feed_forward, vocabulary = 3072, 28, 1024, 8192, 128256
    found = [
        ParameterProfile("embed.weight", (vocabulary, hidden), "float32", True, aliases=("head.weight",)),
        parameter("norm.weight", hidden),
    ]
    for i in range(layers):
        for name, shape in (
            ("q", (hidden, hidden)), ("k", (key_value, hidden)), ("v", (key_value, hidden)), ("o", (hidden, hidden)),
            ("gate", (feed_forward, hidden)), ("up", (feed_forward, hidden)), ("down", (hidden, feed_forward)),
            ("norm1", (hidden,)), ("norm2", (hidden,)),
        ):  # fmt: skip
            found.append(parameter(f"layers.{i}.{name}.weight", *shape))
    return units(("", *(f"layers.{i}" for i in range(layers))), found), tuple(found)


def units(names: tuple[str, ...], parameters: list[ParameterProfile]) -> tuple[UnitShape, ...]:
    def own(name: str) -> list[int]:
        inner = [p for p in parameters if any(n and p.name.startswith(n + ".") for n in names)]
        mine = [p for p in parameters if p.name.startswith(name + ".")] if name else [
            p for p in parameters if p not in inner
        ]  # fmt: skip
        return [p.elements for p in mine]

    return tuple(UnitShape.of(name, own(name)) for name in names)


UNITS, PARAMETERS = llama_3b()
ELEMENTS = sum(p.elements for p in PARAMETERS)
ONE = FSDP2Setup(1, 1, 0, Precision.BF16, offload=True, reshard_after_forward=True)
TWO = replace(ONE, gpus=2)
# What plain training of this model and batch holds at the start of backward, beside the engine: 12 bytes a token and
# vocabulary entry in the loss, and the inputs of the recomputed layers.
TOKENS = 8 * 2048
ACTIVATIONS = TOKENS * (12 * 128256 + 28 * 3072 * 2)


def test_host_memory_of_offloading_is_the_measured_one_within_two_percent():
    """Measured on an H200: 63.9 GB with one rank, of which 1.8 are the process itself; 33 and 2.2 a rank with two."""
    assert fsdp2_held(UNITS, PARAMETERS, ONE).host[STEP] == pytest.approx((63.9 - 1.8) * GB, rel=0.02)
    assert fsdp2_held(UNITS, PARAMETERS, TWO).host[STEP] == pytest.approx(2 * (33 - 2.2) * GB, rel=0.02)


def test_resident_state_on_two_gpus_is_the_measured_one_within_two_percent():
    """48.8 GB allocated resident, 29.5 offloaded, both at the loss: shards and moments, no gradients yet."""
    resident = fsdp2_held(UNITS, PARAMETERS, replace(TWO, offload=False))
    assert resident.gpu[STEP] - ELEMENTS * 4 // 2 == pytest.approx((48.8 - 29.5) * GB, rel=0.02)


def test_gpu_peaks_of_the_start_of_backward_are_the_measured_ones_within_three_percent():
    """What is held there is what forward held: gradients come later."""
    resident = fsdp2_held(UNITS, PARAMETERS, replace(TWO, offload=False)).gpu[FORWARD]
    assert resident + ACTIVATIONS == pytest.approx(48.8 * GB, rel=0.03)


def test_gpu_peak_of_offloading_is_bounded_from_above_by_at_most_ten_percent():
    """Measured: 29.3 GB with one rank. The held maximum of backward and the activations' do not coincide."""
    bound = fsdp2_held(UNITS, PARAMETERS, ONE).gpu[BACKWARD] + ACTIVATIONS
    assert 29.3 * GB <= bound <= 1.10 * 29.3 * GB


def test_offloaded_state_leaves_nothing_on_the_gpu_in_the_step():
    assert fsdp2_held(UNITS, PARAMETERS, ONE).gpu[STEP] == 0


def test_every_rank_of_a_node_builds_the_whole_model_on_the_cpu_first():
    held = fsdp2_held(UNITS, PARAMETERS, FSDP2Setup(16, 2, 0, Precision.BF16, False, True))
    assert held.host[ATTACH] == 8 * 4 * ELEMENTS
    assert held.host[STEP] == 0


def test_resident_shards_take_sixteen_bytes_a_parameter_over_the_ranks_that_share_a_copy():
    setup = FSDP2Setup(16, 2, 8, Precision.BF16, False, True)
    assert fsdp2_held(UNITS, PARAMETERS, setup).gpu[STEP] == 16 * ELEMENTS // 8


def test_the_foreach_update_makes_a_copy_of_the_parameters_and_the_fused_one_does_not():
    setup = FSDP2Setup(8, 1, 0, Precision.BF16, False, True)
    fused, foreach = (fsdp2_held(UNITS, PARAMETERS, replace(setup, fused=f)).gpu[STEP] for f in (True, False))
    assert foreach - fused == 4 * ELEMENTS // 8


def test_without_resharding_all_units_stay_whole_until_backward():
    setup = FSDP2Setup(8, 1, 0, Precision.BF16, False, False)
    whole = fsdp2_held(UNITS, PARAMETERS, setup).gpu[FORWARD]
    two_units = fsdp2_held(UNITS, PARAMETERS, replace(setup, reshard_after_forward=True)).gpu[FORWARD]
    assert whole >= 12 * ELEMENTS // 8 + 2 * ELEMENTS > two_units


def test_a_dimension_that_does_not_divide_is_padded_to_the_largest_shard():
    odd = [parameter("a.weight", 5, 3)]
    held = fsdp2_held(units(("a",), odd), odd, FSDP2Setup(4, 1, 0, Precision.FP32, False, True))
    assert held.gpu[STEP] == 16 * 2 * 3


def test_frozen_parameters_have_neither_gradients_nor_moments():
    frozen = [parameter("a.weight", 8, 8, trainable=False)]
    shapes = (UnitShape.of("a", [], [64]),)
    held = fsdp2_held(shapes, frozen, FSDP2Setup(4, 1, 0, Precision.FP32, False, True))
    assert held.gpu[STEP] == 4 * 64 // 4
    assert fsdp2_traffic(shapes, frozen, replace(ONE, gpus=4)).d2h_backward_bytes == 0


def test_offloaded_shards_cross_the_link_twice_in_fp32_and_gradients_once():
    inner = ELEMENTS - (128256 + 1) * 3072  # the root stays gathered from forward to backward
    traffic = fsdp2_traffic(UNITS, PARAMETERS, TWO)
    assert traffic.h2d_forward_bytes == traffic.d2h_backward_bytes == 4 * ELEMENTS // 2
    assert traffic.h2d_backward_bytes == 4 * inner // 2
    assert traffic.cpu_update_elements == ELEMENTS // 2
    assert traffic.nvme_read_bytes == traffic.nvme_write_bytes == 0


def test_gathers_are_in_bf16_and_reductions_in_fp32():
    traffic = fsdp2_traffic(UNITS, PARAMETERS, FSDP2Setup(8, 1, 0, Precision.BF16, False, False))
    assert traffic.gather_bytes == 7 * 2 * ELEMENTS // 8
    assert traffic.reduce_bytes == 7 * 4 * ELEMENTS // 8
    assert traffic.h2d_forward_bytes == traffic.cpu_update_elements == 0


def test_replicas_of_nodes_add_an_all_reduce_of_the_shards():
    traffic = fsdp2_traffic(UNITS, PARAMETERS, FSDP2Setup(16, 2, 8, Precision.BF16, False, True))
    assert traffic.reduce_bytes == 7 * 4 * ELEMENTS // 8 + 4 * ELEMENTS // 8


SETUPS = st.builds(
    lambda ranks, nodes, hybrid, **kinds: FSDP2Setup(ranks * nodes, nodes, ranks if hybrid else 0, **kinds),
    ranks=st.integers(1, 9),
    nodes=st.integers(1, 3),
    hybrid=st.booleans(),
    precision=st.sampled_from(Precision),
    offload=st.booleans(),
    reshard_after_forward=st.booleans(),
    micro_batches=st.integers(1, 3),
    fused=st.booleans(),
)
SHAPES = st.lists(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=2), max_size=3), min_size=1, max_size=4)


def model(shapes: list[list[list[int]]]) -> tuple[tuple[UnitShape, ...], list[ParameterProfile]]:
    names = ["", *(f"u{i}" for i in range(1, len(shapes)))]
    parameters = [
        parameter(f"{unit}.p{k}" if unit else f"p{k}", *shape, trainable=(k + len(unit)) % 3 > 0)
        for unit, members in zip(names, shapes, strict=True)
        for k, shape in enumerate(members)
    ]
    return tuple(UnitShape(name, 0, 0) for name in names), parameters


@given(SHAPES, SETUPS)
def test_any_model_and_setup_can_be_priced(shapes, setup):
    found = fsdp2_held(*model(shapes), setup)
    assert set(found.gpu) == set(found.host) == set(PHASES)
    assert min(*found.gpu.values(), *found.host.values(), found.pinned_bytes) >= 0
    assert found.pinned_bytes <= max(found.host[phase] for phase in PHASES)
    traffic = fsdp2_traffic(*model(shapes), setup)
    assert all(isinstance(size, int) and size >= 0 for size in vars(traffic).values())


@given(SHAPES, SETUPS)
def test_offloading_never_holds_more_on_the_gpu_in_the_step_nor_less_on_the_host(shapes, setup):
    away, here = (fsdp2_held(*model(shapes), replace(setup, offload=o)) for o in (True, False))
    assert away.gpu[STEP] <= here.gpu[STEP]
    assert away.host[STEP] >= here.host[STEP]


@given(SHAPES, SETUPS)
def test_resharding_never_holds_more_at_the_end_of_forward_than_all_units_whole(shapes, setup):
    resharded, kept = (
        fsdp2_held(*model(shapes), replace(setup, reshard_after_forward=r)).gpu[FORWARD] for r in (True, False)
    )
    assert resharded <= kept
