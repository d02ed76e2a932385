"""What a profile says beside its layers, in words and figures that the terminal and the page share."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from memplan.formatting import format_bytes, format_count, format_flops, format_seconds
from memplan.rows import MODEL, Row
from profiler.device import find_device
from profiler.events import CLIP, MODEL_STATE, STEP, Category
from profiler.profile import Holding, ModelProfile

UNCOUNTED_WARNED = 0.01
"""Of the bytes moved: more by operations without a formula make the FLOPs doubtful."""
UNCOUNTED_SHOWN = 8

HOLDS = {
    Category.PARAMETER: "parameters",
    Category.GRADIENT: "gradients",
    Category.OPTIMIZER: "optimizer state",
    Category.ACTIVATION: "activations",
    Category.WORKSPACE: "library workspaces",
    Category.SCRATCH: "scratch of kernels",
    Category.UPDATE: "the update's own copies",
    Category.BUFFER: "buffers",
    Category.INPUT: "the batch",
}
"""The categories in words, what stays the longest first."""


Levels = Sequence[tuple[int, Row]]
"""Rows with their levels in the tree."""
WHOLE = MODEL_STATE | {Category.BUFFER, Category.INPUT}
"""What is told as one, wherever in the model it is."""

UNITS = {"fp32": "fp32", "amp": "bf16", "amp-fp16": "fp16", "bf16": "bf16"}
"""By precision, the class of arithmetic that matrix products use."""


@dataclass(frozen=True)
class Content:
    """Storages of one kind at the peak, those of equal layers together."""

    bytes: int
    share: float
    """Of all that is allocated then."""
    words: str


def headline(profile: ModelProfile) -> str:
    """What was profiled, under which conditions."""
    clip = " with clipping" if profile.peaks.clip_bytes is not None else ""
    return f"{profile.model}: one step of batch {profile.batch_size}, {profile.precision}, {profile.optimizer}{clip}"


def totals(profile: ModelProfile) -> list[tuple[str, str]]:
    """Name and figure of what the model is and what a step computes."""
    rows = [("parameters", format_count(profile.parameter_elements))]
    if profile.trainable_elements != profile.parameter_elements:
        rows.append(("of which trained", format_count(profile.trainable_elements)))
    model_flops = profile.forward_flops + profile.backward_flops
    parts = f"{format_flops(profile.forward_flops)} forward, {format_flops(profile.backward_flops)} backward"
    rows.append(("model FLOPs", f"{format_flops(model_flops)}: {parts}"))
    if profile.executed_flops > model_flops:
        again = profile.executed_flops - model_flops
        rows.append(
            ("executed FLOPs", f"{format_flops(profile.executed_flops)}, {format_flops(again)} of it recompute")
        )
    rows.append(("saved for backward", format_bytes(profile.layers[0].activation_bytes)))
    if profile.step_seconds is not None and profile.device is not None:
        rows.append(("time", f"{format_seconds(profile.step_seconds)} on {profile.device}: {_speed(profile)}"))
    return rows


def layer_columns(rows: Levels) -> list[tuple[str, list[str]]]:
    """Head and cells of every figure that any of the rows has; nothing is an empty cell."""
    whole = rows[0][1].seconds
    columns = [
        ("params", [_or_empty(row.total("parameters"), format_count) for _, row in rows]),
        ("fwd\nFLOP", [_or_empty(row.total("forward_flops"), _flops) for _, row in rows]),
        ("bwd\nFLOP", [_or_empty(row.total("backward_flops"), _flops) for _, row in rows]),
        ("saved", [_or_empty(row.total("activation_bytes"), format_bytes) for _, row in rows]),
        ("transient", [_or_empty(row.transient_bytes, format_bytes) for _, row in rows]),
        ("moved", [_or_empty(row.total("moved_bytes"), format_bytes) for _, row in rows]),
        ("FLOP/\nbyte", [_or_empty(row.intensity, _plain) for _, row in rows]),
        ("time", [_or_empty(row.seconds and whole and row.seconds / whole, "{:.1%}".format) for _, row in rows]),
    ]
    return [column for column in columns if any(column[1])]


def _or_empty(figure: float | None, text: Callable[[float], str]) -> str:
    return text(figure) if figure else ""


def _flops(count: float) -> str:
    """``10.2 G``: the column's head has the unit."""
    return format_flops(count).removesuffix("FLOP").rstrip()


