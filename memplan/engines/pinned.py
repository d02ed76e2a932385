"""Page-locked host memory as PyTorch's caching allocator hands it out."""

from collections import Counter


def rounded(size_bytes: int) -> int:
    """What a request takes: the next power of two (``CachingHostAllocatorImpl`` in PyTorch's ATen)."""
    return 1 << (size_bytes - 1).bit_length() if size_bytes > 0 else 0


class PinnedCache:
    """The bytes of one process: a freed block is kept, and given out again only for the same rounded size."""

    def __init__(self) -> None:
        self.bytes = 0
        """Page-locked, whether in use or kept."""
        self._free: Counter[int] = Counter()

    def allocate(self, size_bytes: int) -> None:
        """A tensor of this size is pinned."""
        block = rounded(size_bytes)
        if self._free[block]:
            self._free[block] -= 1
        else:
            self.bytes += block

    def free(self, size_bytes: int) -> None:
        """A tensor of this size is let go."""
        self._free[rounded(size_bytes)] += 1
