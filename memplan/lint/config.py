"""A DeepSpeed configuration as typed values, with DeepSpeed's real defaults filled in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import ConfigError
from memplan.lint.document import read_document
from memplan.lint.values import known_keys
from memplan.lint.view import View, Z


@dataclass(frozen=True)
class Offload:
    """Where optimizer state or parameters go, and through which buffers."""

    device: str
    """none, cpu or nvme."""
    nvme_path: str | None
    pin_memory: bool
    buffer_count: int
    """Between NVMe and host memory."""


@dataclass(frozen=True)
class DsConfig:
    """What DeepSpeed would do. Element counts are of parameters; ``None`` is left to DeepSpeed or to Hugging Face."""

    stage: int
    offload_optimizer: Offload
    offload_param: Offload
    offload_param_buffer_elements: int
    offload_param_max_in_cpu_elements: int
    offload_optimizer_ratio: float
    """Share of the optimizer's state that is updated on the CPU."""
    pipeline_read: bool
    pipeline_write: bool
    overlap_comm: bool
    contiguous_gradients: bool
    reduce_scatter: bool
    round_robin_gradients: bool
    reduce_bucket_elements: int
    allgather_bucket_elements: int
    sub_group_elements: int
    prefetch_bucket_elements: int
    persistence_threshold_elements: int
    max_live_elements: int
    max_reuse_distance_elements: int
    hpz_partition_size: int
    train_batch_size: int | None
    micro_batch_size: int | None
    gradient_accumulation_steps: int | None
    precision: str
    """fp32, fp16, bf16 or autocast; of autocast over fp32 weights."""
    autocast_dtype: str | None
    bf16_optimizer_states: bool
    grad_accum_dtype: str | None
    gradient_clipping: float
    cpu_checkpointing: bool
    optimizer: str | None

    def batch_sizes(self, ranks: int) -> tuple[int, int, int]:
        """Train batch, micro-batch and accumulation steps on so many data-parallel ranks, as DeepSpeed infers them.

        Raises ConfigError where they are missing or do not agree.
        """
        train, micro, steps = self.train_batch_size, self.micro_batch_size, self.gradient_accumulation_steps
        if train is None and micro is None:
            raise ConfigError(
                "neither train_batch_size nor train_micro_batch_size_per_gpu is written; write one of them"
            )
        if train is None:
            train = (micro or 1) * (steps or 1) * ranks
        if micro is None:
            micro = train // ranks // (steps or 1)
        if steps is None:
            steps = train // micro // ranks if micro else 0
        if train != micro * steps * ranks or not train:
            raise ConfigError(
                f"train_batch_size {train} is not train_micro_batch_size_per_gpu {micro} x "
                f"gradient_accumulation_steps {steps} x {ranks} ranks"
            )
        return train, micro, steps


def read_ds_config(path: Path) -> DsConfig:
    """The configuration in a file.

    "auto" counts as not written. Keys that DeepSpeed does not know are left out, as DeepSpeed does; ``memplan lint``
    tells of them. Raises ConfigError for a file that is no configuration of DeepSpeed, and for values that DeepSpeed
    could not use; OSError where there is no such file.
    """
    view = View(read_document(path))
    for finding in known_keys(view):
        if finding.severity == "error":
            raise ConfigError(f"{path}, line {finding.line}: {finding.path}: {finding.message}")
    return ds_config_of(view)


def ds_config_of(view: View) -> DsConfig:
    """The typed values of a configuration that has been read."""

    def zero(key: str) -> Any:
        return view.value(f"{Z}.{key}")

    return DsConfig(
        stage=view.stage,
        offload_optimizer=_offload(view, "offload_optimizer"),
        offload_param=_offload(view, "offload_param"),
        offload_param_buffer_elements=zero("offload_param.buffer_size"),
        offload_param_max_in_cpu_elements=zero("offload_param.max_in_cpu"),
        offload_optimizer_ratio=float(zero("offload_optimizer.ratio")),
        pipeline_read=zero("offload_optimizer.pipeline_read"),
        pipeline_write=zero("offload_optimizer.pipeline_write"),
        overlap_comm=view.overlap_comm,
        contiguous_gradients=zero("contiguous_gradients"),
        reduce_scatter=zero("reduce_scatter"),
        round_robin_gradients=zero("round_robin_gradients"),
        reduce_bucket_elements=zero("reduce_bucket_size"),
        allgather_bucket_elements=_allgather_elements(view),
        sub_group_elements=zero("sub_group_size"),
        prefetch_bucket_elements=zero("stage3_prefetch_bucket_size"),
        persistence_threshold_elements=zero("stage3_param_persistence_threshold"),
        max_live_elements=zero("stage3_max_live_parameters"),
        max_reuse_distance_elements=zero("stage3_max_reuse_distance"),
        hpz_partition_size=zero("zero_hpz_partition_size"),
        train_batch_size=view.value("train_batch_size"),
        micro_batch_size=view.value("train_micro_batch_size_per_gpu"),
        gradient_accumulation_steps=view.value("gradient_accumulation_steps"),
        precision=view.precision,
        autocast_dtype=view.value("torch_autocast.dtype") if view.precision == "autocast" else None,
        bf16_optimizer_states=view.value("bf16.bf16_optimizer_states"),
        grad_accum_dtype=view.value("data_types.grad_accum_dtype"),
        gradient_clipping=float(view.value("gradient_clipping")),
        cpu_checkpointing=view.value("activation_checkpointing.cpu_checkpointing"),
        optimizer=view.optimizer,
    )


def _offload(view: View, part: str) -> Offload:
    at = f"{Z}.{part}"
    return Offload(
        device=view.device(part),
        nvme_path=view.value(f"{at}.nvme_path"),
        pin_memory=view.value(f"{at}.pin_memory"),
        buffer_count=view.value(f"{at}.buffer_count"),
    )


def _allgather_elements(view: View) -> int:
    """Written in the section, or at the top level beside the older form of ``zero_optimization: true``."""
    key = "allgather_size" if view.document.get(Z) is True else f"{Z}.allgather_bucket_size"
    return int(view.value(key))
