"""Configurations with one fault each, and beside each one without it."""

from dataclasses import dataclass, field
from typing import Any

from memplan.lint import Facts

GIB = 1 << 30
MODEL = (400_000_000, *(9_000_000,) * 50)
"""Elements of parameters: an embedding and fifty matrices."""


@dataclass(frozen=True)
class Case:
    """``bad`` is found at ``path``; ``good`` is not."""

    path: str
    bad: dict[str, Any]
    good: dict[str, Any]
    words: str
    severity: str = "error"
    facts: Facts = field(default_factory=Facts)
    refused: bool = False
    """DeepSpeed's configuration class itself refuses ``bad``."""


def z(**section):
    return {"zero_optimization": section}


def stage(number, **section):
    return z(stage=number, **section)


def optimizer(device, number=3, **section):
    return stage(number, offload_optimizer={"device": device, **section})


def nvme(reuse=10**9, **section):
    parameters = {"device": "nvme", "nvme_path": "/x", "max_in_cpu": 0, **section}
    return stage(3, stage3_max_reuse_distance=reuse, offload_param=parameters)


def adamw(**params):
    return {"optimizer": {"type": "AdamW", "params": params}}


def fp16(**section):
    return {"fp16": {"enabled": True, **section}}


def schedule(name, **params):
    return {"scheduler": {"type": name, "params": params}}


