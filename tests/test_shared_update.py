"""How the planner shares the update of the host's state between CPU and GPU."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.rates import Curve
from memplan.shared_update import COMPILED, WIDENED, shared_update
from offload.plan import MomentFormat, OptimizerKind, Precision, StateFormat
from tests.synthetic_profiles import RATES, SHARED_RATES

BF16 = StateFormat(Precision.BF16)
H200 = replace(
    RATES,
    cpu_update_seconds=dict.fromkeys(Precision, 0.24e-9),
    streamed_update_seconds=dict.fromkeys(Precision, 0.277e-9),
    cpu_update_beside_streamed=0.28 / 0.24,
    streamed_update_beside_cpu=1.0,
    host_to_device=Curve.flat(55e9),
    duplex_share=0.92,
)


def test_on_one_gpu_that_was_measured_both_take_what_was_measured_together():
    found = shared_update(H200, BF16, "cuda", ranks=1)
    assert found.seconds == pytest.approx(0.148e-9, rel=0.15)
    assert 0.35 < found.gpu_share < 0.5


@given(
    st.builds(
        lambda cpu, gpu, beside_gpu, beside_cpu, link: replace(
            SHARED_RATES,
            cpu_update_seconds=dict.fromkeys(Precision, 10**cpu),
            streamed_update_seconds=dict.fromkeys(Precision, 10**gpu),
            cpu_update_beside_streamed=beside_gpu,
            streamed_update_beside_cpu=beside_cpu,
            host_to_device=Curve.flat(10**link),
        ),
        st.floats(-10, -8),
        st.floats(-10, -8),
        st.floats(1, 3),
        st.floats(1, 3),
        st.floats(9, 12),
    ),
    st.builds(StateFormat, st.sampled_from([Precision.BF16, Precision.FP32]), st.sampled_from(OptimizerKind)),
    st.integers(1, 8),
)
def test_the_cpu_is_the_last_and_both_are_faster_than_it_alone(rates, form, ranks):
    found = shared_update(rates, form, "cuda", ranks)
    alone = shared_update(replace(rates, streamed_update_seconds={}), form, "cuda", ranks)
    assert alone.gpu_share == 0
    assert found.cpu_seconds == alone.seconds
    assert found.seconds <= alone.seconds
    if found.gpu_share:
        scale = alone.seconds / rates.cpu_update_seconds[form.precision] / ranks
        gpu = found.gpu_share * rates.streamed_update_seconds[form.precision] * scale * rates.streamed_update_beside_cpu
        assert gpu <= found.seconds * (1 + 1e-9)


def test_where_the_cpu_computes_nothing_is_shared():
    assert shared_update(SHARED_RATES, BF16, "cpu", 1).gpu_share == 0


@pytest.mark.parametrize(("device", "longer"), [("cpu", WIDENED), ("cuda", COMPILED)])
@pytest.mark.parametrize("moments", [MomentFormat.BF16, MomentFormat.EIGHT_BIT])
def test_narrow_moments_take_as_much_longer_as_was_measured_of_the_update_that_is_used(moments, device, longer):
    alone = replace(SHARED_RATES, streamed_update_seconds={})
    narrow, wide = (shared_update(alone, replace(BF16, moments=m), device, 1) for m in (moments, MomentFormat.FP32))
    assert narrow.seconds == pytest.approx(wide.seconds * longer[moments])