def _plain(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def path_labels(root: Row, above: str = "") -> Iterator[tuple[str, Row]]:
    """Every row with its labels from the root on, like ``blocks.0-5.attention.qkv``."""
    path = f"{above}.{root.label}" if above else root.label
    yield path, root
    for row in root.below:
        yield from path_labels(row, "" if root.label == MODEL else path)


def _speed(profile: ModelProfile) -> str:
    """Samples a second, and the model FLOPs' share of what the device's units for the precision could do."""
    assert profile.device is not None and profile.step_seconds is not None
    possible = find_device(profile.device).peak(UNITS[profile.precision]) * profile.step_seconds
    used = (profile.forward_flops + profile.backward_flops) / possible
    rate = profile.batch_size / profile.step_seconds
    return f"{format_count(rate) if rate >= 100 else f'{rate:.3g}'} samples/s, {used:.1%} MFU"


def phase_name(profile: ModelProfile, phase: str) -> str:
    """``step (adamw)``: the optimizer decides about the peak of its step."""
    return f"{phase} ({profile.optimizer})" if phase == STEP else "clipping" if phase == CLIP else phase


def reserves(profile: ModelProfile) -> list[tuple[str, int]]:
    """What is held around the allocated bytes, the outermost last."""
    peaks = profile.peaks
    rows = [("reserved by the allocator", peaks.reserved_bytes)]
    if peaks.reserved_expandable_bytes:
        rows.append(("with expandable_segments:True", peaks.reserved_expandable_bytes))
    if profile.device_bytes is not None:
        rows.append(("nvidia-smi, CUDA context included", profile.device_bytes))
    return rows


def contents(holdings: Sequence[Holding], most: int | None = None) -> list[Content]:
    """The largest contents of the peak, the model's state together, and layers that differ in their number."""
    whole = sum(h.bytes for h in holdings) or 1
    sizes: Counter[tuple[str, str, str]] = Counter()
    counts: Counter[tuple[str, str, str]] = Counter()
    for h in holdings:
        together = h.category in WHOLE
        key = (h.category, "" if together else h.operation, "" if together else re.sub(r"\b\d+\b", "*", h.module))
        sizes[key] += h.bytes
        counts[key] += h.count
    return [Content(size, size / whole, _words(*key, counts[key])) for key, size in sizes.most_common(most)]


def _words(category: str, operation: str, module: str, count: int) -> str:
    text = HOLDS[Category(category)] if category in HOLDS else category
    if operation:
        text += f" from {short_operation(operation)}"
    if module:
        text += f" in {module}"
    return text + (f" ({count})" if count > 1 else "")


def short_operation(name: str) -> str:
    """``aten::mm`` without the namespace that nearly all have."""
    return name.removeprefix("aten::")


def warnings(profile: ModelProfile) -> Iterator[str]:
    """What a person should know before trusting the figures."""
    memory_bytes = find_device(profile.device).memory_bytes if profile.device is not None else None
    taken = profile.peaks.reserved_bytes if profile.device_bytes is None else profile.device_bytes
    if memory_bytes is not None and taken > memory_bytes:
        peaks, fits = profile.peaks, "it does not fit"
        expandable = taken - peaks.reserved_bytes + peaks.reserved_expandable_bytes
        if peaks.reserved_expandable_bytes and expandable <= memory_bytes:
            fits = f"it fits with PYTORCH_ALLOC_CONF=expandable_segments:True, which takes {format_bytes(expandable)}"
        yield f"{profile.device} has {format_bytes(memory_bytes)}, and the step will take {format_bytes(taken)}: {fits}"
    if profile.uncounted_share > UNCOUNTED_WARNED:
        yield (
            f"operations without a FLOP formula move {profile.uncounted_share:.0%} of the bytes: "
            "the FLOPs above lack what they compute"
        )
    for assumption in profile.assumptions:
        yield f"assumed: {assumption}"


def uncounted(profile: ModelProfile, most: int = UNCOUNTED_SHOWN) -> str | None:
    """The operations without a formula, with their calls."""
    found = list(profile.uncounted_ops.items())
    if not found:
        return None
    shown = ", ".join(f"{short_operation(name)} x {calls}" for name, calls in found[:most])
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"no FLOP formula for: {shown}{more}"