def sampling(**section):
    return {"data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, **section}}}


EIGHT = Facts(gpus=8)
LARGE = Facts(gpus=1, parameter_elements=MODEL)
TIGHT = Facts(gpus=1, parameter_elements=MODEL, memlock_bytes=64 << 20)
SMALL_HOST = Facts(gpus=8, parameter_elements=MODEL, host_bytes=4 * GIB)
MOUNTS = Facts(filesystems={"/x": "tmpfs", "/net": "nfs4", "/gone": None, "/disk": "ext4"})

VALUES = [
    Case("zero_optimization.stage", stage(4), stage(3), "none of 0, 1, 2, 3", refused=True),
    Case("zero_optimization.stage", stage("three"), stage(3), "not a whole number", refused=True),
    Case("zero_optimization.stage", stage("3"), stage(3), "read as 3", "warning"),
    Case("zero_optimization.stage", stage(2.5), stage(2.0), "not a whole number", refused=True),
    Case(
        "zero_optimization.reduce_bucket_size",
        z(reduce_bucket_size=-1),
        z(reduce_bucket_size=5e8),
        "range",
        refused=True,
    ),
    Case(
        "zero_optimization.reduce_bucket_size",
        z(reduce_bucket_size=0),
        z(reduce_bucket_size=1),
        "more than 0",
        refused=True,
    ),
    Case(
        "zero_optimization.reduce_bucket_size",
        z(reduce_bucket_size=1.5),
        z(reduce_bucket_size=2.0),
        "whole",
        refused=True,
    ),
    Case(
        "zero_optimization.contiguous_gradients",
        z(contiguous_gradients="True"),
        z(contiguous_gradients=True),
        "as true",
        "warning",
    ),
    Case(
        "zero_optimization.contiguous_gradients",
        z(contiguous_gradients="maybe"),
        z(contiguous_gradients=False),
        "not true or false",
        refused=True,
    ),
    Case(
        "zero_optimization.offload_optimizer.device",
        optimizer("gpu"),
        optimizer("cpu"),
        "none of none, cpu, nvme",
        refused=True,
    ),
    Case(
        "zero_optimization.offload_param.device",
        stage(3, offload_param={"device": "disk"}),
        stage(3, offload_param={"device": "cpu"}),
        "none of",
        refused=True,
    ),
    Case(
        "zero_optimization.offload_optimizer.ratio",
        optimizer("cpu", ratio=1.5),
        optimizer("cpu", ratio=0.5),
        "at most 1",
        refused=True,
    ),
    Case(
        "zero_optimization.zenflow.topk_ratio",
        optimizer("cpu", 2) | stage(2, zenflow={"topk_ratio": 1.0}),
        stage(2, zenflow={"topk_ratio": 0.5}),
        "less than 1",
        refused=True,
    ),
    Case(
        "zero_optimization.offload_optimizer",
        stage(3, offload_optimizer="cpu"),
        stage(3, offload_optimizer={}),
        "a section in braces",
        refused=True,
    ),
    Case(
        "wall_clock_breakdown",
        {"wall_clock_breakdown": "False"},
        {"wall_clock_breakdown": False},
        "any string for true",
        refused=True,
    ),
    Case("dump_state", {"dump_state": "False"}, {"dump_state": False}, "any string for true"),
    Case("train_batch_size", {"train_batch_size": "32"}, {"train_batch_size": 1}, "not a whole number", refused=True),
    Case(
        "gradient_accumulation_steps",
        {"gradient_accumulation_steps": 0},
        {"gradient_accumulation_steps": 1},
        "at least 1",
        refused=True,
    ),
    Case(
        "gradient_allreduce_op",
        {"gradient_allreduce_op": "average"},
        {"gradient_allreduce_op": "MEAN"},
        "none of mean, sum",
        refused=True,
    ),
    Case(
        "communication_data_type",
        {"communication_data_type": "fp8"},
        {"communication_data_type": "BF16"},
        "none of",
        refused=True,
    ),
    Case(
        "torch_autocast.dtype",
        {"torch_autocast": {"dtype": "float17"}},
        {"torch_autocast": {"dtype": "bfloat16"}},
        "none of",
        refused=True,
    ),
    Case(
        "checkpoint.tag_validation",
        {"checkpoint": {"tag_validation": "loud"}},
        {"checkpoint": {"tag_validation": "Warn"}},
        "none of",
        refused=True,
    ),
    Case(
        "checkpoint.writer.type",
        {"checkpoint": {"writer": {"type": "slow"}}},
        {"checkpoint": {"writer": {"type": "fast"}}},
        "none of",
        refused=True,
    ),
    Case(
        "compile.passes", {"compile": {"passes": ["z2"]}}, {"compile": {"passes": ["z3"]}}, "none of z1", refused=True
    ),
    Case("fp16.loss_scale", {"fp16": {"loss_scale": -1}}, {"fp16": {"loss_scale": 0}}, "at least 0", refused=True),
    Case("fp16", {"fp16": None}, {"fp16": {}}, "null is not a section", refused=True),
    Case("steps_per_print", {"steps_per_print": "auto"}, {"steps_per_print": None}, "nobody fills in"),
    Case(
        "zero_optimization.sub_group_size",
        stage(3, sub_group_size="auto"),
        stage(3, sub_group_size=1e9),
        "the default, 1000000000",
        "warning",
    ),
    Case(
        "gradient_clipping",
        {"gradient_clipping": "auto"},
        {"gradient_clipping": 1},
        "Trainer and Accelerate only",
        "note",
    ),
    Case(
        "zero_optimization.round_robin_gradients",
        stage(3, round_robin_gradients=True),
        stage(2, round_robin_gradients=True),
        "stage 1 and 2 only",
        "note",
    ),
    Case(
        "zero_optimization.stage3_max_live_parameters",
        stage(2, stage3_max_live_parameters=1),
        stage(3, stage3_max_live_parameters=1),
        "stage 3 only",
        "note",
    ),
]

STATUS = [
    Case(
        "aio.thread_count",
        {"aio": {"thread_count": 4}},
        {"aio": {"intra_op_parallelism": 4}},
        "its code never reads it",
    ),
    Case("zero_optimization.grad_hooks", z(grad_hooks=True), z(), "documentation has it", refused=True),
    Case("zero_optimization.mics_shard_size", z(mics_shard_size=8), z(), "MiCS is no longer there", refused=True),
    Case("elasticity", {"elasticity": {"enabled": True}}, {}, "no longer there", refused=True),
    Case("amp", {"amp": {"enabled": True}}, {"bf16": {"enabled": True}}, "Apex", refused=True),
    Case("zero_optimization.cpu_offload", stage(2, cpu_offload=True), optimizer("cpu", 2), "older spelling", "warning"),
    Case(
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        stage(3, stage3_gather_fp16_weights_on_model_save=True),
        stage(3, stage3_gather_16bit_weights_on_model_save=True),
        "older spelling",
        "warning",
    ),
    Case("bfloat16", {"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}, "older spelling", "warning"),
    Case(
        "zero_optimization.allgather_partitions",
        stage(1, allgather_partitions=False),
        stage(1),
        "never used",
        "warning",
    ),
    Case("zero_optimization.allgather_partitions", stage(1, allgather_partitions=True), stage(1), "never used", "note"),
    Case(
        "tensor_parallel.dtype",
        {"tensor_parallel": {"dtype": "bfloat16"}},
        {"tensor_parallel": {}},
        "torch.dtype",
        refused=True,
    ),
    Case(
        "expert_parallel.load_balance_coeff",
        {"expert_parallel": {"load_balance_coeff": 0.1}},
        {"expert_parallel": {"load_balance_coeff": None}},
        "not supported",
        refused=True,
    ),
    Case("zero_optimization", {"zero_optimization": True}, stage(1), "older form", "warning"),
]

BATCH = [
    Case(
        "train_batch_size",
        {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4},
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
        "not a multiple of 4",
        facts=EIGHT,
    ),
    Case(
        "train_batch_size",
        {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
        {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
        "= 32",
        facts=EIGHT,
    ),
    Case("train_batch_size", {"train_batch_size": 12}, {"train_batch_size": 16}, "8 ranks = 8", facts=EIGHT),
    Case(
        "train_batch_size",
        {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4},
        {"train_batch_size": 28, "train_micro_batch_size_per_gpu": 4},
        "on any number of ranks",
    ),
    Case(
        "train_batch_size",
        {"train_batch_size": 5, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
        {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
        "= 4",
        facts=Facts(gpus=1),
        refused=True,
    ),
    Case(
        "train_batch_size",
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
        {"train_micro_batch_size_per_gpu": 4},
        "right for 4 data-parallel ranks",
        "note",
    ),
    Case(
        "train_batch_size",
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "sequence_parallel_size": 2,
        },
        {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "sequence_parallel_size": 2,
        },
        "4 ranks = 4",
        facts=EIGHT,
    ),
    Case(
        "train_batch_size", {"train_micro_batch_size_per_gpu": None}, {"train_batch_size": 8}, "neither", refused=True
    ),
    Case(
        "gradient_accumulation_steps",
        {"train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": 2},
        {"train_batch_size": 8},
        "neither",
        refused=True,
    ),
]

PRECISION = [
    Case("fp16.loss_scale_window", fp16(loss_scale_window=0), fp16(loss_scale_window=1), "range", refused=True),
    Case(
        "fp16.loss_scale_window",
        fp16(loss_scale_window=-5),
        fp16(loss_scale_window=-5, loss_scale=128),
        "at least 1",
        refused=True,
    ),
    Case("fp16.min_loss_scale", fp16(min_loss_scale=0), fp16(min_loss_scale=1), "at least 1", refused=True),
    Case("fp16.hysteresis", fp16(hysteresis=0), fp16(hysteresis=1), "never falls"),
    Case(
        "bf16.enabled",
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        {"bf16": {"enabled": True}},
        "fp16 is enabled too",
        refused=True,
    ),
    Case(
        "torch_autocast.enabled",
        {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        "cast all the same",
        "warning",
    ),
    Case(
        "torch_autocast.enabled",
        {"torch_autocast": {"enabled": True}},
        {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
        "float16 on CUDA",
        "warning",
    ),
    Case(
        "torch_autocast.enabled",
        {"torch_autocast": {"enabled": True, "dtype": "bf16"}} | stage(3, zero_quantized_weights=True),
        stage(3, zero_quantized_weights=True),
        "zero_quantized_weights",
    ),
    Case(
        "data_types.param_dtype",
        {"data_types": {"param_dtype": "bf16"}},
        {"data_types": {"param_dtype": "bfloat16"}, "bf16": {"enabled": True}},
        "make the model fp32",
    ),
    Case(
        "data_types.grad_accum_dtype",
        {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}},
        {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}} | stage(1),
        "at ZeRO stage 0",
    ),
    Case(
        "bf16.bf16_master_weights_and_grads",
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}} | optimizer("cpu"),
        "stage 1, 2 or 3",
        refused=True,
    ),
    Case(
        "bf16.bf16_master_weights_and_grads",
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}} | stage(2),
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}} | stage(2),
        "optimizer on the CPU",
    ),
    Case(
        "bf16.bf16_optimizer_states",
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}} | stage(1),
        {"bf16": {"enabled": True, "bf16_optimizer_states": True, "bf16_master_weights_and_grads": True}} | stage(1),
        "needs bf16_master",
        refused=True,
    ),
    Case(
        "bf16.bf16_master_weights_and_grads",
        {"fp16": {"fp16_master_weights_and_grads": True}, "bf16": {"bf16_master_weights_and_grads": True}}
        | optimizer("cpu"),
        {"fp16": {"fp16_master_weights_and_grads": True}} | optimizer("cpu"),
        "is set too",
    ),
    Case("bfloat16", {"bf16": {}, "bfloat16": {}}, {"bf16": {}}, "only that", "warning"),
]

