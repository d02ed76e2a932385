"""``memplan plan --from``: keys that cost gigabytes, that stop DeepSpeed, or that nobody counts, are told of."""

import json
from dataclasses import replace

import pytest

from memplan.errors import PlanningError
from memplan.explanation import explanation_of
from memplan.lint.document import parse_document
from memplan.lint.view import View
from memplan.unpriced import unpriced
from offload.plan import Tier
from tests.synthetic_profiles import RATES
from tests.test_from_config import AMPLE, BATCHES, MODEL, STAGE_2, judged, printed

Z = "zero_optimization"
ELEMENTS = 6 * 40_000_000 + 2 * 60_000_000
"""Of the model, about."""


def priced(folder, zero: dict, **more):
    return judged({**STAGE_2, Z: zero, **more}, folder)


def gpu(verdict) -> int:
    return verdict.theirs.prediction.gpu_peak_bytes


def test_fp32_sums_of_gradients_are_counted_at_every_stage(tmp_path):
    fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    for stage, least in ((1, 3 * ELEMENTS), (2, ELEMENTS // 2), (3, ELEMENTS // 2)):
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
        assert gpu(priced(tmp_path, zero, **fp32)) - gpu(priced(tmp_path, zero)) > least


def test_the_type_of_the_collectives_is_counted(tmp_path):
    wide, narrow = (priced(tmp_path, {"stage": 2}, **more) for more in ({"communication_data_type": "fp32"}, {}))
    assert gpu(wide) - gpu(narrow) >= 2 * 500_000_000
    assert wide.theirs.prediction.lane_seconds["collective"] > narrow.theirs.prediction.lane_seconds["collective"]


def test_a_better_configuration_sums_gradients_as_the_persons_own_does(tmp_path):
    verdict = priced(tmp_path, {"stage": 1}, data_types={"grad_accum_dtype": "fp32"})
    assert verdict.config["data_types"] == {"grad_accum_dtype": "fp32"}
    # Stage 0, which is the fastest, would stop at sums in another type.
    assert priced(tmp_path, {"stage": 1}).better.zero_stage == 0
    assert verdict.better.zero_stage > 0


def test_a_second_partition_of_any_size_is_counted(tmp_path):
    one, two = (priced(tmp_path, {"stage": 3, "zero_hpz_partition_size": n}) for n in (1, 2))
    assert two.theirs.shard_gpus == 2
    assert gpu(two) - gpu(one) >= ELEMENTS


def test_room_for_parameters_in_host_memory_is_counted(tmp_path):
    away = {"device": "nvme", "nvme_path": "/scratch", "buffer_size": 60_000_000}
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}}
    none, default = (priced(tmp_path, {**zero, "offload_param": away | more}) for more in ({"max_in_cpu": 0}, {}))
    assert default.theirs.prediction.host_bytes > none.theirs.prediction.host_bytes
    # All of it has room there, so that nothing is read.
    assert default.theirs.prediction.lane_seconds["nvme"] < none.theirs.prediction.lane_seconds["nvme"]


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"stage": 3, "zero_hpz_partition_size": 3}, f"{Z}.zero_hpz_partition_size"),
        ({"stage": 3, "mics_shard_size": 2}, f"{Z}.mics_shard_size"),
        (
            {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch", "buffer_count": 2}},
            f"{Z}.offload_optimizer.buffer_count",
        ),
    ],
)
def test_what_stops_deepspeed_is_said_in_place_of_that_it_fits(tmp_path, zero, key):
    verdict = judged({**STAGE_2, "train_batch_size": 16, Z: zero}, tmp_path, replace(AMPLE, gpus=4))
    assert len(verdict.errors) == 1
    assert verdict.errors[0].startswith(f"Line 1, {key}: ")
    text = printed(verdict)
    assert "It does not start" in text
    assert "It fits." not in text
    assert "There is nothing to change." not in text


def test_a_misspelt_section_is_said_and_is_not_in_the_better_configuration(tmp_path):
    verdict = judged({**BATCHES, "bf16": {"enabled": True}, "zero_optimisation": {"stage": 3}}, tmp_path)
    assert "ZeRO stage 0 runs" in verdict.errors[0]
    assert "zero_optimisation" not in verdict.config
    assert [c.better for c in verdict.changes if c.key == "zero_optimisation"] == ["left out"]


