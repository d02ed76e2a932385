"""The typed view of a configuration holds what DeepSpeed itself makes of the file; the command says it in the end."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from memplan.errors import ConfigError
from memplan.lint import read_ds_config
from memplan.lint.document import read_document
from memplan.lint.facts import facts_about
from tests.commands import PATHS

MICRO = {"train_micro_batch_size_per_gpu": 2}
CONFIGS = [
    MICRO,
    MICRO | {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7e6, "sub_group_size": 1e12}},
    MICRO | {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 8, "max_live_parameters": 5}},
    MICRO | {"zero_optimization": {"stage": "2", "overlap_comm": True, "reduce_bucket_size": "5000"}},
    MICRO | {"zero_optimization": True},
    MICRO | {"zero_optimization": True, "allgather_size": 1000},
    MICRO | {"zero_optimization": {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": True}},
    MICRO | {"zero_optimization": {"stage": 3, "cpu_offload_param": True}},
    MICRO
    | {
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bfloat16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "offload_param": {"device": "nvme", "nvme_path": "/x", "buffer_size": 3e8, "buffer_count": 9},
            "offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 0.25},
        },
        "activation_checkpointing": {"cpu_checkpointing": True},
    },
    {
        "train_batch_size": 8,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 1, "stage3_max_reuse_distance": "auto"},
    },
    {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "torch_autocast": {"enabled": True, "dtype": "bf16"}},
]


def written(tmp_path, config):
    path = tmp_path / "ds_config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config, indent=2))
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_value_is_the_one_that_deepspeed_takes(tmp_path, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = pytest.importorskip("deepspeed")
        theirs = deepspeed.DeepSpeedConfig(json.loads(json.dumps(config)))
    ours, zero = read_ds_config(written(tmp_path, config)), theirs.zero_config
    assert ours.stage == zero.stage
    assert ours.overlap_comm == zero.overlap_comm
    for name, theirs_name in {
        "reduce_bucket_elements": "reduce_bucket_size",
        "allgather_bucket_elements": "allgather_bucket_size",
        "sub_group_elements": "sub_group_size",
        "prefetch_bucket_elements": "prefetch_bucket_size",
        "persistence_threshold_elements": "param_persistence_threshold",
        "max_live_elements": "max_live_parameters",
        "max_reuse_distance_elements": "max_reuse_distance",
        "contiguous_gradients": "contiguous_gradients",
        "reduce_scatter": "reduce_scatter",
        "round_robin_gradients": "round_robin_gradients",
        "hpz_partition_size": "zero_hpz_partition_size",
    }.items():
        assert getattr(ours, name) == getattr(zero, theirs_name), name
    for mine, other in ((ours.offload_param, zero.offload_param), (ours.offload_optimizer, zero.offload_optimizer)):
        if other is None:
            assert mine.device == "none"
            continue
        assert (mine.device, mine.pin_memory, mine.buffer_count) == (other.device, other.pin_memory, other.buffer_count)
        assert mine.nvme_path == (str(other.nvme_path) if other.nvme_path else None)
    assert ours.gradient_clipping == theirs.gradient_clipping
    assert ours.cpu_checkpointing == theirs.activation_checkpointing_config.cpu_checkpointing
    enabled = {"fp16": theirs.float16_config.enabled, "bf16": theirs.bfloat16_config.enabled}
    enabled["autocast"] = theirs.torch_autocast_enabled
    assert ours.precision == next((name for name, on in enabled.items() if on), "fp32")
    sizes = (theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps)
    assert ours.batch_sizes(1) == sizes


def test_auto_is_left_to_others(tmp_path):
    config = read_ds_config(written(tmp_path, {"train_batch_size": "auto", "gradient_clipping": "auto"}))
    assert (config.train_batch_size, config.gradient_clipping) == (None, 1.0)
    with pytest.raises(ConfigError, match="neither train_batch_size"):
        config.batch_sizes(1)


def test_batch_sizes_that_do_not_agree_are_refused(tmp_path):
    config = read_ds_config(written(tmp_path, {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2}))
    with pytest.raises(ConfigError, match="train_batch_size 9 is not"):
        config.batch_sizes(2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"zero_optimization": {"stage": 4}}', r"line 1: zero_optimization.stage: 4 is none of"),
        ('{"elasticity": {}}', "elasticity: DeepSpeed 0.19.8 stops at start"),
        ("[1]", "this is a list"),
        ("{", "this brace is never closed"),
    ],
)
def test_a_configuration_of_no_use_is_a_sentence(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_ds_config(written(tmp_path, text))


def test_facts_tell_of_the_disk_and_the_model(tmp_path):
    (tmp_path / "swap").mkdir()
    section = {"offload_param": {"nvme_path": str(tmp_path / "swap")}, "offload_optimizer": {"nvme_path": "/not/here"}}
    document = read_document(written(tmp_path, {"zero_optimization": section}))
    model = tmp_path / "net.py"
    model.write_text(
        "import torch\nmodel = torch.nn.Linear(3, 5)\n"
        "def example_batch(size):\n    return torch.zeros(size, 3)\n"
        "def loss(outputs, batch):\n    return outputs.sum()\n"
    )
    facts = facts_about(document, 4, model)
    assert facts.gpus == 4
    assert facts.filesystems["/not/here"] is None
    assert facts.filesystems[str(tmp_path / "swap")]
    assert facts.parameter_elements == (15, 5)
    assert facts.host_bytes


def memplan(*words, folder):
    environment = {**os.environ, "PYTHONPATH": PATHS, "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "memplan", "lint", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_command_ends_with_1_on_errors_and_shows_where_they_are(tmp_path):
    path = written(tmp_path, {"train_batch_size": 30, "zero_optimisation": {"stage": 3}})
    done = memplan(path, "--gpus", 8, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "zero_optimisation" in done.stdout
    assert "ZeRO stage 0 runs" in done.stdout
    assert "-> zero_optimization" in done.stdout
    assert "2 errors, for DeepSpeed 0.19.8" in done.stdout


def test_the_command_ends_with_0_where_there_are_no_errors(tmp_path):
    done = memplan(written(tmp_path, {"train_batch_size": 32, "vocabulary_size": 50257}), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 note" in done.stdout


def test_the_command_ends_with_2_on_what_is_no_configuration(tmp_path):
    path = tmp_path / "accelerate.yaml"
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n")
    done = memplan(path, folder=tmp_path)
    assert done.returncode == 2
    assert "configuration of Accelerate" in done.stderr
    missing = memplan(tmp_path / "none.json", folder=tmp_path)
    assert missing.returncode == 2
    assert "No such file" in missing.stderr
