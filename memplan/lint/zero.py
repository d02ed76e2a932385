"""Parts of ZeRO that do not go together."""

from collections.abc import Iterator

from memplan.lint.finding import Finding
from memplan.lint.view import View, Z


def stages(view: View) -> Iterator[Finding]:
    """What a ZeRO stage needs or refuses."""
    if isinstance(view.document.get(Z), bool):
        new = '"zero_optimization": {"stage": ' + str(int(view.document.get(Z))) + "}"
        yield view.say("warning", Z, "true or false is an older form, which means stage 1 or 0", new)
    if view.value(f"{Z}.legacy_stage1") and view.stage > 0:
        yield view.say(
            "error", f"{Z}.legacy_stage1", "DeepSpeed stops at start: it has no older stage 1", "leave it out"
        )
    buckets = view.value(f"{Z}.allgather_bucket_size")
    if view.stage in (1, 2) and buckets % 2:
        yield view.say(
            "error",
            f"{Z}.allgather_bucket_size",
            f"{buckets} is odd; DeepSpeed stops at start, for its buffers are aligned to two elements",
            str(buckets + 1),
        )
    if view.stage == 3 and view.value(f"{Z}.sub_group_size") < 2:
        yield view.say(
            "warning",
            f"{Z}.sub_group_size",
            f"{view.value(f'{Z}.sub_group_size')} does not turn sub-groups off: every parameter becomes one of its "
            "own, updated, and on NVMe swapped, by itself",
            "sub_group_size: 1e9, or leave it out",
        )
    yield from _scaling(view)
    yield from _sums(view)
    yield from _norm(view)
    yield from _unmanaged(view)
    if view.stage >= 2 and "pipeline" in view.document.root:
        yield view.say(
            "warning", "pipeline", f"with a PipelineModule DeepSpeed stops at ZeRO stage {view.stage}", f"{Z}.stage: 1"
        )


def _scaling(view: View) -> Iterator[Finding]:
    """Gradients are scaled before or after the reduction; reduce-scatter knows the second only."""
    if view.stage < 2 or not view.value(f"{Z}.reduce_scatter"):
        return
    if view.value("prescale_gradients"):
        yield view.say(
            "error",
            "prescale_gradients",
            f"does not go with reduce_scatter at ZeRO stage {view.stage}; DeepSpeed stops at start",
            f"{Z}.reduce_scatter: false",
        )
    if view.value("gradient_predivide_factor") != 1:
        yield view.say(
            "error",
            "gradient_predivide_factor",
            f"must be 1 with reduce_scatter at ZeRO stage {view.stage}; DeepSpeed stops at start",
            f"{Z}.reduce_scatter: false",
        )


def _sums(view: View) -> Iterator[Finding]:
    if view.value("gradient_allreduce_op") != "sum":
        return
    others = (
        (view.stage == 3, "ZeRO stage 3"),
        (isinstance(view.document.get(Z, "zenflow"), dict), "ZenFlow"),
        (view.value("compile.deepcompile"), "DeepCompile"),
    )
    for there, what in others:
        if there:
            yield view.say("error", "gradient_allreduce_op", f'"sum" does not go with {what}; DeepSpeed stops at start')


def _norm(view: View) -> Iterator[Finding]:
    key = f"{Z}.compute_grad_norm"
    if view.value(key):
        return
    if view.stage not in (1, 2):
        yield view.say(
            "error", key, f"false is for ZeRO stages 1 and 2, and this is stage {view.stage}; DeepSpeed stops"
        )
        return
    if view.value("gradient_clipping") > 0:
        clipping = view.value("gradient_clipping")
        said = "" if view.written("gradient_clipping") else ", which is the default"
        yield view.say(
            "error",
            key,
            f"false does not go with gradient_clipping {clipping:g}{said}; DeepSpeed stops at start",
            "gradient_clipping: 0",
        )
    if view.device("offload_optimizer") != "none":
        yield view.say("error", key, "false does not go with offload_optimizer; DeepSpeed stops at start")
    if isinstance(view.document.get(Z, "zenflow"), dict):
        yield view.say("error", key, "false does not go with ZenFlow; DeepSpeed stops at start")


def _unmanaged(view: View) -> Iterator[Finding]:
    key = "managed_gradient_accumulation"
    if view.value(key):
        return
    if view.stage < 2 and view.overlap_comm:
        yield view.say("error", key, f"false does not go with overlap_comm at ZeRO stage {view.stage}; DeepSpeed stops")
    if view.value("compile.deepcompile"):
        yield view.say("error", key, "false does not go with DeepCompile; DeepSpeed stops at start")
    if "pipeline" in view.document.root:
        yield view.say("warning", key, "false does not go with a PipelineModule; DeepSpeed stops at start")


def quantized(view: View) -> Iterator[Finding]:
    """ZeRO++: a second partition, and quantized collectives. Their stage is looked at with every other key's."""
    partition = view.value(f"{Z}.zero_hpz_partition_size")
    gpus = view.facts.gpus
    if view.stage == 3 and gpus is not None and partition > 1 and gpus % min(partition, gpus):
        yield view.say(
            "error",
            f"{Z}.zero_hpz_partition_size",
            f"{gpus} GPUs can not be split into groups of {partition}; DeepSpeed stops at start",
            "the GPUs of one node",
        )
    if view.stage == 3 and view.value(f"{Z}.zero_quantized_gradients") and not view.value(f"{Z}.reduce_scatter"):
        yield view.say(
            "error",
            f"{Z}.zero_quantized_gradients",
            "needs reduce_scatter; DeepSpeed stops at start",
            "reduce_scatter: true",
        )


def zenflow(view: View) -> Iterator[Finding]:
    """ZenFlow: updates on the CPU that the GPU does not wait for."""
    at = f"{Z}.zenflow"
    if not isinstance(view.document.get(Z, "zenflow"), dict):
        return
    if view.stage == 0:
        yield view.say("error", at, "needs ZeRO; at stage 0 nothing of it happens but a changed accumulation")
        return
    if view.device("offload_optimizer") == "none":
        what = "DeepSpeed stops at start" if view.stage < 3 else "there is nothing for it to do"
        yield view.say(
            "error" if view.stage < 3 else "warning",
            at,
            f"works on an optimizer that is offloaded; {what}",
            f"{Z}.offload_optimizer.device: cpu",
        )
    if view.value(f"{at}.offload") and not view.overlap_comm:
        yield view.say(
            "error", f"{at}.offload", "needs overlap_comm; DeepSpeed stops at start", f"{Z}.overlap_comm: true"
        )
    strategy = view.value(f"{at}.select_strategy")
    select, update = view.value(f"{at}.select_interval"), view.value(f"{at}.update_interval")
    if strategy == "auto" and isinstance(select, int):
        yield view.say(
            "error",
            f"{at}.select_interval",
            'a number needs select_strategy "step" or "epoch"; DeepSpeed stops at start',
        )
    if strategy != "auto" and isinstance(select, str):
        yield view.say("error", f"{at}.select_interval", f'must be a number with select_strategy "{strategy}"')
    if strategy == "step" and isinstance(select, int) and isinstance(update, int) and 0 < select < update:
        yield view.say(
            "error",
            f"{at}.select_interval",
            f"{select} is less than update_interval {update}; DeepSpeed stops at start",
        )
    if view.written("gradient_accumulation_steps"):
        yield view.say(
            "warning",
            "gradient_accumulation_steps",
            "ZenFlow puts its update_interval in its place once training starts",
        )
