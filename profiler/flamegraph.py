"""A profile as a flame graph: the file format of https://www.speedscope.app, which runs in the browser or offline.

Frames are modules, in the order in which the model calls them, and a frame's width is one of its figures. One file
holds a graph for each figure that the profile knows.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiler.profile import LayerProfile, ModelProfile

SCHEMA = "https://www.speedscope.app/file-format-schema.json"


@dataclass(frozen=True)
class _Figure:
    name: str
    unit: str
    """One of the format's units, which know no FLOPs."""
    of: Callable[[LayerProfile], float]


FIGURES = (
    _Figure("saved for backward", "bytes", lambda layer: layer.activation_bytes),
    _Figure("parameters", "bytes", lambda layer: layer.parameter_bytes),
    _Figure("FLOPs, forward and backward", "none", lambda layer: layer.forward_flops + layer.backward_flops),
    _Figure("bytes read and written", "bytes", lambda layer: layer.moved_bytes),
    _Figure("time, forward and backward", "seconds", lambda layer: layer.seconds or 0.0),
)


def write_flamegraph(profile: ModelProfile, path: Path) -> None:
    """Write ``flamegraph``'s JSON."""
    path.write_text(json.dumps(flamegraph(profile)) + "\n")


def flamegraph(profile: ModelProfile) -> dict[str, Any]:
    """The file as JSON: one sampled profile a figure, whose weights add up to the model's total."""
    stacks = dict(_stacks(profile.layers))
    names = list(dict.fromkeys(frame for stack in stacks.values() for frame in stack))
    numbers = {name: number for number, name in enumerate(names)}
    graphs = []
    for figure in FIGURES:
        values = _own(profile.layers, figure.of)
        if own := [(stack, values[path]) for path, stack in stacks.items() if values[path] > 0]:
            graphs.append(
                {
                    "type": "sampled",
                    "name": figure.name,
                    "unit": figure.unit,
                    "startValue": 0,
                    "endValue": sum(value for _, value in own),
                    "samples": [[numbers[frame] for frame in stack] for stack, _ in own],
                    "weights": [value for _, value in own],
                }
            )
    return {
        "$schema": SCHEMA,
        "name": f"{profile.model}, batch {profile.batch_size}, {profile.precision}",
        "exporter": "memplan",
        "activeProfileIndex": 0,
        "shared": {"frames": [{"name": name} for name in names]},
        "profiles": graphs,
    }


def _stacks(layers: tuple[LayerProfile, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every layer's path with the frames that lead to it, in the order of the calls.

    Children stay with their parent, so that a viewer draws each module once.
    """
    children: dict[str, list[LayerProfile]] = {}
    for layer in layers[1:]:
        children.setdefault(layer.path.rpartition(".")[0], []).append(layer)
    first: dict[str, float] = {}
    for layer in reversed(layers):
        orders = [first[child.path] for child in children.get(layer.path, [])]
        first[layer.path] = min([float("inf") if layer.order is None else layer.order, *orders])

    def walk(layer: LayerProfile, above: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
        stack = (*above, _frame(layer))
        yield layer.path, stack
        for child in sorted(children.get(layer.path, []), key=lambda each: first[each.path]):
            yield from walk(child, stack)

    return walk(layers[0], ())


def _frame(layer: LayerProfile) -> str:
    name = layer.path.rpartition(".")[2]
    return f"{name} ({layer.type})" if name else layer.type


def _own(layers: tuple[LayerProfile, ...], figure: Callable[[LayerProfile], float]) -> dict[str, float]:
    """Every layer's figure without its children's, by path."""
    own = {layer.path: figure(layer) for layer in layers}
    for layer in layers[1:]:
        own[layer.path.rpartition(".")[0]] -= figure(layer)
    return own
