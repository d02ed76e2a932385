"""``memplan plan --from``: what is said of a DeepSpeed configuration that a person already has."""

import json
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from memplan.activations import FIXED_MARGIN_BYTES
from memplan.configs.deepspeed import ds_config
from memplan.errors import ConfigError, NothingFits, PlanningError
from memplan.formatting import format_bytes
from memplan.from_config import GivenConfig, Verdict, judge
from memplan.machine import Machine
from memplan.rates import PLANNED
from memplan.search import plan
from memplan.show_verdict import verdict_tables
from offload.plan import Plan, Target, Tier
from profiler.profile import ModelProfile
from tests.synthetic_profiles import RATES, machine_of, transformer

GIB = 1 << 30
MODEL = transformer(6, 40_000_000, 60_000_000, precision="bf16")
"""3.6e8 parameters: 2 GiB of masters and moments on each of two GPUs."""
AMPLE = machine_of(60 * GIB, 200 * GIB, 500 * GIB, device="cuda", gpus=2)
BATCHES = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
STAGE_2 = {**BATCHES, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
NOT_PLANNED_ANEW = ("stage", "device", "batch", "accumulation")


def read(config: dict, folder: Path) -> GivenConfig:
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config))
    return GivenConfig.read(path)


def judged(config: dict, folder: Path, machine: Machine = AMPLE, profile: ModelProfile = MODEL) -> Verdict:
    return judge(profile, machine, RATES, read(config, folder))


def printed(verdict: Verdict) -> str:
    console = Console(width=160, record=True, file=StringIO())
    console.print(verdict_tables("mine.json", verdict))
    return console.export_text()


def of_training(plan: Plan) -> dict[str, object]:
    """What is predicted beside the start, at which a configuration does not tell who builds the model."""
    p = plan.prediction
    gpu = {phase: size for phase, size in p.phases["gpu"].items() if phase != "attach"}
    host = {phase: size for phase, size in p.phases["host"].items() if phase != "attach"}
    return {"gpu": gpu, "host": host, "nvme": p.nvme_bytes, "seconds": p.step_seconds, "lanes": p.lane_seconds}


