"""A small model's profile, made up, with everything that can be shown."""

from dataclasses import replace

from profiler.events import Category
from profiler.profile import (
    Holding,
    LayerProfile,
    MemoryPoint,
    ModelProfile,
    OperationProfile,
    ParameterProfile,
    PhasePeaks,
)

MIB = 1 << 20
BLOCKS = 4


def _layer(path: str, kind: str, order: int | None, parameters: int = 0, flops: int = 0, saved: int = 0, **more):
    return LayerProfile(
        path,
        kind,
        order,
        1,
        parameters,
        4 * parameters,
        flops,
        2 * flops,
        saved,
        moved_bytes=1000 + flops // 50,
        **more,
    )


def shown_profile(blocks: int = BLOCKS, device: str | None = None, alternating: bool = False) -> ModelProfile:
    """``blocks`` blocks of a linear layer and a norm below a ModuleList, and a head."""
    per_block, head = 2_000_000, 1_000_000
    layers = [
        _layer("", "Net", 0, blocks * per_block // 10 + head // 10, blocks * per_block + head, (blocks * 3 + 1) * MIB),
        _layer("layers", "ModuleList", None, blocks * per_block // 10, blocks * per_block, blocks * 3 * MIB),
    ]
    parameters = []
    for i in range(blocks):
        kind = "SlidingBlock" if alternating and i % 2 == 0 else "FullBlock"
        layers += [
            _layer(f"layers.{i}", kind, 1 + 3 * i, per_block // 10, per_block, 3 * MIB, transient_bytes=5 * MIB),
            _layer(f"layers.{i}.up", "Linear", 2 + 3 * i, per_block // 10, per_block, 2 * MIB),
            _layer(f"layers.{i}.norm", "VeryLongNamedRootMeanSquareLayerNorm", 3 + 3 * i, 0, 0, MIB),
        ]
        parameters.append(ParameterProfile(f"layers.{i}.up.weight", (per_block // 10,), "float32", True))
    layers.append(_layer("head", "Linear", 2 + 3 * blocks, head // 10, head, MIB))
    parameters.append(ParameterProfile("head.weight", (head // 10,), "float32", i > 0))
    # The figures of a parent include those of its children.
    moved = sum(x.moved_bytes for x in layers if x.type in ("Linear", "VeryLongNamedRootMeanSquareLayerNorm"))
    layers[0] = replace(layers[0], moved_bytes=moved, transient_bytes=9 * MIB)
    layers[1] = replace(layers[1], moved_bytes=moved - layers[-1].moved_bytes)
    for i in range(blocks):
        at = 2 + 3 * i
        layers[at] = replace(layers[at], moved_bytes=layers[at + 1].moved_bytes + layers[at + 2].moved_bytes)
    layers[0] = replace(layers[0], recompute_flops=500_000)
    flops = 3 * (blocks * per_block + head)
    operations = (
        OperationProfile("aten::mm", 3 * blocks + 3, flops + 500_000, 98 * MIB, 0.004),
        OperationProfile("custom::scan", 7, None, 2 * MIB, 0.001),
    )
    if device is None:
        operations = tuple(replace(o, seconds=None) for o in operations)
    else:
        layers = [replace(x, seconds=1e-9 * x.forward_flops) for x in layers]
    return ModelProfile(
        model="net",
        precision="amp",
        optimizer="adamw",
        batch_size=8,
        layers=tuple(layers),
        parameters=tuple(parameters),
        buffer_bytes=0,
        peaks=PhasePeaks(60 * MIB, 62 * MIB, 75 * MIB, None, 40 * MIB, 80 * MIB, 78 * MIB),
        first_peaks=PhasePeaks(50 * MIB, 52 * MIB, 65 * MIB, None, 41 * MIB, 80 * MIB, 78 * MIB),
        activations=(),
        blocks=tuple(f"layers.{i}" for i in range(blocks)),
        operations=operations,
        timeline=_timeline(),
        peak_contents=(
            *(Holding(f"layers.{i}.up", Category.ACTIVATION, "aten::mm", 2, 8 * MIB) for i in range(blocks)),
            Holding("", Category.PARAMETER, "", 5, 10 * MIB),
            Holding("", Category.OPTIMIZER, "", 10, 20 * MIB),
            Holding("layers.0", Category.GRADIENT, "aten::mm", 1, 13 * MIB),
        ),
        context_bytes=500 * MIB,
        device=device,
        step_seconds=0.02 if device else None,
        assumptions=("every token goes to a different <expert>",),
    )


def _timeline() -> tuple[MemoryPoint, ...]:
    points = []
    for phase, sizes in (("forward", range(0, 30)), ("loss", (32,)), ("backward", range(45, 5, -1)), ("step", (0, 10))):
        for size in sizes:
            held = {Category.PARAMETER: 10 * MIB, Category.OPTIMIZER: 20 * MIB, Category.ACTIVATION: size * MIB}
            points.append(MemoryPoint(phase, "layers.0", {str(k): v for k, v in held.items() if v}))
    return tuple(points)
