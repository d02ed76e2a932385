"""Keys of a configuration that cost memory or time and that no model of it knows: they are said, not passed over."""

from collections.abc import Iterator
from typing import Any

from memplan.lint.kinds import shown
from memplan.lint.schema import Key, Section, schema
from memplan.lint.unknown import unknown_keys
from memplan.lint.view import View, Z

PRICED = {
    "": "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps communication_data_type"
    " zero_optimization allgather_size",
    Z: "stage contiguous_gradients reduce_bucket_size allgather_bucket_size overlap_comm sub_group_size cpu_offload"
    " cpu_offload_param stage3_prefetch_bucket_size prefetch_bucket_size stage3_param_persistence_threshold"
    " param_persistence_threshold stage3_max_live_parameters max_live_parameters zero_hpz_partition_size",
    f"{Z}.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
    f"{Z}.offload_optimizer": "device nvme_path buffer_count pin_memory ratio",
    "bf16": "enabled",
    "bfloat16": "enabled",
    "fp16": "enabled",
    "torch_autocast": "enabled dtype",
    "data_types": "grad_accum_dtype",
}
"""Keys whose cost is counted, by section."""
FREE = {
    "": "gradient_clipping prescale_gradients gradient_predivide_factor gradient_allreduce_op steps_per_print"
    " zero_allow_untested_optimizer zero_force_ds_cpu_optimizer dataloader_drop_last dump_state log_level"
    " wall_clock_breakdown memory_breakdown disable_python_gc vocabulary_size",
    Z: "load_from_fp32_weights elastic_checkpoint stage3_gather_16bit_weights_on_model_save"
    " gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save ignore_unused_parameters"
    " override_module_apply log_trace_cache_warnings pipeline_loading_checkpoint compute_grad_norm"
    " round_robin_gradients stage3_max_reuse_distance max_reuse_distance",
    "bf16": "check_grad_overflow immediate_grad_update",
    "bfloat16": "check_grad_overflow immediate_grad_update",
    "fp16": "loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale",
    "data_types": "param_dtype",
    "activation_checkpointing": "number_checkpoints synchronize_checkpoint_boundary profile",
}
"""Keys that cost a step nothing worth counting, by section."""
FREE_SECTIONS = (
    *("scheduler", "checkpoint", "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "flops_profiler"),
    *("timers", "autotuning", "nebula"),
)
ADAMS = ("adam", "adamw")


def unpriced(view: View) -> Iterator[str]:
    """One sentence for everything that is written, has an effect, and is not counted."""
    keys = list(dict.fromkeys(_keys(view)))
    if keys:
        yield f"Not counted, though it may take memory or time: {', '.join(keys)}."
    nowhere = [f.path for f in unknown_keys(view.document) if f.severity == "warning" and "._" not in f".{f.path}"]
    if nowhere:
        yield f"DeepSpeed knows nothing of {', '.join(nowhere)}, and passes over it."
    if view.optimizer is not None and view.optimizer not in ADAMS:
        yield f"The optimizer's state is counted as Adam's, 8 bytes a parameter; {view.optimizer} keeps its own."


def _keys(view: View) -> Iterator[str]:
    on_disk = "nvme" in (view.device("offload_param"), view.device("offload_optimizer"))
    for path, written in view.document.sections():
        section = schema().section(path)
        if section is None or path[:1] == ("optimizer",) or (path and path[0] in FREE_SECTIONS):
            continue
        if (path[:1] == ("aio",) and not on_disk) or _is_off(section, written):
            continue
        home = ".".join(path)
        known = f"{PRICED.get(home, '')} {FREE.get(home, '')}".split()
        for name, value in written.items():
            key = section.keys.get(name)
            if key is None or name in known or not _changes_something(view, key, value):
                continue
            # Of a section of its own, like "compile", its name says enough.
            dotted = ".".join((*path, name))
            yield f"{dotted} {shown(value)}" if home in PRICED or home in FREE else path[0]


def _is_off(section: Section, written: dict[str, Any]) -> bool:
    switch = section.keys.get("enabled")
    return switch is not None and not written.get("enabled", switch.default)


def _changes_something(view: View, key: Key, value: object) -> bool:
    if isinstance(value, dict) or value == key.default or value is None:
        return False
    return key.status is None and (not key.stages or view.stage in key.stages)
