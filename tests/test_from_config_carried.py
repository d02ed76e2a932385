"""``memplan plan --from``: the better configuration trains to the same numbers, and lists what it changes, no more."""

import json
from pathlib import Path

from memplan.configs.carried import carried
from memplan.configs.files import configurations
from memplan.from_config import Verdict
from tests.test_from_config import BATCHES, STAGE_2, judged

Z = "zero_optimization"
TRAINED = {
    "gradient_clipping": 0.3,
    "fp16": {"enabled": True, "initial_scale_power": 12},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    "steps_per_print": 7,
}
SLOW = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


def better(folder: Path, zero: dict, **more) -> Verdict:
    verdict = judged({**BATCHES, **TRAINED, Z: zero} | more, folder)
    assert verdict.better != verdict.theirs
    return verdict


def files(verdict: Verdict) -> dict[str, str]:
    return configurations(verdict.better, (), verdict.config)


def test_clipping_precision_optimizer_and_schedule_stay_as_they_are_written(tmp_path):
    config = json.loads(files(better(tmp_path, SLOW))["ds_config.json"])
    assert {key: config[key] for key in TRAINED} == TRAINED
    assert set(config) == {*TRAINED, *BATCHES, Z}


def test_what_the_trainer_compares_agrees_with_it(tmp_path):
    arguments = json.loads(files(better(tmp_path, SLOW))["huggingface-deepspeed.json"])
    assert arguments["max_grad_norm"] == 0.3
    assert (arguments["bf16"], arguments["fp16"]) == (False, True)
    assert (arguments["learning_rate"], arguments["weight_decay"], arguments["warmup_steps"]) == (3e-4, 0.1, 100)
    assert (arguments["adam_beta1"], arguments["adam_beta2"]) == (0.9, 0.95)
    assert "optim" not in arguments


def test_what_is_auto_or_not_written_stays_the_trainers(tmp_path):
    auto = {"gradient_clipping": "auto", "fp16": {"enabled": False}, "bf16": {"enabled": True}}
    verdict = better(tmp_path, SLOW, **auto)
    assert verdict.config["gradient_clipping"] == "auto"
    arguments = json.loads(files(verdict)["huggingface-deepspeed.json"])
    assert "max_grad_norm" not in arguments
    assert arguments["bf16"] is True
    assert "which Lightning does not fill in" in files(verdict)["lightning_deepspeed.py"]


def test_lightning_gets_the_clipping_and_the_precision(tmp_path):
    text = files(better(tmp_path, SLOW))["lightning_deepspeed.py"]
    assert '"gradient_clip_val": 0.3' in text
    assert '"precision": "16-true"' in text


def test_a_configuration_with_an_optimizer_needs_no_note_about_one(tmp_path):
    notes = files(better(tmp_path, SLOW))["NOTES.md"]
    assert "left to the training script" not in notes
    without = judged({**STAGE_2, Z: SLOW}, tmp_path)
    assert "left to the training script" in configurations(without.better, (), without.config)["NOTES.md"]


def test_defaults_that_come_by_themselves_and_batches_that_follow_are_no_changes(tmp_path):
    config = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 4, Z: SLOW}
    keys = {change.key for change in judged(config, tmp_path).changes}
    assert f"{Z}.offload_optimizer.device" in keys
    assert not keys & {"train_batch_size", f"{Z}.overlap_comm", f"{Z}.stage3_gather_16bit_weights_on_model_save"}


def test_a_key_without_an_effect_at_the_new_stage_is_no_change(tmp_path):
    fields = {"stage": 1, "offload_optimizer": {"device": "cpu"}, "allgather_bucket_size": 7_000_000}
    verdict = better(tmp_path, fields)
    assert verdict.better.zero_stage == 0
    assert f"{Z}.allgather_bucket_size" not in {change.key for change in verdict.changes}


def test_what_a_plan_does_not_decide_stays_in_its_section(tmp_path):
    zero = {**SLOW, "stage3_gather_16bit_weights_on_model_save": True, "ignore_unused_parameters": False}
    verdict = better(tmp_path, zero)
    assert verdict.config[Z]["stage3_gather_16bit_weights_on_model_save"] is True
    assert verdict.config[Z]["ignore_unused_parameters"] is False
    assert "load_from_fp32_weights" not in verdict.config[Z]


def test_what_is_lost_of_that_section_is_a_change(tmp_path):
    zero = {**SLOW, "zero_quantized_gradients": True, "zenflow": {"topk_ratio": 0.2}}
    changes = {change.key: (change.theirs, change.better) for change in better(tmp_path, zero).changes}
    assert changes[f"{Z}.zero_quantized_gradients"][0] == "True"
    assert changes[f"{Z}.zenflow.topk_ratio"] == ("0.2", "left out")


def test_an_older_form_is_no_default_and_what_deepspeed_stops_at_is_left_out(tmp_path):
    config = {**BATCHES, "bf16": {"enabled": True}}
    for zero, change in (
        (True, (f"{Z}.stage", "1", "0")),
        ({"stage": 3, "cpu_offload": True}, (f"{Z}.cpu_offload", "True", "left out")),
        ({**SLOW, "mics_shard_size": 2}, (f"{Z}.mics_shard_size", "2", "left out")),
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, (f"{Z}.stage", "1", "0")),
    ):
        verdict = judged({**config, Z: zero}, tmp_path)
        assert change in {(c.key, c.theirs, c.better) for c in verdict.changes}


def test_what_is_carried_over_and_does_not_go_with_what_is_new_is_said(tmp_path):
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    config = {**BATCHES, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, Z: zero}
    verdict = judged(config, tmp_path)
    assert verdict.errors == ()
    assert any(
        remark.startswith("In the better configuration bf16.bf16_master_weights_and_grads: ")
        for remark in verdict.remarks
    )


def test_a_configuration_that_is_as_fast_as_the_best_is_written_as_it_is(tmp_path):
    config = {**STAGE_2, Z: {"stage": 0, "allgather_bucket_size": 7_000_000}}
    verdict = judged(config, tmp_path)
    assert (verdict.better, verdict.changes) == (verdict.theirs, ())
    assert json.loads(files(verdict)["ds_config.json"]) == config


def test_an_older_form_of_the_section_is_no_obstacle(tmp_path):
    verdict = judged({**BATCHES, "bf16": {"enabled": True}, Z: True}, tmp_path)
    assert verdict.theirs.zero_stage == 1
    assert "accelerate-deepspeed.yaml" in files(verdict)


def test_remarks_of_a_person_stay_and_unknown_keys_go():
    planned = {Z: {"stage": 1}, **BATCHES}
    assert carried(planned, {"_why": "a try", "zero_optimisation": {}}) == {**planned, "_why": "a try"}
