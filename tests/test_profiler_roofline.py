"""Step times: the arithmetic of the roofline, the queue, and what models ask of them."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from profiler.calibration import ASSUMED, Calibration, Rate
from profiler.device import find_device
from profiler.events import BACKWARD, CLIP, FORWARD, LOSS, STEP, Call, Op
from profiler.kinds import kind_of, rate_of
from profiler.roofline import LAUNCH, op_seconds, step_time
from profiler.rows import UNLIKE
from profiler.trace import trace_step
from tests.profiler_models import GPT, conv_net, mean_square, next_token_loss, tokens

H200 = find_device("h200")
PERFECT = Calibration("", dict.fromkeys(ASSUMED.rates, Rate((), (1.0,))), dict.fromkeys(ASSUMED.issue_seconds, 0.0))
INSTANT = replace(H200, kernel_seconds=0.0)


@dataclass
class Weight:
    name: str
    shape: tuple[int, ...]
    bytes: int


def op(name="aten::mul", flops=0, moved=0, dtype="float32", shape=(), phase=FORWARD, module=""):
    return Op(name, flops, moved, dtype, module, phase, False, shape)


def time_of(events, calibration=PERFECT, device=INSTANT, trained=(), **options):
    return step_time(events, trained, options.pop("optimizer", "sgd"), False, device, calibration, **options)


def test_an_operation_takes_the_larger_of_computing_and_moving():
    product = op("aten::mm", 989_400_000_000, 1, "bfloat16", (1, 8, 8, 8, 16))
    assert op_seconds(product, INSTANT, PERFECT) == pytest.approx(1e-3)
    assert op_seconds(op(moved=4_800_000_000), INSTANT, PERFECT) == pytest.approx(1e-3)
    assert op_seconds(op("aten::view"), H200, PERFECT) == 0
    assert op_seconds(op(moved=1), H200, PERFECT) == H200.kernel_seconds


def test_products_use_tensor_cores_and_elementwise_work_does_not():
    flops = 66_900_000_000
    assert op_seconds(op("aten::mm", flops, 1, "float32", (1, 8, 8, 8, 16)), INSTANT, PERFECT) == pytest.approx(1e-3)
    assert op_seconds(op("aten::gelu", flops, 1, "bfloat16"), INSTANT, PERFECT) == pytest.approx(1e-3)
    convolution = op("aten::convolution", flops, 1, "float32", (8, 8, 8, 9, 1, 0))
    assert op_seconds(convolution, INSTANT, PERFECT) == pytest.approx(flops / 494.7e12)


def test_a_step_lasts_as_long_as_the_busier_of_cpu_and_device():
    events = [op(moved=4_800_000) for _ in range(1000)]  # 1 us each
    slow = replace(PERFECT, issue_seconds={**PERFECT.issue_seconds, "forward/elementwise": 5e-6})
    assert time_of(events).total_seconds == pytest.approx(1e-3)
    assert time_of(events).by_bound[LAUNCH] == pytest.approx(0)
    bound = time_of(events, slow)
    assert bound.total_seconds == pytest.approx(5e-3 + 1e-6)  # the last kernel begins when it has been issued
    assert bound.by_bound[LAUNCH] == pytest.approx(4e-3 + 1e-6)


def test_the_cpu_waits_for_a_value_that_it_reads():
    kernel, read = op(moved=9_600_000_000), op("aten::_local_scalar_dense", moved=4)
    issue = replace(PERFECT, issue_seconds={**PERFECT.issue_seconds, "forward/elementwise": 1e-3})
    # The second is issued while the first, of 2 ms, runs, unless a value is read in between.
    assert time_of([kernel, kernel], issue).total_seconds == pytest.approx(5e-3)
    assert time_of([kernel, read, kernel], issue).total_seconds == pytest.approx(6e-3)


@given(st.lists(st.tuples(st.integers(1, 10**9), st.sampled_from([FORWARD, LOSS, BACKWARD])), min_size=1, max_size=30))
def test_every_division_of_the_time_adds_up_to_it(sizes):
    events = [op(moved=size, phase=phase, module=phase) for size, phase in sizes] + [Call("x")]
    weights = [Weight("a", (1000, 1000), 4_000_000)]
    step = step_time(events, weights, "adamw", True, H200)
    for division in (step.by_phase, step.by_module, step.by_operation, step.by_bound):
        assert sum(division.values()) == pytest.approx(step.total_seconds)
    assert {CLIP, STEP} < set(step.by_phase)


def test_an_update_moves_the_parameters_bytes_a_number_of_times():
    weights = [Weight("a", (1 << 28,), 4 << 28)]
    at_once = replace(ASSUMED, issue_seconds=PERFECT.issue_seconds)
    fused = time_of([], at_once, trained=weights, optimizer="adamw-fused").total_seconds
    assert fused == pytest.approx(7 * (4 << 28) / 0.8 / 4.8e12, rel=0.02)
    assert time_of([], at_once, trained=weights, optimizer="adamw").total_seconds > 2 * fused


@given(st.floats(1, 1e6), st.floats(1, 1e6))
def test_rates_are_those_of_the_grid_at_its_points_and_between_them_elsewhere(x, y):
    rate = Rate(((10.0, 100.0, 1000.0), (10.0, 1000.0)), (0.1, 0.2, 0.3, 0.4, 0.5, None))
    assert rate.fraction((100, 1000)) == pytest.approx(0.4)
    assert rate.fraction(()) == pytest.approx(0.3)
    assert rate.fraction((100, 100)) == pytest.approx((0.3 * 0.4) ** 0.5)
    assert rate.fraction((10**9, 1)) == pytest.approx(0.5)
    assert rate.fraction((1000, 1000)) == pytest.approx(0.5) or rate.fraction((1000, 1000)) == pytest.approx(0.4)
    assert 0.1 - 1e-9 <= rate.fraction((x, y)) <= 0.5 + 1e-9


def test_what_was_not_measured_is_assumed():
    partial = Calibration("x", {"matmul/bfloat16": Rate((), (0.9,))}, {"forward/elementwise": 1e-6})
    assert partial.rate("matmul", "float16").fractions == (0.9,)
    assert partial.rate("norm", "float32") is ASSUMED.rates["norm"]
    assert partial.issue("forward/softmax") == 1e-6
    assert partial.issue("call") == ASSUMED.issue_seconds["call"]


def test_kinds_follow_from_names_and_shapes():
    kinds = {
        "aten::native_layer_norm_backward": "norm_backward",
        "aten::_log_softmax_backward_data": "softmax_backward",
        "aten::embedding_dense_backward": "embedding_backward",
        "aten::gelu_backward": "elementwise",
        "aten::add_": "elementwise",
        "aten::slice_backward": "padded",
        "aten::native_dropout_backward": "elementwise",
        "aten::native_batch_norm_backward": "batch_norm_backward",
        "aten::max_pool2d_with_indices_backward": "pool_backward",
        "mine::kernel": "elementwise",
    }
    assert {name: kind_of(op(name, moved=1)) for name in kinds} == kinds
    assert rate_of(op("aten::convolution", 1, 1, shape=(64, 32, 32, 9, 32, 0))) == ("depthwise", (64, 32, 9))
    assert rate_of(op("aten::convolution", 1, 1, shape=(64, 3, 8, 256, 1, 0))) == (
        "patch_convolution",
        (64, 3, 8, 256),
    )
    assert rate_of(op("aten::convolution_backward", 1, 1, shape=(64, 32, 64, 9, 4, 0))) == (
        "grouped_convolution_backward",
        (64, 8, 16, 9),
    )
    assert rate_of(op("aten::mm", 1, 1, shape=(1, 2, 3, 4, 2))) == ("matmul_unaligned", (2, 3, 4, 2))
    assert rate_of(op("attention", 1, 1, shape=(8, 4, 4, 64, 1, 0, 1)))[0] == "attention_causal_dropout"
    assert rate_of(op("aten::native_batch_norm", 1, 1, shape=(64, 8, 1))) == ("batch_norm_last", (64, 8))
    assert rate_of(op("aten::sum", 1, 1, shape=(8, 64, 1))) == ("reduction_columns", (8, 64))
    assert rate_of(op("aten::clone", 0, 16, shape=(UNLIKE,))) == ("copy_unlike", (16,))
    assert rate_of(op("aten::index", 0, 16, shape=(UNLIKE,))) == ("index", (16,))
    assert rate_of(op("aten::bmm", 1, 1, shape=(5, 2, 3, 4, 16))) == ("batched_matmul", (5, 2, 3, 4))


def test_layers_that_one_kernel_runs_are_one_operation_a_direction():
    model = nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16), nn.Linear(16, 16))
    trace = trace_step(model, torch.zeros(4, 16), lambda m, x: m(x).sum())
    types = {path: type(module).__name__ for path, module in model.named_modules()}
    whole = time_of(trace.events, module_types=types)
    parts = time_of(trace.events, ASSUMED, H200)
    assert {n for n in whole.by_operation if "rms" in n} == {"aten::_fused_rms_norm", "aten::_fused_rms_norm_backward"}
    assert not [n for n in whole.by_operation if "rsqrt" in n]
    assert time_of(trace.events, ASSUMED, H200, module_types=types).total_seconds < parts.total_seconds


def test_recurrent_layers_are_one_operation_a_direction():
    trace = trace_step(nn.LSTM(16, 32, 2), torch.zeros(10, 4, 16), lambda m, x: m(x)[0].sum())
    operations = time_of(trace.events).by_operation
    assert {"recurrent", "recurrent_backward"} < set(operations)
    assert not [n for n in operations if "sigmoid" in n or "mm" in n]


@pytest.mark.parametrize(
    ("model", "batch", "loss"),
    [(GPT(), tokens(), next_token_loss), (conv_net(), torch.zeros(2, 3, 8, 8), mean_square)],
    ids=["gpt", "conv"],
)
def test_a_small_model_is_bound_by_the_cpu_and_a_device_of_half_the_rates_is_no_faster(model, batch, loss):
    trace = trace_step(model, batch, lambda m, b: loss(m(b), b), "amp")
    trained = [p for p in trace.parameters if p.has_gradient]
    fast = step_time(trace.events, trained, "adamw", True, H200)
    slow = step_time(trace.events, trained, "adamw", True, find_device("t4"))
    assert fast.by_bound[LAUNCH] > fast.total_seconds / 3
    assert fast.total_seconds <= slow.total_seconds
    assert set(fast.by_phase) == {FORWARD, LOSS, BACKWARD, CLIP, STEP}


def test_every_parameter_and_every_repeated_part_costs_the_cpu_something():
    weights = [Weight("a", (8, 8), 256)] * 10
    costs = {**PERFECT.issue_seconds, "zero_grad": 1e-3, "checkpoint": 1e-2}
    calibration = replace(PERFECT, issue_seconds=costs)
    assert time_of([], calibration, trained=weights).total_seconds == pytest.approx(1e-2, rel=1e-3)
    repeated, other = op(moved=1, phase=BACKWARD)._replace(recompute=True), op(moved=1, phase=BACKWARD)
    found = time_of([repeated, repeated, other, repeated, other], calibration)
    assert found.total_seconds == pytest.approx(2e-2, rel=1e-3)
