"""What ``ds_config`` writes, read by DeepSpeed's own configuration class."""

import json
import logging
from dataclasses import replace

import pytest
from hypothesis import given, settings

from memplan.configs.deepspeed import ds_config
from memplan.engines.deepspeed_setup import setup_of
from memplan.lint import Facts, lint_document
from memplan.lint.document import parse_document
from offload.plan import Buckets, Plan, Precision, Target, Tier
from tests.deepspeed_plans import LARGEST, SHAPES, deepspeed_plans, plan_of

DEVICES = {Tier.GPU: "none", Tier.HOST: "cpu", Tier.NVME: "nvme"}
UNSET = "not in the configuration"


class World:
    """As many data-parallel ranks as the plan has, without a process group."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def get_data_parallel_world_size(self) -> int:
        return self.ranks


def read(config: dict, gpus: int):
    """DeepSpeed's reading of a configuration, as on a rank of that many."""
    from deepspeed.runtime import config as deepspeed_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
        return deepspeed_config.DeepSpeedConfig(json.loads(json.dumps(config)), mpu=World(gpus))


def check_read_back(plan: Plan) -> None:
    setup = setup_of(plan)
    config, notes = ds_config(plan)
    found = read(config, plan.gpus)
    zero = found.zero_config
    assert found.world_size == plan.gpus
    assert found.train_micro_batch_size_per_gpu == plan.micro_batch_size
    assert found.gradient_accumulation_steps == plan.gradient_accumulation_steps
    assert found.train_batch_size == plan.micro_batch_size * plan.gradient_accumulation_steps * plan.gpus
    assert found.gradient_clipping == 1.0
    assert found.bfloat16_config.enabled is (plan.precision is Precision.BF16)
    assert found.torch_autocast_enabled is (plan.precision is Precision.AMP)
    assert not found.float16_config.enabled
    assert found.activation_checkpointing_config.cpu_checkpointing is (
        bool(plan.recompute) and plan.checkpoints is Tier.HOST
    )
    assert found.zero_force_ds_cpu_optimizer is (setup.optimizer is not Tier.GPU)
    assert zero.stage == setup.zero_stage >= plan.zero_stage
    assert zero.reduce_bucket_size == setup.reduce_elements
    assert zero.overlap_comm is (zero.stage > 0)
    optimizer = zero.offload_optimizer
    assert (optimizer.device if optimizer else "none") == DEVICES[setup.optimizer]
    if zero.stage in (1, 2):
        assert zero.allgather_bucket_size == setup.gather_elements
        assert zero.allgather_bucket_size % 2 == 0
    if setup.optimizer is not Tier.GPU:
        assert optimizer.ratio == 1 - setup.gpu_update_share
        assert optimizer.pin_memory
    if setup.optimizer is Tier.NVME:
        assert str(optimizer.nvme_path) == plan.nvme_dir
        # Master, moments and gradient of a sub-group; with each direction that is overlapped, another four.
        assert optimizer.buffer_count >= 4 * (1 + optimizer.pipeline_read + optimizer.pipeline_write)
        assert found.aio_config["queue_depth"] > 8
        assert found.aio_config["intra_op_parallelism"] > 1
    if zero.stage == 3:
        assert zero.offload_param.device == DEVICES[setup.parameters]
        assert zero.offload_param.buffer_size >= LARGEST
        assert zero.prefetch_bucket_size == setup.gather_elements
        assert zero.max_live_parameters == setup.live_elements
        assert zero.param_persistence_threshold == setup.persistence_elements
        assert zero.sub_group_size == setup.sub_group_elements
        assert zero.zero_hpz_partition_size == setup.hpz
    assert all(note.endswith(".") for note in notes)


TYPICAL = {
    "everything on the GPU": plan_of(),
    "in fp32": plan_of(precision=Precision.FP32),
    "under autocast": plan_of(precision=Precision.AMP, zero_stage=2, gpus=4),
    "stage 1 on eight GPUs": plan_of(zero_stage=1, gpus=8, target=Target.DEEPSPEED),
    "stage 2, optimizer on the host": plan_of(optimizer=Tier.HOST, zero_stage=2, target=Target.DEEPSPEED),
    "stage 3, everything on the host": plan_of(Tier.HOST, Tier.HOST, zero_stage=3, gpus=2, target=Target.DEEPSPEED),
    "stage 3, optimizer on NVMe": plan_of(optimizer=Tier.NVME, zero_stage=3, target=Target.DEEPSPEED),
    "stage 3, everything on NVMe": plan_of(Tier.NVME, Tier.NVME, zero_stage=3, target=Target.DEEPSPEED),
    "stage 3 on four nodes": plan_of(zero_stage=3, gpus=32, nodes=4, shard_gpus=8, target=Target.DEEPSPEED),
    "made for memplan": plan_of(Tier.HOST, Tier.NVME, gpu_update_share=0.4),
}


@pytest.mark.parametrize("plan", TYPICAL.values(), ids=TYPICAL.keys())
def test_deepspeed_reads_a_typical_plan_as_it_was_meant(plan):
    check_read_back(plan)


