"""Profiles made up for the planner's tests: no model is built."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st

from memplan.activations import FIXED_MARGIN_BYTES
from memplan.machine import Machine
from memplan.rates import Curve, Rates
from offload.plan import Precision
from profiler.profile import ActivationPoint, LayerProfile, ModelProfile, ParameterProfile, PhasePeaks

RATES = Rates(
    compute_flops_per_second=dict.fromkeys(Precision, 1e9),
    device_bytes_per_second=float("inf"),
    call_seconds=0.0,
    host_to_device=Curve.flat(1e6),
    device_to_host=Curve.flat(1.3e6),
    duplex_share=0.9,
    cpu_update_seconds=dict.fromkeys(Precision, 2e-6),
    cpu_update_beside_links=1.3,
    links_beside_update=0.8,
    gpu_update_seconds=dict.fromkeys(Precision, 1e-8),
    streamed_update_seconds={},
    nvme_read_bytes_per_second=2e5,
    nvme_write_bytes_per_second=1e5,
    collective=Curve.flat(5e5),
    inter_node_bytes_per_second=2e5,
    pinning_bytes_per_second=1e9,
    source="Rates are made up.",
)

SHARED_RATES = replace(
    RATES,
    streamed_update_seconds=dict.fromkeys(Precision, 1.5e-6),
    cpu_update_beside_streamed=1.2,
    streamed_update_beside_cpu=1.1,
    host_to_device=Curve.flat(2e7),
)
"""With which the GPU takes a share of the update of state on the host."""
CALLING_RATES = replace(RATES, call_seconds=1e-3)
"""With a CPU that takes time to issue what the GPU does."""

PEAKS = PhasePeaks(0, None, 0, None, 0, 0, 0)


def parameter(name: str, *shape: int, trainable: bool = True, aliases: Sequence[str] = (), outside: bool = False):
    return ParameterProfile(name, shape, "float32", trainable, tuple(aliases), outside)


def layer(path: str, order: int | None, parameters: int = 0, forward: int = 0, backward: int = 0) -> LayerProfile:
    return LayerProfile(path, "Module", order, int(order is not None), parameters, 4 * parameters, forward, backward, 0)


def profile_of(
    parameters: Sequence[ParameterProfile],
    layers: Sequence[LayerProfile],
    blocks: Sequence[str],
    *,
    precision: str = "fp32",
    batch_size: int = 4,
    activation: int = 10_000,
    flops: int = 3_000_000,
    recompute: bool = True,
    workspace_bytes: int = 0,
    inputs: float = 0.0,
) -> ModelProfile:
    """Activations of ``activation`` bytes a sample and a fixed quarter of that; recompute keeps a third.

    ``inputs`` is the share of a sample's that are inputs of blocks; these can wait on the host.
    """
    points = []
    for b in (1, batch_size):
        given = int(inputs * activation * b) // max(1, len(blocks))
        for r in (False, True) if recompute else (False,):
            allocated = (activation // 4 + activation * b) // (3 if r else 1)
            flop = flops * b * (4 if r else 3) // 3
            point = ActivationPoint(b, r, allocated, flop, max(0, allocated - workspace_bytes))
            freed = (activation // 4 + activation * b) * 2 // 3 + given * len(blocks)
            points.append(with_blocks(point, len(blocks), freed, given))
            if r and given:
                less = allocated - given * (len(blocks) - 1)
                point = replace(point, allocated_bytes=less, on_cpu_bytes=max(0, less - workspace_bytes))
                points.append(with_blocks(point, len(blocks), freed, given, away=True))
    return ModelProfile(
        model="Synthetic",
        precision=precision,
        optimizer="adamw",
        batch_size=batch_size,
        layers=tuple(layers),
        parameters=tuple(parameters),
        buffer_bytes=0,
        peaks=PEAKS,
        first_peaks=PEAKS,
        activations=tuple(points),
        blocks=tuple(blocks),
    )


def with_blocks(point: ActivationPoint, blocks: int, freed: int, inputs: int = 0, *, away: bool = False):
    """The point with what equal blocks free together, and with inputs of ``inputs`` bytes each that they keep anew."""
    if point.recompute:
        given = (inputs,) * blocks
        staying = (0,) * blocks if away else given
        held = point.allocated_bytes
        known = replace(point, input_bytes=given, device_input_bytes=staying, held_bytes=held)
        return replace(known, checkpoints_on_host=away)
    each = tuple(freed * (i + 1) // blocks for i in range(blocks))
    return replace(point, held_bytes=point.allocated_bytes, freed_bytes=each)


def transformer(
    blocks: int, block_elements: int = 20_000, embedding: int = 50_000, root: int = 100, **wishes
) -> ModelProfile:
    """An embedding, equal blocks, an untied head, and a small norm that joins the root."""
    names = [f"layers.{i}" for i in range(blocks)]
    parameters = [parameter(f"{n}.weight", block_elements) for n in names]
    layers = [layer(n, i + 2, block_elements) for i, n in enumerate(names)]
    if embedding:
        parameters += [parameter("embed.weight", embedding), parameter("head.weight", embedding)]
        layers += [layer("embed", 1, embedding), layer("head", blocks + 3, embedding)]
    if root:
        parameters.append(parameter("norm.weight", root))
        layers.append(layer("norm", blocks + 2, root))
    flops = wishes.get("flops", 3_000_000) * wishes.get("batch_size", 4)
    total = sum(p.elements for p in parameters)
    whole = layer("", 0, total, flops // 3, flops - flops // 3)
    return profile_of(parameters, [whole, layer("layers", None), *layers], names, **wishes)


def machine_of(gpu: int, host: int, nvme: int = 0, *, device: str = "cpu", gpus: int = 1) -> Machine:
    return Machine(
        device=device,
        gpus=gpus,
        gpu_name=None,
        gpu_bytes=gpu,
        host_bytes=host,
        nvme_dir=Path("/swap") if nvme else None,
        nvme_bytes=nvme,
        memlock_bytes=None,
        cores=2,
    )


@st.composite
def transformers(draw: st.DrawFn, most_blocks: int = 6) -> ModelProfile:
    return transformer(
        draw(st.integers(1, most_blocks)),
        draw(st.integers(1, 300_000)),
        draw(st.one_of(st.just(0), st.integers(1, 500_000))),
        draw(st.integers(0, 2_000)),
        precision=draw(st.sampled_from(["fp32", "bf16", "amp"])),
        batch_size=draw(st.integers(2, 8)),
        activation=draw(st.integers(0, 2_000_000)),
        flops=draw(st.integers(1, 10**9)),
        recompute=draw(st.booleans()),
        workspace_bytes=draw(st.integers(0, 10_000)),
        inputs=draw(st.sampled_from([0.0, 0.1, 0.3])),
    )


@st.composite
def cases(draw: st.DrawFn, gpus: int = 1, most_blocks: int = 6) -> tuple[ModelProfile, Machine]:
    """A profile and a machine about its size: sometimes ample, often tight, sometimes too small."""
    profile = draw(transformers(most_blocks))
    device = "cpu" if gpus == 1 and draw(st.booleans()) else "cuda"
    state = profile.parameter_elements * (14 if profile.precision == "bf16" else 16)
    # Of the host, what the start takes beside the tiers; without it nothing fits a GPU.
    start = 13 * gpus * max(p.elements for p in profile.parameters) * draw(st.sampled_from([0, 1, 1, 1]))
    least = min(p.allocated_bytes for p in profile.activations)
    machine = machine_of(
        FIXED_MARGIN_BYTES[device] + int(least * draw(st.floats(1.0, 4.0))) + int(state * draw(st.floats(0.1, 1.1))),
        start + draw(st.one_of(st.just(0), st.floats(0.0, 2.0).map(lambda share: int(share * state)))),
        draw(st.one_of(st.just(0), st.floats(0.0, 1.5).map(lambda share: int(share * state)))),
        device=device,
        gpus=gpus,
    )
    return profile, machine
