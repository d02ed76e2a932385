"""A configuration that a person has, with what a plan decides put in its place: everything else stays as they wrote it.

What is trained to is decided by clipping, precision, optimizer and schedule, and a plan knows nothing of them.
"""

from collections.abc import Mapping
from typing import Any

from memplan.lint.kinds import is_number
from memplan.lint.schema import schema
from offload.plan import Plan, Precision

ZERO = "zero_optimization"
PLANNED = (ZERO, "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Keys and sections that a plan is about."""
KEPT = (
    "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "ignore_unused_parameters",
    "load_from_fp32_weights",
    "elastic_checkpoint",
    "round_robin_gradients",
    "reduce_scatter",
    "log_trace_cache_warnings",
)
"""Of the section that a plan writes, what stays as the person has it, or DeepSpeed's default where they do not say."""


def carried(planned: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """``planned``, the configuration of a plan, as a change of ``theirs``."""
    written = theirs.get(ZERO)
    kept = {k: v for k, v in written.items() if k in KEPT} if isinstance(written, dict) else {}
    ours = {k: v for k, v in planned[ZERO].items() if k not in KEPT}
    return {
        **{key: planned[key] for key in PLANNED if key in planned},
        ZERO: {**ours, **kept},
        **({"aio": planned["aio"]} if "aio" in planned else {}),
        **{key: value for key, value in theirs.items() if key not in PLANNED and _is_known(key)},
    }


def _is_known(key: str) -> bool:
    """What DeepSpeed does not know does nothing, and would only look as if it did; remarks begin with an underscore."""
    return key.startswith("_") or key in schema().sections[()].keys


def half_of(plan: Plan, config: Mapping[str, Any]) -> str:
    """The section of the 16-bit format that a configuration runs in; "" for neither.

    An "auto" is what whoever fills it in says, and that is the plan's precision.
    """
    switches = {name: (config.get(name) or {}).get("enabled") for name in ("bf16", "fp16")}
    written = next((name for name, on in switches.items() if on is True), "")
    if written or plan.precision is not Precision.BF16:
        return written
    return next((name for name, on in switches.items() if on == "auto"), "")


def number(name: str, value: Any) -> dict[str, Any]:
    """An argument where there is a number for it, and none where it is left open."""
    return {name: value} if is_number(value) else {}
