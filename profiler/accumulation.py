"""Where several gradients meet, autograd adds them up in place; not so for subclasses of tensors, as fake ones are."""

from collections.abc import Iterable, Mapping

from profiler.events import Alloc, Category, Event, Free, Op, Save


def added_in_place(events: Iterable[Event], sums: Mapping[int, int]) -> list[Event]:
    """The events without the storages of sums (id: id of the first summand) that could take the first summand's.

    Autograd does so if it holds the last reference, which shows in the summand's end right after the addition.
    """
    events = list(events)
    last: dict[int, int] = {}
    dropped: set[int] = set()
    for at, event in enumerate(events):
        if isinstance(event, Alloc) and event.id in sums and isinstance(events[at + 1], Op):
            end = _end_of(sums[event.id], events, at + 2)
            if end is not None:
                dropped.update((at, end))
                last[event.id] = last.get(sums[event.id], sums[event.id])
    categories = {last[e.id]: e.category for e in events if isinstance(e, Alloc) and e.id in last}
    return [_renamed(e, last, categories) for at, e in enumerate(events) if at not in dropped]


def _end_of(number: int, events: list[Event], start: int) -> int | None:
    for at in range(start, len(events)):
        event = events[at]
        if not isinstance(event, Free):
            return None
        if event.id == number:
            return at
    return None


def _renamed(event: Event, last: Mapping[int, int], categories: Mapping[int, Category]) -> Event:
    if isinstance(event, Alloc):
        return event._replace(category=categories.get(event.id, event.category))
    if isinstance(event, Free | Save) and event.id in last:
        return event._replace(id=last[event.id])
    return event