ZERO = [
    Case(
        "zero_optimization.sub_group_size",
        stage(3, sub_group_size=0),
        stage(3, sub_group_size=1e6),
        "does not turn sub-groups off",
        "warning",
    ),
    Case("zero_optimization.legacy_stage1", stage(1, legacy_stage1=True), stage(1), "no older stage 1"),
    Case(
        "zero_optimization.allgather_bucket_size",
        stage(2, allgather_bucket_size=3),
        stage(2, allgather_bucket_size=4),
        "odd",
    ),
    Case(
        "prescale_gradients",
        {"prescale_gradients": True} | stage(2),
        {"prescale_gradients": True} | stage(2, reduce_scatter=False),
        "reduce_scatter",
    ),
    Case(
        "gradient_predivide_factor",
        {"gradient_predivide_factor": 2.0} | stage(3),
        {"gradient_predivide_factor": 2.0} | stage(1),
        "must be 1",
    ),
    Case(
        "gradient_allreduce_op",
        {"gradient_allreduce_op": "sum"} | stage(3),
        {"gradient_allreduce_op": "sum"} | stage(2),
        "ZeRO stage 3",
        refused=True,
    ),
    Case(
        "gradient_allreduce_op",
        {"gradient_allreduce_op": "sum", "compile": {"deepcompile": True}},
        {"gradient_allreduce_op": "sum"},
        "DeepCompile",
        refused=True,
    ),
    Case(
        "zero_optimization.compute_grad_norm",
        stage(3, compute_grad_norm=False),
        stage(2, compute_grad_norm=False) | {"gradient_clipping": 0},
        "stages 1 and 2",
        refused=True,
    ),
    Case(
        "zero_optimization.compute_grad_norm",
        stage(2, compute_grad_norm=False),
        stage(2, compute_grad_norm=False) | {"gradient_clipping": 0},
        "which is the default",
    ),
    Case(
        "zero_optimization.compute_grad_norm",
        stage(2, compute_grad_norm=False, offload_optimizer={"device": "cpu"}) | {"gradient_clipping": 0},
        stage(2, compute_grad_norm=False) | {"gradient_clipping": 0},
        "offload_optimizer",
    ),
    Case(
        "managed_gradient_accumulation",
        {"managed_gradient_accumulation": False} | stage(1, overlap_comm=True),
        {"managed_gradient_accumulation": False} | stage(2, overlap_comm=True),
        "overlap_comm",
    ),
    Case(
        "managed_gradient_accumulation",
        {"managed_gradient_accumulation": False, "pipeline": {}},
        {"managed_gradient_accumulation": False},
        "PipelineModule",
        "warning",
    ),
    Case(
        "pipeline",
        {"pipeline": {"stages": 2}} | stage(2),
        {"pipeline": {"stages": 2}} | stage(1),
        "stops at ZeRO stage 2",
        "warning",
    ),
    Case(
        "zero_optimization.zero_hpz_partition_size",
        stage(3, zero_hpz_partition_size=3),
        stage(3, zero_hpz_partition_size=4),
        "groups of 3",
        facts=EIGHT,
    ),
    Case(
        "zero_optimization.zero_hpz_partition_size",
        stage(2, zero_hpz_partition_size=4),
        stage(3, zero_hpz_partition_size=4),
        "stage 3 only",
        "note",
    ),
    Case(
        "zero_optimization.zero_quantized_gradients",
        stage(3, zero_quantized_gradients=True, reduce_scatter=False),
        stage(3, zero_quantized_gradients=True),
        "needs reduce_scatter",
    ),
    Case(
        "zero_optimization.zero_quantized_gradients",
        stage(2, zero_quantized_gradients=True),
        stage(3, zero_quantized_gradients=True),
        "stage 3 only",
        "note",
    ),
    Case(
        "zero_optimization.zenflow",
        stage(2, zenflow={}),
        stage(2, zenflow={}, offload_optimizer={"device": "cpu"}),
        "is offloaded",
    ),
    Case(
        "zero_optimization.zenflow",
        stage(3, zenflow={}),
        stage(3, zenflow={}, offload_optimizer={"device": "cpu"}),
        "nothing for it to do",
        "warning",
    ),
    Case("zero_optimization.zenflow", stage(0, zenflow={}), stage(0), "at stage 0"),
    Case(
        "zero_optimization.zenflow.offload",
        stage(2, zenflow={"offload": True}),
        stage(2, zenflow={"offload": True}, overlap_comm=True),
        "needs overlap_comm",
    ),
    Case(
        "zero_optimization.zenflow.select_interval",
        stage(2, zenflow={"select_interval": 4}),
        stage(2, zenflow={"select_interval": 4, "select_strategy": "step"}),
        "needs select_strategy",
    ),
    Case(
        "zero_optimization.zenflow.select_interval",
        stage(2, zenflow={"select_strategy": "step"}),
        stage(2, zenflow={"select_interval": 4, "select_strategy": "step"}),
        "must be a number",
    ),
    Case(
        "zero_optimization.zenflow.select_interval",
        stage(2, zenflow={"select_interval": 2, "update_interval": 4, "select_strategy": "step"}),
        stage(2, zenflow={"select_interval": 4, "update_interval": 4, "select_strategy": "step"}),
        "less than update_interval",
    ),
    Case(
        "gradient_accumulation_steps",
        {"gradient_accumulation_steps": 2} | stage(2, zenflow={}),
        {"gradient_accumulation_steps": 2} | stage(2),
        "update_interval",
        "warning",
    ),
]

