"""Folding a trace into figures by module, and finding the blocks that a model repeats."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from profiler.events import BACKWARD, Alloc, Call, Category, Event, Free, Op, Save
from profiler.profile import LayerProfile, OperationProfile, ParameterProfile
from profiler.runs import parents
from profiler.trace import Trace


def layer_profiles(
    model: nn.Module, trace: Trace, parameters: tuple[ParameterProfile, ...]
) -> tuple[LayerProfile, ...]:
    """One profile a module in the order of ``model.named_modules()``; a parent's figures include its children's."""
    calls = Counter(e.module for e in trace.events if isinstance(e, Call))
    figures = ("forward", "backward", "recompute", "saved", "moved")
    own: dict[str, Counter[str]] = {figure: Counter() for figure in figures}
    for module, size in saved_storages(trace.events):
        own["saved"][module] += size
    for event in trace.events:
        if isinstance(event, Op) and event.recompute:
            own["recompute"][event.module] += event.flops or 0
        elif isinstance(event, Op):
            own["backward" if event.phase == BACKWARD else "forward"][event.module] += (
                event.flops or 0
            ) - event.repeated_flops
            own["recompute"][event.module] += event.repeated_flops
            own["moved"][event.module] += event.bytes
    total = {figure: with_children(values) for figure, values in own.items()}
    transient = _transient_bytes(trace.events)
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for parameter, traced in zip(parameters, trace.parameters, strict=True):
        for path in parents(parameter.name.rpartition(".")[0]):
            elements[path] += parameter.elements
            sizes[path] += traced.bytes
    order = {path: position for position, path in enumerate(calls)}
    return tuple(
        LayerProfile(
            path=path,
            type=type(module).__name__,
            order=order.get(path),
            calls=calls[path],
            parameters=elements[path],
            parameter_bytes=sizes[path],
            forward_flops=total["forward"][path],
            backward_flops=total["backward"][path],
            recompute_flops=total["recompute"][path],
            activation_bytes=total["saved"][path],
            transient_bytes=transient[path],
            moved_bytes=total["moved"][path],
        )
        for path, module in model.named_modules()
    )


Figure = TypeVar("Figure", int, float)


def with_children(own: Mapping[str, Figure]) -> defaultdict[str, Figure]:
    """Every module's figure with those of the modules below it; 0 where there is none."""
    total: defaultdict[str, Figure] = defaultdict(int)
    for module, value in own.items():
        for path in parents(module):
            total[path] += value
    return total


def _transient_bytes(events: Sequence[Event]) -> dict[str, int]:
    """By module, the most that its operations and those below it held at once beside what is kept for backward."""
    kept = {e.id for e in events if isinstance(e, Save)}
    owners: dict[int, tuple[str, int]] = {}
    held: Counter[str] = Counter()
    most: defaultdict[str, int] = defaultdict(int)
    for e in events:
        if isinstance(e, Alloc):
            if e.category is Category.ACTIVATION and e.id not in kept:
                owners[e.id] = (e.module, e.bytes)
                for path in parents(e.module):
                    held[path] += e.bytes
                    if held[path] > most[path]:
                        most[path] = held[path]
        elif isinstance(e, Free) and e.id in owners:
            module, size = owners.pop(e.id)
            for path in parents(module):
                held[path] -= size
    return most


def saved_storages(events: Iterable[Event]) -> Iterator[tuple[str, int]]:
    """(module, bytes) of every storage that autograd keeps for backward, once, parameters left out."""
    sizes: dict[int, int] = {}
    for event in events:
        if isinstance(event, Alloc) and event.category is not Category.PARAMETER:
            sizes[event.id] = event.bytes
        elif isinstance(event, Save) and event.id in sizes:
            yield event.module, sizes.pop(event.id)


def operation_profiles(trace: Trace) -> tuple[OperationProfile, ...]:
    """All operations of forward and backward by name, those that move the most bytes first."""
    calls: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    uncounted = set()
    for event in trace.events:
        if isinstance(event, Op):
            calls[event.name] += 1
            moved[event.name] += event.bytes
            flops[event.name] += event.flops or 0
            if event.flops is None:
                uncounted.add(event.name)
    return tuple(
        OperationProfile(name, calls[name], None if name in uncounted else flops[name], size)
        for name, size in moved.most_common()
    )


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks that a model repeats, in the order of ``model.named_modules()``.

    They are children of a ``ModuleList`` or ``Sequential``, own parameters, and share their class and the shapes of
    their parameters with at least one sibling. The outermost are taken: no block lies inside another.
    """
    return tuple(_blocks(model, ""))


def _blocks(module: nn.Module, path: str) -> Iterator[str]:
    chosen = set(_alike(module)) if isinstance(module, nn.ModuleList | nn.Sequential) else set()
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if name in chosen:
            yield child_path
        else:
            yield from _blocks(child, child_path)


def _alike(container: nn.Module) -> list[str]:
    kinds: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, child in container.named_children():
        shapes = tuple((n, tuple(p.shape)) for n, p in child.named_parameters())
        # A list of modules is never called itself: its members are the blocks.
        if shapes and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            kinds[type(child), shapes].append(name)
    return [name for names in kinds.values() if len(names) > 1 for name in names]