@given(
    gpu=st.floats(0.4, 12),
    host=st.one_of(st.just(0.0), st.floats(0.5, 40)),
    nvme=st.sampled_from([0, 200]),
    ranks=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    precision=st.sampled_from(PLANNED),
)
@settings(
    deadline=None,
    max_examples=20,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_what_was_written_for_a_plan_is_read_back_as_that_plan(tmp_path, gpu, host, nvme, ranks, precision):
    gpus, nodes = ranks
    budgets = (FIXED_MARGIN_BYTES["cuda"] + int(gpu * GIB), int(host * GIB), nvme * GIB)
    machine = replace(machine_of(*budgets, device="cuda", gpus=gpus), nodes=nodes)
    profile = transformer(6, 40_000_000, 60_000_000, precision=precision.value)
    try:
        mine = plan(profile, machine, RATES, batch_size=8, target=Target.DEEPSPEED)
    except NothingFits:
        assume(False)
    verdict = judged(ds_config(mine)[0], tmp_path, machine, profile)
    theirs = verdict.theirs
    assert verdict.better == mine
    assert [c for c in verdict.changes if any(word in c.key for word in NOT_PLANNED_ANEW)] == []
    assert verdict.changes == ()
    assert (theirs.zero_stage, theirs.placements, theirs.gpu_update_share) == (
        mine.zero_stage, mine.placements, mine.gpu_update_share,
    )  # fmt: skip
    assert theirs.prediction.gpu_peak_bytes >= mine.prediction.gpu_peak_bytes
    assert theirs.recompute == mine.recompute
    assert of_training(theirs) == of_training(mine)
    assert theirs.zero_stage == 3 or theirs.prediction == mine.prediction
    assert verdict.shortages == ()
    assert "There is nothing to change." in printed(verdict)


def test_a_configuration_that_is_too_large_says_where_and_what_would_fit(tmp_path):
    machine = replace(AMPLE, gpu_bytes=3 * GIB)
    verdict = judged(STAGE_2, tmp_path, machine)
    short = verdict.theirs.prediction.gpu_upper_bytes - 3 * GIB
    assert short > 0
    needs = format_bytes(short + 3 * GIB)
    assert verdict.shortages == (
        f"It does not fit: the gpu tier needs {needs} of 3.00 GiB, short {format_bytes(short)}.",
    )
    assert verdict.better is not None
    assert verdict.better.prediction.gpu_upper_bytes <= 3 * GIB
    assert verdict.better.target is Target.DEEPSPEED
    assert verdict.own is not None
    assert verdict.own.target is Target.MEMPLAN
    config = ds_config(verdict.better)[0]
    keys = {change.key: change for change in verdict.changes}
    for key, change in keys.items():
        value = config
        for name in key.split("."):
            value = value[name]
        assert change.better.replace(",", "") == str(value)
        assert change.theirs != change.better
    text = printed(verdict)
    assert verdict.shortages[0] in text
    assert "what to change" in text


def test_the_host_can_be_what_is_short(tmp_path):
    config = {**STAGE_2, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    verdict = judged(config, tmp_path, replace(AMPLE, host_bytes=GIB))
    assert len(verdict.shortages) == 1
    assert "the host tier needs" in verdict.shortages[0]
    assert {p.optimizer for p in verdict.theirs.placements} == {Tier.HOST}


def test_what_fits_is_said_to_fit(tmp_path):
    verdict = judged(STAGE_2, tmp_path)
    assert verdict.shortages == ()
    assert "It fits." in printed(verdict)
    assert verdict.theirs.micro_batch_size * verdict.theirs.gradient_accumulation_steps * 2 == 8
    assert any("without gradient checkpointing" in remark for remark in verdict.remarks)


def test_recompute_is_counted_where_it_is_needed(tmp_path):
    profile = transformer(6, 1_000_000, 0, 0, precision="bf16", activation=GIB)
    config = {**STAGE_2, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000}}
    verdict = judged(config, tmp_path, replace(AMPLE, gpu_bytes=2 * GIB), profile)
    assert verdict.shortages == ()
    assert verdict.theirs.recompute == profile.blocks
    assert any("all 6 blocks recomputed" in remark for remark in verdict.remarks)


def test_a_configuration_that_fits_is_not_changed_for_a_slower_one(tmp_path):
    profile = transformer(6, 1_000_000, 0, 0, precision="bf16")
    small = replace(AMPLE, gpu_bytes=FIXED_MARGIN_BYTES["cuda"] + (80 << 20), host_bytes=GIB, nvme_bytes=0)
    config = {**STAGE_2, "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 500_000}}
    with pytest.raises(NothingFits):
        plan(profile, small, RATES, batch_size=8, target=Target.DEEPSPEED)
    verdict = judged(config, tmp_path, small, profile)
    assert verdict.shortages == ()
    assert verdict.better == verdict.theirs
    assert verdict.changes == ()
    text = printed(verdict)
    assert "It fits." in text
    assert "There is nothing to change." in text


def test_where_nothing_fits_it_is_said_and_nothing_is_proposed(tmp_path):
    verdict = judged(STAGE_2, tmp_path, replace(AMPLE, gpu_bytes=300 << 20, host_bytes=0, nvme_bytes=0))
    assert (verdict.better, verdict.own, verdict.changes) == (None, None, ())
    assert "No other configuration of DeepSpeed fits either." in printed(verdict)
    assert not any("would not fit" in remark for remark in verdict.remarks)


def test_a_model_that_only_starts_under_zero_init_is_said_to(tmp_path):
    config = {**STAGE_2, "zero_optimization": {"stage": 3}}
    verdict = judged(config, tmp_path, replace(AMPLE, host_bytes=GIB))
    assert verdict.shortages == ()
    assert any("counted under deepspeed.zero.Init" in remark for remark in verdict.remarks)
    verdict = judged(config, tmp_path)
    assert any("deepspeed.zero.Init avoids that" in remark for remark in verdict.remarks)


def test_fp16_is_counted_as_bf16(tmp_path):
    half = judged({**BATCHES, "fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}, tmp_path)
    assert "fp16 is counted as bf16: the same bytes." in half.remarks
    assert half.theirs == judged(STAGE_2, tmp_path).theirs


def test_offloading_that_deepspeed_has_not_is_a_sentence(tmp_path):
    config = {**STAGE_2, "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
    with pytest.raises(PlanningError, match="offloads parameters in ZeRO stage 3 only"):
        judged(config, tmp_path)


def test_a_disk_that_only_the_configuration_names_is_the_plans(tmp_path):
    away = {"device": "nvme", "nvme_path": "/scratch"}
    config = {**STAGE_2, "zero_optimization": {"stage": 3, "offload_optimizer": away}}
    verdict = judged(config, tmp_path, machine_of(60 * GIB, 200 * GIB, device="cuda", gpus=2))
    assert verdict.theirs.nvme_dir == "/scratch"
    assert any("the nvme tier needs" in sentence for sentence in verdict.shortages)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({**BATCHES, "train_batch_size": 9}, "train_batch_size 9 is not"),
        ({"train_batch_size": 3}, "train_batch_size 3"),
        ({"gradient_accumulation_steps": 2}, "neither train_batch_size nor"),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, "neither train_batch_size nor"),
    ],
)
def test_batch_sizes_that_do_not_agree_are_refused(tmp_path, sizes, said):
    with pytest.raises(ConfigError, match=said):
        judged({**sizes, "bf16": {"enabled": True}}, tmp_path)


def test_a_micro_batch_that_the_profile_does_not_know_is_refused(tmp_path):
    with pytest.raises(PlanningError, match="--batch-size 32"):
        judged({"train_micro_batch_size_per_gpu": 32, "bf16": {"enabled": True}}, tmp_path)


def test_another_precision_than_the_profiles_is_refused(tmp_path):
    with pytest.raises(PlanningError, match="made in bf16"):
        judged(BATCHES, tmp_path)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{ "a": ', "\x00\x01"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        GivenConfig.read(path)


@pytest.mark.parametrize(
    "zero", [{"stage": 7}, {"stage": "two"}, {"stage": 3, "reduce_bucket_size": "large"}, {"stage": None}, [], 3]
)
def test_values_of_no_use_end_in_no_error_of_ours(tmp_path, zero):
    with suppress(ConfigError, PlanningError):
        assert judged({**STAGE_2, "zero_optimization": zero}, tmp_path).theirs.zero_stage in range(4)
