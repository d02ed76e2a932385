"""Number formats that exclude each other, or that need something else."""

from collections.abc import Iterator

from memplan.lint.finding import Finding
from memplan.lint.view import View

WIDTHS = {
    "fp32": ("fp32", "float32", "float", "torch.float32"),
    "fp16": ("fp16", "float16", "half", "torch.float16"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
}


def precision(view: View) -> Iterator[Finding]:
    """Of weights, gradients and master weights."""
    fp16, bf16 = view.value("fp16.enabled"), view.value("bf16.enabled")
    at = "bf16.enabled" if view.document.get("bf16") is not None else "bfloat16"
    if fp16 and bf16:
        yield view.say("error", at, "fp16 is enabled too; DeepSpeed stops at start", "enable one of the two")
    if view.document.get("bf16") is not None and "bfloat16" in view.document.root:
        yield view.say("warning", "bfloat16", "bf16 is there too, and DeepSpeed reads only that", "remove bfloat16")
    yield from _autocast(view, fp16 or bf16)
    yield from _types(view)
    yield from _masters(view)
    yield from _loss_scale(view)


def _autocast(view: View, narrow: bool) -> Iterator[Finding]:
    if not view.value("torch_autocast.enabled"):
        return
    if narrow:
        yield view.say(
            "warning",
            "torch_autocast.enabled",
            "fp16 or bf16 is enabled too: the weights are cast all the same, and autocast works on what is left",
            "enable one of them",
        )
    if view.value("torch_autocast.dtype") is None:
        yield view.say(
            "warning",
            "torch_autocast.enabled",
            "no dtype is given: PyTorch takes its own default, which is float16 on CUDA",
            'torch_autocast.dtype: "bfloat16"',
        )
    if view.value("zero_optimization.zero_quantized_weights"):
        yield view.say(
            "error", "torch_autocast.enabled", "does not go with zero_quantized_weights; DeepSpeed stops at start"
        )


def _width(name: str) -> str:
    return next((width for width, names in WIDTHS.items() if name in names), name)


def _types(view: View) -> Iterator[Finding]:
    model = {"autocast": "fp32"}.get(view.precision, view.precision)
    if any(view.is_auto(key) for key in ("fp16.enabled", "bf16.enabled")):
        return
    weights = view.value("data_types.param_dtype")
    if weights is not None and _width(weights) != model:
        yield view.say(
            "error",
            "data_types.param_dtype",
            f"is {_width(weights)}, but fp16 and bf16 make the model {model}; DeepSpeed stops at start",
            "leave it out",
        )
    sums = view.value("data_types.grad_accum_dtype")
    if sums is not None and _width(sums) != model and view.stage == 0:
        yield view.say(
            "error",
            "data_types.grad_accum_dtype",
            f"is {_width(sums)} where the model is {model}; at ZeRO stage 0 DeepSpeed stops at start",
            "leave it out, or use ZeRO",
        )


def _masters(view: View) -> Iterator[Finding]:
    fp16, bf16 = "fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"
    states = "bf16.bf16_optimizer_states"
    offloaded = view.device("offload_optimizer") != "none"
    for key in (fp16, bf16, states):
        if view.value(key) and view.stage == 0:
            yield view.say("error", key, "needs ZeRO stage 1, 2 or 3; DeepSpeed stops at start")
    if view.value(fp16) and view.value(bf16):
        yield view.say("error", bf16, "fp16_master_weights_and_grads is set too; DeepSpeed stops at start")
    if view.value(states) and not view.value(bf16):
        yield view.say("error", states, "needs bf16_master_weights_and_grads; DeepSpeed stops at start")
    alone = view.value(bf16) and not view.value(states)
    for key, needed in ((fp16, view.value(fp16)), (bf16, alone)):
        if needed and view.stage > 0 and not offloaded:
            yield view.say(
                "error",
                key,
                "needs the optimizer on the CPU, with DeepSpeed's Adam; DeepSpeed stops at start",
                "zero_optimization.offload_optimizer.device: cpu",
            )


def _loss_scale(view: View) -> Iterator[Finding]:
    """What a loss scale that moves can not do with; a fixed one reads none of these."""
    fp16 = view.value("fp16.enabled") or view.is_auto("fp16.enabled")
    if not fp16 or view.value("fp16.loss_scale") != 0:
        return
    for key in ("fp16.loss_scale_window", "fp16.min_loss_scale"):
        if view.value(key) < 1:
            yield view.say(
                "error", key, f"{view.value(key)} is out of range: it must be at least 1; DeepSpeed stops at start"
            )
    if view.value("fp16.hysteresis") < 1:
        yield view.say(
            "error",
            "fp16.hysteresis",
            f"{view.value('fp16.hysteresis')} is never counted down to 1, so the loss scale never falls, and steps "
            "that overflow at it are skipped for ever",
            "hysteresis: 2",
        )