@settings(max_examples=60)
@given(deepspeed_plans())
def test_deepspeed_reads_any_plan_as_it_was_meant(plan):
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    check_read_back(plan)


def test_a_plan_for_deepspeed_is_written_as_it_is():
    buckets = Buckets(
        update_elements=77_000,
        reduce_elements=120_000,
        gather_elements=90_000,
        persistence_elements=640,
        live_elements=10**6,
    )
    plan = plan_of(Tier.GPU, Tier.HOST, zero_stage=3, buckets=buckets, gpu_update_share=0.25, target=Target.DEEPSPEED)
    zero = ds_config(plan)[0]["zero_optimization"]
    assert zero["sub_group_size"] == 77_000
    assert zero["reduce_bucket_size"] == 120_000
    assert zero["stage3_prefetch_bucket_size"] == 90_000
    assert zero["stage3_param_persistence_threshold"] == 640
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 10**6
    assert zero["offload_optimizer"]["ratio"] == 0.75


def test_no_key_is_left_that_deepspeed_would_fill_in_otherwise():
    """Reading what DeepSpeed itself made of the section changes nothing, so all that matters was said."""
    config, _ = ds_config(TYPICAL["stage 3, everything on NVMe"])
    written = config["zero_optimization"]
    understood = read(config, 1).zero_config.model_dump(by_alias=True, mode="json")
    left_out = {key for key, value in understood.items() if key not in written and value is not None}
    assert left_out == {
        # What has no effect at this stage, or never.
        "allgather_bucket_size",
        "allgather_partitions",
        "elastic_checkpoint",
        # What memplan never sets: other ways to train, old names, debugging, and optimizers that it does not plan for.
        "compute_grad_norm",
        "enable_sanity_checks",
        "leaf_module",
        "legacy_stage1",
        "log_trace_cache_warnings",
        "save_muon_momentum_buffer_in_memory",
        "stage3_gather_fp16_weights_on_model_save",
    }
    for key, value in written.items():
        if not isinstance(value, dict):
            assert understood.get(key, UNSET) == value, key


def check_lint(plan: Plan) -> None:
    text = json.dumps(ds_config(plan)[0], indent=2)
    said = lint_document(parse_document(text), Facts(gpus=plan.gpus))
    host_inputs = plan.recompute and plan.checkpoints is Tier.HOST
    # That the script has to call DeepSpeed's checkpointing is in no key's power, and in NOTES.md too.
    assert [found.path for found in said] == ["activation_checkpointing"] * bool(host_inputs), said


@pytest.mark.parametrize("plan", TYPICAL.values(), ids=TYPICAL.keys())
def test_the_linter_has_nothing_to_say_of_a_typical_plans_file(plan):
    check_lint(plan)


@settings(max_examples=60)
@given(deepspeed_plans())
def test_the_linter_has_nothing_to_say_of_any_plans_file(plan):
    if plan.target is Target.DEEPSPEED and plan.buckets.update_elements < 2:
        plan = replace(plan, buckets=replace(plan.buckets, update_elements=2))
    check_lint(plan)


def test_parameters_from_nvme_do_not_wait_on_the_gpu_with_their_buffers():
    zero = ds_config(TYPICAL["stage 3, everything on NVMe"])[0]["zero_optimization"]
    assert zero["stage3_max_reuse_distance"] == 0
    assert zero["offload_param"]["buffer_count"] >= 2 * 2 + 1  # both parameters of two blocks, and one that comes


def test_a_share_of_the_update_needs_stage_3_in_host_memory():
    plan = plan_of(Tier.GPU, Tier.NVME, zero_stage=3, gpu_update_share=0.5, target=Target.DEEPSPEED)
    config, notes = ds_config(plan)
    assert config["zero_optimization"]["offload_optimizer"]["ratio"] == 1.0
    assert any("50% of it to the GPU" in note for note in notes)


def test_what_the_script_must_do_is_said():
    plan = plan_of(
        Tier.HOST, Tier.HOST, zero_stage=3, recompute=("layers.0",), checkpoints=Tier.HOST, loss_chunks=4,
        target=Target.DEEPSPEED,
    )  # fmt: skip
    text = "\n".join(ds_config(plan)[1])
    for needed in ("deepspeed.zero.Init", "deepspeed.checkpointing.checkpoint", "in 4 pieces", "DeepSpeedCPUAdam"):
        assert needed in text
    assert "FusedAdam" in "\n".join(ds_config(plan_of())[1])


def test_hierarchical_sharding_becomes_a_secondary_partition_in_stage_3_only():
    plan = TYPICAL["stage 3 on four nodes"]
    config, notes = ds_config(plan)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert any("zero_hpz_partition_size" in note for note in notes)
    notes = ds_config(plan_of(zero_stage=2, gpus=32, nodes=4, shard_gpus=8))[1]
    assert any("in stage 3 only" in note for note in notes)


def test_the_plan_of_these_tests_has_its_largest_parameter_where_it_says():
    assert max(rows * columns for rows, columns in (s for s in SHAPES.values() if len(s) == 2)) == LARGEST
