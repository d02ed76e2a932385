"""The inputs of recomputed blocks: what they hold, and a step in which they wait for backward on the host.

On the host, an input leaves the device when the next block begins, and comes back when that block runs again in
backward, one block ahead of its use. The last one stays.
"""

from collections import Counter
from collections.abc import Container, Sequence
from itertools import accumulate, pairwise

from profiler.allocator import ALIGNMENT_BYTES, round_up
from profiler.events import BACKWARD, FORWARD, LOSS, Alloc, Category, Event, Free, Op, Save


def input_bytes(events: Sequence[Event], blocks: Sequence[str]) -> tuple[int, ...]:
    """Bytes that autograd keeps as inputs of each recomputed block, each input once a block."""
    sizes = {e.id: e.bytes for e in events if isinstance(e, Alloc)}
    found: Counter[str] = Counter()
    for e in events:
        if isinstance(e, Save) and e.checkpoint:
            found[e.module] += sizes[e.id]
    return tuple(found[block] for block in blocks)


def freed_bytes(events: Sequence[Event], blocks: Sequence[str]) -> tuple[int, ...]:
    """Of a step without recompute, what backward begins with less if the first block is recomputed, the first two, ...

    That is all that nobody but these blocks keeps for backward; their inputs, which are kept anew, are not taken off.
    """
    place = {path: i for i, path in enumerate(blocks)} | {"": len(blocks)}
    made = {e.id: e for e in events if isinstance(e, Alloc) and e.phase in (FORWARD, LOSS)}
    began = next((i for i, e in enumerate(events) if getattr(e, "phase", "") == BACKWARD), len(events))
    ended = {e.id for e in events[began:] if isinstance(e, Free)}
    last: dict[int, int] = {}
    for e in events:
        if isinstance(e, Save) and e.id in ended and e.id in made and made[e.id].category is Category.ACTIVATION:
            last[e.id] = max(last.get(e.id, 0), place[_block_of(e.module, place)])
    found = [0] * (len(blocks) + 1)
    for storage, index in last.items():
        found[index] += round_up(made[storage].bytes, ALIGNMENT_BYTES)
    return tuple(accumulate(found[:-1]))


def _block_of(path: str, blocks: Container[str]) -> str:
    """The block in which a module is, "" for one that is in none."""
    while path and path not in blocks:
        path = path.rpartition(".")[0]
    return path


def staying_bytes(events: Sequence[Event], blocks: Sequence[str]) -> tuple[int, ...]:
    """Of the inputs that wait on the host, what something else keeps on the device, too."""
    keepers = Counter(e.id for e in events if isinstance(e, Save))
    return input_bytes([e for e in events if not isinstance(e, Save) or keepers[e.id] > 1], blocks)


def checkpoints_on_host(events: Sequence[Event]) -> list[Event] | None:
    """The same step with the inputs on the host; None where blocks do not run once each, one after the other.

    An input that something else keeps for backward too stays on the device.
    """
    saves = [(i, e) for i, e in enumerate(events) if isinstance(e, Save) and e.checkpoint]
    blocks = [e.module for _, e in saves]
    again = _second_runs(events, set(blocks))
    if len(set(blocks)) < len(blocks) or any(block not in again for block in blocks):
        return None
    keepers = Counter(e.id for e in events if isinstance(e, Save))
    made = {e.id: e for e in events if isinstance(e, Alloc)}
    ends = {e.id: i for i, e in enumerate(events) if isinstance(e, Free)}
    inserted: list[tuple[int, Event]] = []
    for (_, kept), (at, following) in pairwise(saves):
        back = again[following.module]
        if keepers[kept.id] == 1 and ends.get(kept.id, len(events)) > back > at:
            inserted += [(at, Free(kept.id, FORWARD)), (back, made[kept.id]._replace(phase=BACKWARD))]
    out, done = list[Event](), 0
    for at, event in sorted(inserted, key=lambda item: item[0]):
        out += [*events[done:at], event]
        done = at
    return [*out, *events[done:]]


def _second_runs(events: Sequence[Event], blocks: set[str]) -> dict[str, int]:
    """Where in backward each block begins to run again: the first operation of its recompute."""
    found: dict[str, int] = {}
    for i, e in enumerate(events):
        if isinstance(e, Op) and e.recompute and e.phase == BACKWARD and (block := _block_of(e.module, blocks)):
            found.setdefault(block, i)
    return found