def not_counted(config: dict) -> list[str]:
    return list(unpriced(View(parse_document(json.dumps(config)))))


def test_what_has_an_effect_and_is_not_counted_is_said():
    said = not_counted(
        {
            Z: {"stage": 3, "zero_quantized_weights": True, "reduce_scatter": True},
            "compile": {"deepcompile": True, "free_activation": True},
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
            "activation_checkpointing": {"cpu_checkpointing": True, "profile": True},
        }
    )
    assert said == [
        "Not counted, though it may take memory or time: zero_optimization.zero_quantized_weights true, compile, "
        "bf16.bf16_master_weights_and_grads true, activation_checkpointing.cpu_checkpointing true."
    ]


def test_what_costs_nothing_or_has_no_effect_is_not_said():
    assert not_counted(
        {
            "gradient_clipping": 0.3,
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "fp16": {"enabled": False, "fp16_master_weights_and_grads": True},
            "aio": {"queue_depth": 4},
            "steps_per_print": 10,
            Z: {"stage": 2, "zero_quantized_weights": True, "offload_optimizer": {"device": "cpu"}},
        }
    ) == []  # fmt: skip


def test_what_deepspeed_does_not_know_is_said_and_a_persons_remark_is_not():
    said = not_counted({"quite_another_thing": 3, "_why": "a try", Z: {"stage": 2}})
    assert said == ["DeepSpeed knows nothing of quite_another_thing, and passes over it."]


def test_a_step_is_explained_with_the_types_of_gradients_that_it_was_planned_with(tmp_path):
    slow = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    verdict = priced(tmp_path, slow, communication_data_type="fp32")
    better, predicted = verdict.better, verdict.better.prediction
    shown = explanation_of(MODEL, AMPLE, RATES, better, verdict.engine)
    assert shown.timeline.seconds == predicted.step_seconds
    assert explanation_of(MODEL, AMPLE, RATES, better).timeline.seconds < predicted.step_seconds


def test_an_optimizer_of_another_kind_is_said_to_be_counted_as_adam(tmp_path):
    verdict = judged({**STAGE_2, "optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}, tmp_path)
    assert any("counted as Adam's" in remark and "lion" in remark for remark in verdict.remarks)


@pytest.mark.parametrize("away", [{"device": "cpu"}, {"device": "nvme", "nvme_path": "/d", "buffer_size": 60_000_000}])
def test_parameters_may_be_off_the_gpu_while_their_state_is_on_it(tmp_path, away):
    verdict = priced(tmp_path, {"stage": 3, "offload_param": away})
    where = {(p.parameters, p.optimizer) for p in verdict.theirs.placements}
    assert where == {(Tier.HOST if away["device"] == "cpu" else Tier.NVME, Tier.GPU)}
    assert verdict.shortages == ()
    assert verdict.theirs.nvme_dir == away.get("nvme_path")


def test_a_sub_group_size_of_zero_is_a_sub_group_a_parameter(tmp_path):
    verdict = priced(tmp_path, {"stage": 3, "sub_group_size": 0})
    assert verdict.shortages == ()
    assert verdict.errors == ()


def test_state_on_nvme_below_stage_3_is_counted_in_host_memory_as_deepspeed_keeps_it(tmp_path):
    verdict = priced(tmp_path, {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/d"}})
    assert {p.optimizer for p in verdict.theirs.placements} == {Tier.HOST}
    assert any("nvme means cpu" in remark for remark in verdict.remarks)


def test_memory_that_nobody_asks_to_pin_is_not_counted_as_pinned(tmp_path):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    assert priced(tmp_path, zero).theirs.prediction.pinned_bytes == 0


def test_offloading_that_nothing_does_is_still_refused(tmp_path):
    with pytest.raises(PlanningError, match="in ZeRO stages 1 to 3 only"):
        priced(tmp_path, {"stage": 0, "offload_optimizer": {"device": "cpu"}})
