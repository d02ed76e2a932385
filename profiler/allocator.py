"""A model of PyTorch's caching allocator for CUDA: requests in, allocated and reserved bytes out.

It follows the native allocator's documented behaviour: 512-byte rounding, a pool of small blocks and one of large ones,
best fit, splitting, joining of free neighbours, and segments that are never given back. ``CachingAllocator`` has the
default settings, ``ExpandableAllocator`` those of ``expandable_segments:True``. Running out of memory, and the
collection of cached segments that comes with it, is not modelled.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass

ALIGNMENT_BYTES = 512
SMALL_REQUEST_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_REQUEST_BYTES = 10 << 20
LARGE_SEGMENT_BYTES = 20 << 20
SEGMENT_ROUNDING_BYTES = 2 << 20


def round_up(count: int, multiple: int) -> int:
    """``count`` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def segment_bytes(request_bytes: int) -> int:
    """What is asked of the driver when no cached block can hold a rounded request."""
    if request_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if request_bytes < LARGE_REQUEST_BYTES:
        return LARGE_SEGMENT_BYTES
    return round_up(request_bytes, SEGMENT_ROUNDING_BYTES)


@dataclass(slots=True)
class _Block:
    """A stretch of one segment, linked to its neighbours in that segment."""

    address: int
    size: int
    small: bool
    free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None


class CachingAllocator:
    """Blocks in segments, as the allocator would lay them out.

    ``allocated_bytes`` counts whole blocks in use, as ``torch.cuda.memory_allocated`` does; ``reserved_bytes``
    counts the segments.
    """

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self._next_address = 0
        self._used: dict[Hashable, _Block] = {}
        self._blocks: dict[int, _Block] = {}
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}

    def allocate(self, key: Hashable, size: int) -> None:
        """Hand out a block of at least ``size`` bytes under a new key; a request of 0 bytes takes nothing."""
        if key in self._used:
            raise ValueError(f"{key!r} is allocated already")
        if size <= 0:
            return
        size = round_up(size, ALIGNMENT_BYTES)
        block = self._take(size)
        self._split(block, size)
        block.free = False
        self._used[key] = block
        self.allocated_bytes += block.size

    def free(self, key: Hashable) -> None:
        """Take a block back and join it with free neighbours; an unknown key (an empty request) is ignored."""
        block = self._used.pop(key, None)
        if block is None:
            return
        self.allocated_bytes -= block.size
        block.free = True
        if block.before is not None and block.before.free:
            block = self._join(self._withdraw(block.before), block)
        if block.after is not None and block.after.free:
            block = self._join(block, self._withdraw(block.after))
        insort(self._free[block.small], (block.size, block.address))

    def layout(self) -> dict[Hashable, tuple[int, int]]:
        """(address, size) of every block in use."""
        return {key: (block.address, block.size) for key, block in self._used.items()}

    def _take(self, size: int) -> _Block:
        small = size <= SMALL_REQUEST_BYTES
        free = self._free[small]
        at = bisect_left(free, (size, -1))
        if at < len(free):
            return self._withdraw(self._blocks[free[at][1]])
        length = segment_bytes(size)
        block = _Block(self._next_address, length, small)
        self._blocks[block.address] = block
        self._next_address += length
        self.reserved_bytes += length
        return block

    def _withdraw(self, block: _Block) -> _Block:
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.address))]
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        if rest >= ALIGNMENT_BYTES and (block.small or rest > SMALL_REQUEST_BYTES):
            self._cut(block, size)

    def _cut(self, block: _Block, size: int) -> None:
        tail = _Block(block.address + size, block.size - size, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = tail
        block.size, block.after = size, tail
        self._blocks[tail.address] = tail
        insort(self._free[tail.small], (tail.size, tail.address))

    def _join(self, left: _Block, right: _Block) -> _Block:
        left.size += right.size
        left.after = right.after
        if right.after is not None:
            right.after.before = left
        del self._blocks[right.address]
        return left


class ExpandableAllocator(CachingAllocator):
    """One segment a pool, which grows at its end, page by page, when no free block in it is large enough."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[bool, _Block | None] = {True: None, False: None}

    def _take(self, size: int) -> _Block:
        small = size <= SMALL_REQUEST_BYTES
        free, last = self._free[small], self._last[small]
        at = bisect_left(free, (size, 0))
        # The block at the end could grow to any size: by best fit it comes after every other that is large enough.
        if at < len(free) and last is not None and free[at][1] == last.address and at + 1 < len(free):
            at += 1
        if at < len(free):
            return self._withdraw(self._blocks[free[at][1]])
        return self._grown(size, small)

    def _grown(self, size: int, small: bool) -> _Block:
        page = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        last = self._last[small]
        room = last.size if last is not None and last.free else 0
        added = round_up(size - room, page)
        self.reserved_bytes += added
        if last is not None and last.free:
            block = self._withdraw(last)
            block.size += added
        else:
            # Pools lie far apart, so that each can grow.
            address = last.address + last.size if last is not None else (0 if small else 1 << 60)
            block = _Block(address, added, small, before=last)
            if last is not None:
                last.after = block
            self._blocks[address] = block
        self._last[small] = block
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        if rest >= ALIGNMENT_BYTES:
            self._cut(block, size)
            if self._last[block.small] is block:
                self._last[block.small] = block.after

    def _join(self, left: _Block, right: _Block) -> _Block:
        if self._last[left.small] is right:
            self._last[left.small] = left
        return super()._join(left, right)
