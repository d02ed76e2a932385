"""The arena: every byte of host memory that the runtime holds, mapped at once, exactly as large as it must be.

Memory is mapped, touched and then registered with the driver: 0.05 s a GiB where torch's pinned allocator takes
0.7 s and rounds up to a power of two.
"""

import mmap
from contextlib import suppress

import psutil
import torch

from offload.errors import TierError
from offload.residency import BLOCK_BYTES, aligned


def page_aligned(size_bytes: int) -> torch.Tensor:
    """A uint8 tensor of its own on zeroed, page-aligned memory, in huge pages where the system has them."""
    # Every page is touched now, so that running out of memory is seen here and not in step 40.
    return mapped(size_bytes).zero_()


def mapped(size_bytes: int) -> torch.Tensor:
    """The same, not yet touched: it takes no memory until then."""
    memory = mmap.mmap(-1, max(size_bytes, BLOCK_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Arena:
    """A fixed number of bytes, handed out in page-aligned pieces, and pinned when the device is a GPU.

    Memory is taken with the pieces, so that what goes into them may leave other memory meanwhile: ``coming_bytes``.
    """

    def __init__(self, capacity_bytes: int, device: torch.device, coming_bytes: int = 0) -> None:
        available = psutil.virtual_memory().available + coming_bytes
        if capacity_bytes > available:
            raise TierError(
                f"the host tier needs {capacity_bytes} bytes but only {available} are available; "
                "close other programs, or plan with a smaller --host-memory"
            )
        self.capacity_bytes = capacity_bytes
        self.taken_bytes = 0
        self._pinned = False
        self._device = device
        self._bytes = mapped(aligned(capacity_bytes, BLOCK_BYTES))

    def pin(self) -> None:
        """Touch what was not taken yet, and register all of it with the driver of a GPU; raises TierError."""
        self._bytes[self.taken_bytes :].zero_()
        if self._device.type != "cuda" or not self.capacity_bytes:
            return
        status = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0)
        if int(status) != 0:
            raise TierError(
                f"the driver could not pin {self._bytes.numel()} bytes of host memory ({status}); "
                "raise the memory-lock limit (ulimit -l unlimited), or plan with a smaller --host-memory"
            )
        self._pinned = True

    def take(self, size_bytes: int) -> torch.Tensor:
        """The next ``size_bytes`` as a uint8 tensor, page-aligned, zero; an AssertionError when the sum was wrong."""
        start = self.taken_bytes
        self.taken_bytes += aligned(size_bytes, BLOCK_BYTES)
        assert self.taken_bytes <= self._bytes.numel(), "the arena was sized for less than is taken from it"
        return self._bytes[start : start + size_bytes].zero_()

    def close(self) -> None:
        """Unpin; the memory itself goes when the last tensor on it does."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._pinned = False