OFFLOAD = [
    Case(
        "aio.block_size",
        {"aio": {"block_size": 100}} | optimizer("nvme", nvme_path="/x"),
        {"aio": {"block_size": 100}} | optimizer("cpu"),
        "no multiple of 512",
    ),
    Case(
        "aio.block_size",
        {"aio": {"block_size": 1000000}} | stage(3, offload_param={"device": "nvme", "nvme_path": "/x"}),
        {"aio": {"block_size": 1048576}} | stage(3, offload_param={"device": "nvme", "nvme_path": "/x"}),
        "direct I/O",
    ),
    Case("zero_optimization.offload_optimizer.device", optimizer("cpu", 0), optimizer("cpu", 1), "at ZeRO stage 0"),
    Case(
        "zero_optimization.offload_optimizer.device",
        optimizer("nvme", 2, nvme_path="/x"),
        optimizer("nvme", 3, nvme_path="/x"),
        "nvme means cpu",
        "warning",
    ),
    Case(
        "zero_optimization.offload_param.device",
        stage(2, offload_param={"device": "cpu"}),
        stage(3, offload_param={"device": "cpu"}),
        "stage 3 only",
    ),
    Case(
        "zero_optimization.cpu_offload",
        stage(2, cpu_offload=True, offload_optimizer={"device": "cpu"}),
        stage(2, offload_optimizer={"device": "cpu"}),
        "is there too",
        refused=True,
    ),
    Case(
        "zero_optimization.offload_optimizer.ratio",
        optimizer("cpu", 2, ratio=0.5),
        optimizer("cpu", 3, ratio=0.5),
        "needs ZeRO stage 3",
        refused=True,
    ),
    Case(
        "zero_optimization.offload_optimizer.ratio",
        optimizer("none", 3, ratio=0.5),
        optimizer("cpu", 3, ratio=0.5),
        "nothing to split",
        "warning",
    ),
    Case(
        "zero_optimization.offload_optimizer.super_offload",
        optimizer("cpu", 2, super_offload=True),
        optimizer("cpu", 3, super_offload=True),
        "stage 3 only",
        "warning",
    ),
    Case(
        "zero_optimization.offload_optimizer.super_offload",
        optimizer("none", 3, super_offload=True),
        optimizer("cpu", 3, super_offload=True),
        "off the GPU",
    ),
    Case(
        "zero_optimization.offload_optimizer.cpuadam_cores_perc",
        optimizer("cpu", cpuadam_cores_perc=0.5),
        optimizer("cpu", cpuadam_cores_perc=0.5, super_offload=True),
        "super_offload only",
        "note",
    ),
    Case(
        "zero_optimization.offload_optimizer.nvme_path",
        optimizer("nvme"),
        optimizer("nvme", nvme_path="/disk"),
        "missing",
    ),
    Case("zero_optimization.offload_param.nvme_path", stage(3, offload_param={"device": "nvme"}), nvme(), "missing"),
    Case(
        "zero_optimization.offload_param.nvme_path",
        nvme(),
        nvme(nvme_path="/disk"),
        "host memory, not disk",
        "warning",
        MOUNTS,
    ),
    Case(
        "zero_optimization.offload_param.nvme_path",
        nvme(nvme_path="/net"),
        nvme(nvme_path="/disk"),
        "a network mount",
        "warning",
        MOUNTS,
    ),
    Case(
        "zero_optimization.offload_optimizer.nvme_path",
        optimizer("nvme", nvme_path="/gone"),
        optimizer("nvme", nvme_path="/disk"),
        "not there on this machine",
        "warning",
        MOUNTS,
    ),
    Case(
        "zero_optimization.offload_optimizer.buffer_count",
        optimizer("nvme", nvme_path="/x", buffer_count=3),
        optimizer("nvme", nvme_path="/x", buffer_count=4),
        "less than the 4 tensors",
    ),
    Case(
        "zero_optimization.offload_optimizer.buffer_count",
        optimizer("nvme", nvme_path="/x", pipeline_read=True),
        optimizer("nvme", nvme_path="/x", pipeline_read=True, buffer_count=8),
        "less than 8",
        "warning",
    ),
    Case(
        "zero_optimization.offload_optimizer.buffer_count",
        optimizer("nvme", nvme_path="/x", pipeline_read=True, pipeline_write=True, buffer_count=8),
        optimizer("nvme", nvme_path="/x", pipeline_read=True, pipeline_write=True, buffer_count=12),
        "less than 12",
        "warning",
    ),
    Case(
        "zero_optimization.offload_param.buffer_size",
        nvme(),
        nvme(buffer_size=4e8),
        "largest parameter, 400,000,000",
        facts=LARGE,
    ),
    Case(
        "zero_optimization.offload_param.buffer_size",
        nvme(buffer_size=4e7),
        nvme(buffer_size=5e7),
        "= 50,000,000 elements",
        facts=Facts(gpus=8, parameter_elements=MODEL),
    ),
    Case(
        "zero_optimization.offload_param.buffer_count",
        nvme(buffer_size=4e8),
        nvme(reuse=0, buffer_size=4e8),
        "Not enough buffers",
        "warning",
        LARGE,
    ),
    Case(
        "zero_optimization.offload_param.buffer_count",
        nvme(buffer_size=4e8),
        nvme(buffer_size=4e8, max_in_cpu=10**9),
        "Not enough buffers",
        "warning",
        LARGE,
    ),
    Case(
        "zero_optimization.offload_param.buffer_size",
        nvme(buffer_size=4e8, buffer_count=60),
        stage(3, offload_param={"device": "cpu", "pin_memory": False}),
        "but the limit is 64.0 MiB",
        facts=TIGHT,
    ),
    Case(
        "zero_optimization.offload_optimizer.pin_memory",
        optimizer("cpu", 2),
        optimizer("cpu", 2, pin_memory=False),
        "pinned by each rank",
        "warning",
        TIGHT,
    ),
    Case(
        "zero_optimization.offload_optimizer.pin_memory",
        optimizer("cpu", 2),
        optimizer("cpu", 2, pin_memory=False),
        "the host has 4.00 GiB",
        facts=SMALL_HOST,
    ),
]

