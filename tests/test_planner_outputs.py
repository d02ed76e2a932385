import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.audit import audit
from memplan.configs.deepspeed import ds_config
from memplan.formatting import format_bytes, format_count, format_flops, format_seconds
from memplan.search import plan
from memplan.sizes import parse_bytes
from memplan.units import units_of
from offload.plan import Placement, Precision, Tier
from tests.synthetic_profiles import RATES, machine_of, transformer

PROFILE = transformer(4, precision="bf16")
BASE = plan(PROFILE, machine_of(1 << 30, 1 << 30, device="cuda"), RATES, batch_size=8)


def placed(parameters: Tier, gradients: Tier, optimizer: Tier):
    """The plan with every unit placed like this."""
    placements = tuple(Placement(p.unit, parameters, gradients, optimizer) for p in BASE.placements)
    return replace(BASE, placements=placements, nvme_dir="/swap")


def test_numbers_are_written_as_people_read_them():
    assert [format_bytes(n) for n in (0, 1023, 1024, 39007027, 1 << 30)] == [
        "0 B", "1023 B", "1.00 KiB", "37.2 MiB", "1.00 GiB",
    ]  # fmt: skip
    assert format_count(3_210_000_000) == "3.21 B"
    assert format_count(12) == "12"
    assert format_flops(1.2e12) == "1.20 TFLOP"
    assert [format_seconds(s) for s in (0, 2e-8, 0.0123, 1.236, 125, 7500)] == [
        "0 s", "20.0 ns", "12.3 ms", "1.24 s", "2 min 05 s", "2 h 05 min",
    ]  # fmt: skip


@given(st.integers(0, 1 << 49))
def test_written_bytes_read_back_within_half_a_percent(size):
    assert abs(parse_bytes(format_bytes(size)) - size) <= 1 + 0.0051 * size


@given(st.floats(0, 1e20))
def test_no_written_number_is_longer_than_its_column(value):
    assert all(len(f(value)) <= 14 for f in (format_bytes, format_count, format_flops))


def test_deepspeeds_batch_arithmetic_adds_up():
    found = plan(PROFILE, machine_of(1 << 30, 1 << 30, device="cuda", gpus=4), RATES, batch_size=24)
    config, _ = ds_config(found)
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 4
    assert config["train_batch_size"] == product == 24


@pytest.mark.parametrize(
    ("tiers", "stage", "optimizer", "parameters"),
    [
        ((Tier.GPU, Tier.GPU, Tier.GPU), 0, None, None),
        ((Tier.GPU, Tier.HOST, Tier.HOST), 1, "cpu", None),
        ((Tier.GPU, Tier.HOST, Tier.NVME), 3, "nvme", "none"),
        ((Tier.HOST, Tier.HOST, Tier.HOST), 3, "cpu", "cpu"),
        ((Tier.NVME, Tier.HOST, Tier.NVME), 3, "nvme", "nvme"),
    ],
)
def test_deepspeeds_stage_allows_the_offloading(tiers, stage, optimizer, parameters):
    config, _ = ds_config(placed(*tiers))
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero.get("offload_optimizer", {}).get("device") == optimizer
    assert zero.get("offload_param", {}).get("device") == parameters
    for section in (zero.get("offload_optimizer"), zero.get("offload_param")):
        if section and section["device"] == "nvme":
            assert section["nvme_path"] == "/swap"
    assert ("aio" in config) == (Tier.NVME in tiers)
    json.dumps(config)


def test_deepspeeds_buffers_hold_the_largest_parameter():
    config, _ = ds_config(placed(Tier.NVME, Tier.HOST, Tier.NVME))
    zero = config["zero_optimization"]
    assert zero["offload_param"]["buffer_size"] >= 50_000
    assert zero["sub_group_size"] >= 50_000


def test_what_deepspeed_can_not_express_is_said():
    mixed = (replace(BASE.placements[0], gradients=Tier.HOST, optimizer=Tier.HOST), *BASE.placements[1:])
    _, notes = ds_config(replace(BASE, placements=mixed, recompute=PROFILE.blocks))
    text = "\n".join(notes)
    assert "whole tiers" in text
    assert "stage 1 instead of 0" in text
    assert "torch.utils.checkpoint" in text


def test_precision_becomes_its_own_section():
    for precision, bf16, autocast in (
        (Precision.FP32, False, False),
        (Precision.AMP, False, True),
        (Precision.BF16, True, False),
    ):
        config, _ = ds_config(replace(BASE, precision=precision))
        assert config["bf16"]["enabled"] is bf16
        assert config["torch_autocast"]["enabled"] is autocast


def test_the_audit_refuses_what_does_not_add_up():
    shapes = units_of(PROFILE)
    assert audit(BASE, shapes) == []
    host = placed(Tier.HOST, Tier.HOST, Tier.HOST)
    assert any("host tier is predicted to hold 0 bytes" in problem for problem in audit(host, shapes))
    nvme = placed(Tier.GPU, Tier.HOST, Tier.NVME)
    assert any("nvme tier" in problem for problem in audit(nvme, shapes))
    small = replace(BASE, prediction=replace(BASE.prediction, gpu_peak_bytes=1000))
    assert any("model state on the gpu" in problem for problem in audit(small, shapes))
    tight = replace(BASE, budget=replace(BASE.budget, gpu_bytes=1000))
    assert any("over its budget" in problem for problem in audit(tight, shapes))
    assert any("not in the model" in problem for problem in audit(BASE, shapes[1:]))
    assert any("not in the plan" in problem for problem in audit(replace(BASE, placements=BASE.placements[1:]), shapes))
