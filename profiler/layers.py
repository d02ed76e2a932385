"""Folding a trace into figures by module, and finding the blocks that a model repeats."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

from profiler.events import BACKWARD, Alloc, Call, Category, Event, Op, Save
from profiler.profile import LayerProfile, OperationProfile, ParameterProfile
from profiler.trace import Trace


def _with_parents(path: str) -> Iterator[str]:
    """The path and every module above it, the model ("") last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def layer_profiles(
    model: nn.Module, trace: Trace, parameters: tuple[ParameterProfile, ...]
) -> tuple[LayerProfile, ...]:
    """One profile a module in the order of ``model.named_modules()``; a parent's figures include its children's."""
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    saved: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for module, size in saved_storages(trace.events):
        for path in _with_parents(module):
            saved[path] += size
    for event in trace.events:
        if isinstance(event, Call):
            calls[event.module] += 1
        elif isinstance(event, Op) and not event.recompute:
            target = backward if event.phase == BACKWARD else forward
            for path in _with_parents(event.module):
                target[path] += event.flops or 0
                moved[path] += event.bytes
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for parameter, traced in zip(parameters, trace.parameters, strict=True):
        for path in _with_parents(parameter.name.rpartition(".")[0]):
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
            forward_flops=forward[path],
            backward_flops=backward[path],
            activation_bytes=saved[path],
            moved_bytes=moved[path],
        )
        for path, module in model.named_modules()
    )


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