OPTIMIZERS = [
    Case("optimizer.params.betas", adamw(betas=[0.9]), adamw(betas=[0.9, 0.95]), "first step"),
    Case("optimizer.params.betas", adamw(betas=[0.9, 0.95, 0.9]), adamw(betas=[0.9, 0.95]), "not two numbers"),
    Case("optimizer.params.betas", adamw(betas=[0.9, "0.95"]), adamw(betas=[0.9, 0.95]), "not two numbers"),
    Case("optimizer.params.betas", adamw(betas=[0.9, 1.5]), adamw(betas=[0.9, 0.95]), "1.5 is out of range"),
    Case("optimizer.params.betas", adamw(betas=[0.9, 1]), adamw(betas=[0, 0.95]), "less than 1"),
    Case("optimizer.params.lr", adamw(lr=-1e-4), adamw(lr=1e-4), "at least 0"),
    Case("optimizer.params.eps", adamw(eps=-1), adamw(eps=0), "at least 0"),
    Case("optimizer.params.weight_decay", adamw(weight_decay=-0.1), adamw(weight_decay=0.1), "at least 0"),
    Case(
        "scheduler.params.warmup_min_lr",
        schedule("WarmupLR", warmup_min_lr=1.0, warmup_max_lr=1e-4),
        schedule("WarmupLR", warmup_min_lr=1e-5, warmup_max_lr=1e-4),
        "above warmup_max_lr, 0.0001",
        "warning",
    ),
    Case(
        "scheduler.params.warmup_min_lr",
        adamw(lr=1e-4) | schedule("WarmupLR", warmup_min_lr=1e-3),
        adamw(lr=1e-2) | schedule("WarmupLR", warmup_min_lr=1e-3),
        "above warmup_max_lr, 0.0001",
        "warning",
    ),
    Case(
        "scheduler.params.warmup_min_lr",
        schedule("WarmupDecayLR", total_num_steps=2000, warmup_min_lr=0.01),
        schedule("WarmupDecayLR", total_num_steps=2000, warmup_min_lr=0.0001),
        "above warmup_max_lr, 0.001",
        "warning",
    ),
    Case(
        "scheduler.params.cycle_min_lr",
        schedule("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.01),
        schedule("OneCycle", cycle_min_lr=0.01, cycle_max_lr=0.1),
        "falls where it is meant to rise",
        "warning",
    ),
    Case(
        "scheduler.params.warmup_max_lr",
        schedule("WarmupLR", warmup_max_lr=-1e-4),
        schedule("WarmupLR", warmup_max_lr=1e-4),
        "at least 0",
    ),
    Case("optimizer.type", {"optimizer": {"type": "OneBitAdam"}}, {"optimizer": {"type": "ADAMW"}}, "no longer there"),
    Case("optimizer.type", {"optimizer": {"type": "sgd"}}, {"optimizer": {"type": "SGD"}}, "no optimizer of DeepSpeed"),
    Case(
        "optimizer.type",
        {"optimizer": {"type": "AdmaW"}},
        {"optimizer": {"type": "AdamW"}},
        "no optimizer of DeepSpeed",
    ),
    Case("optimizer", {"optimizer": {"params": {}}}, {"optimizer": {"type": "Adam"}}, "has no type", "warning"),
    Case(
        "optimizer.type",
        {"optimizer": {"type": "SGD"}} | stage(1),
        {"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": True} | stage(1),
        "not one that DeepSpeed has tested",
    ),
    Case(
        "fp16.loss_scale",
        {"optimizer": {"type": "Lamb"}, "fp16": {"loss_scale": 8}},
        {"optimizer": {"type": "Lamb"}, "fp16": {"loss_scale": 0}},
        "dynamic loss scale",
    ),
    Case(
        "zero_optimization.reduce_scatter",
        {"optimizer": {"type": "Muon"}} | stage(3, reduce_scatter=True),
        {"optimizer": {"type": "Muon"}} | stage(3, reduce_scatter=False),
        "Muon at ZeRO stage 3",
    ),
    Case(
        "optimizer.params.torch_adam",
        adamw(torch_adam=True) | optimizer("cpu", 2),
        adamw() | optimizer("cpu", 2),
        "the offloaded step is slow",
        "warning",
    ),
    Case(
        "optimizer.type",
        {"optimizer": {"type": "Lion"}} | optimizer("cpu", 3, ratio=0.5),
        adamw() | optimizer("cpu", 3, ratio=0.5),
        "DeepSpeed's Adam",
    ),
    Case(
        "optimizer.params.max_grad_norm",
        adamw(max_grad_norm=1.0),
        adamw(lr=1e-3) | {"gradient_clipping": 1.0},
        "not taken by optimizers",
    ),
    Case("optimizer.params.learning_rate", adamw(learning_rate=1e-3), adamw(lr=1e-3), "no parameter of adamw"),
    Case(
        "optimizer.params.set_grad_none",
        adamw(set_grad_none=True) | optimizer("cpu", 2),
        adamw(set_grad_none=True),
        "adamw on the CPU",
    ),
    Case("optimizer.params.fused", adamw(fused=True), adamw(fused=True, torch_adam=True), "no parameter of adamw"),
    Case("optimizer.params.lr", adamw(lr="1e-3"), adamw(lr=1e-3), "not a number"),
    Case("optimizer.params.betas", adamw(betas=0.9), adamw(betas=[0.9, 0.95]), "not a list"),
    Case("optimizer.params.amsgrad", adamw(amsgrad=True), adamw(amsgrad=True, torch_adam=True), "not supported"),
    Case(
        "zero_optimization.offload_optimizer.device",
        optimizer("cpu"),
        optimizer("cpu") | {"zero_force_ds_cpu_optimizer": False},
        "must be DeepSpeedCPUAdam",
        "note",
    ),
    Case("scheduler.type", schedule("warmuplr"), schedule("WarmupLR"), "no schedule of DeepSpeed"),
    Case("scheduler.type", schedule("CosineLR"), schedule("CosineAnnealingLR", T_max=10), "no schedule of DeepSpeed"),
    Case("scheduler", {"scheduler": {"params": {}}}, schedule("WarmupLR"), "has no type", "warning"),
    Case("scheduler.params", {"scheduler": {"type": "WarmupLR"}}, schedule("WarmupLR"), "missing"),
    Case(
        "scheduler.params.total_num_steps",
        schedule("WarmupDecayLR"),
        schedule("WarmupDecayLR", total_num_steps=2000),
        "needs it",
    ),
    Case(
        "scheduler.params.total_num_steps",
        schedule("WarmupDecayLR", total_num_steps=500),
        schedule("WarmupDecayLR", total_num_steps=2000),
        "cut short",
        "warning",
    ),
    Case(
        "scheduler.params.warmup_steps",
        schedule("WarmupLR", warmup_steps=10),
        schedule("WarmupLR", warmup_num_steps=10),
        "no parameter of WarmupLR",
    ),
    Case(
        "scheduler.params.warmup_type",
        schedule("WarmupLR", warmup_type="lin"),
        schedule("WarmupLR", warmup_type="linear"),
        "none of log, linear",
    ),
]

SECTIONS = [
    Case(
        "activation_checkpointing.contiguous_memory_optimization",
        {"activation_checkpointing": {"contiguous_memory_optimization": True, "number_checkpoints": 4}},
        {
            "activation_checkpointing": {
                "contiguous_memory_optimization": True,
                "partition_activations": True,
                "number_checkpoints": 4,
            }
        },
        "needs partition_activations",
    ),
    Case(
        "activation_checkpointing.contiguous_memory_optimization",
        {"activation_checkpointing": {"contiguous_memory_optimization": True, "partition_activations": True}},
        {"activation_checkpointing": {"partition_activations": True}},
        "needs number_checkpoints",
    ),
    Case(
        "activation_checkpointing",
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        {"activation_checkpointing": {"cpu_checkpointing": False}},
        "recomputes nothing by itself",
        "note",
    ),
    Case(
        "compile.deepcompile",
        {"compile": {"deepcompile": True}},
        {"compile": {"deepcompile": True}} | stage(3),
        "stages 1, 2 and 3",
        "warning",
    ),
    Case(
        "compile.offload_opt_states",
        {"compile": {"deepcompile": True, "offload_opt_states": True}} | optimizer("cpu"),
        {"compile": {"deepcompile": True, "offload_opt_states": True}} | stage(3),
        "offload_optimizer",
    ),
    Case(
        "compile.offload_activation",
        {"compile": {"deepcompile": True, "offload_opt_states": True, "offload_activation": True}} | stage(3),
        {"compile": {"deepcompile": True, "offload_activation": True}} | stage(3),
        "optimizer states",
    ),
    Case(
        "compile.offload_opt_states",
        {"compile": {"deepcompile": True, "offload_opt_states": True, "offload_parameters": True}} | stage(3),
        {"compile": {"deepcompile": True, "offload_parameters": True}} | stage(3),
        "offloaded parameters",
    ),
    Case(
        "tensor_parallel.tp.tp_size",
        {"tensor_parallel": {"autotp_size": 4, "tp": {"tp_size": 2}}},
        {"tensor_parallel": {"autotp_size": 4, "tp": {"tp_size": 4}}},
        "is not autotp_size 4",
    ),
    Case(
        "tensor_parallel.autotp_size",
        {"tensor_parallel": {"autotp_size": 3}},
        {"tensor_parallel": {"autotp_size": 4}},
        "groups of 3",
        facts=EIGHT,
    ),
    Case(
        "sequence_parallel_size",
        {"sequence_parallel_size": 3},
        {"sequence_parallel_size": 2},
        "groups of 3",
        facts=EIGHT,
    ),
    Case(
        "data_parallel_size",
        {"data_parallel_size": 2, "sequence_parallel_size": 2},
        {"data_parallel_size": 4, "sequence_parallel_size": 2},
        "is not 8 GPUs",
        facts=EIGHT,
    ),
    Case(
        "data_efficiency.data_sampling.curriculum_learning.enabled",
        sampling(curriculum_learning={"enabled": True}),
        sampling(curriculum_learning={"enabled": True, "curriculum_metrics": {}}),
        "curriculum_metrics",
        refused=True,
    ),
    Case(
        "data_efficiency.data_sampling.dynamic_batching.enabled",
        sampling(dynamic_batching={"enabled": True}),
        sampling(dynamic_batching={"enabled": True, "max_tokens": 100}),
        "max_tokens",
        refused=True,
    ),
    Case(
        "data_efficiency.data_sampling.dynamic_batching.enabled",
        {"data_efficiency": {"data_sampling": {"dynamic_batching": {"enabled": True, "max_tokens": 100}}}},
        sampling(dynamic_batching={"enabled": True, "max_tokens": 100}),
        "has no effect",
        "warning",
    ),
    Case("vocabulary_size", {"vocabulary_size": 50257}, {"vocabulary_size": 50264}, "no multiple of 8", "note"),
    Case("aio.use_gds", {"aio": {"use_gds": True}}, {"aio": {"use_gds": False}}, "GPUDirect", "note"),
]

ALL = [*VALUES, *STATUS, *BATCH, *PRECISION, *ZERO, *OFFLOAD, *OPTIMIZERS, *SECTIONS]
