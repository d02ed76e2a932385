"""The step of an engine that takes every gradient away as it arrives: gradients live only until then."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from profiler.events import BACKWARD, Alloc, Category, Event, Free, Gradient


def gradients_taken(events: Iterable[Event], parameter_bytes: Mapping[str, int]) -> list[Event]:
    """The events with the end of each gradient's storage at its arrival; ``parameter_bytes`` are by name.

    Which storage a parameter's gradient is in is told by its size: of storages of one size it does not matter which.
    """
    waiting: dict[int, list[int]] = defaultdict(list)
    found: list[Event] = []
    for event in events:
        found.append(event)
        if isinstance(event, Alloc) and event.category is Category.GRADIENT:
            waiting[event.bytes].append(event.id)
        elif isinstance(event, Gradient) and waiting[parameter_bytes[event.parameter]]:
            found.append(Free(waiting[parameter_bytes[event.parameter]].pop(0), BACKWARD))
    return found
