"""The disk: the runtime's own store, and requests of many sizes and depths past the page cache."""

import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch

from memplan.calibrate.parts import MIB, Part, gigabytes
from memplan.disks import inspect
from offload.arena import page_aligned
from offload.plan import Buckets
from offload.residency import BLOCK_BYTES, UPDATE_RING, aligned
from offload.store import QUEUE_DEPTH, Extent, Store, Ticket

EXTENT_BYTES = 40 * MIB
"""What the runtime reads and writes of a chunk of bf16 state."""
STORE_SECONDS = 0.8
"""Of reading, and of writing."""
CELL_SECONDS = 0.12
"""Of one block size at one depth."""


def disk(directory: Path, size_bytes: int, blocks: Sequence[int], depths: Sequence[int], seconds: float) -> Part:
    """Reading and writing as the runtime does them, and a table of others. No file stays.

    ``size_bytes`` bounds every file. A directory that is not on a local disk is measured too, and named.
    """
    read, write = store_rates(directory, size_bytes)
    there = inspect(directory)
    notes = [f"disk: {there.trouble}; measured all the same"] if there.trouble else []
    block = Buckets().io_bytes // MIB
    store = (
        (f"the runtime's store on {there.filesystem}: {QUEUE_DEPTH} requests of {block} MiB", ""),
        ("read", gigabytes(read)),
        ("write", gigabytes(write)),
    )
    table, missing = _table(directory, size_bytes, blocks, depths, seconds)
    rates = {"nvme_read_bytes_per_second": read, "nvme_write_bytes_per_second": write}
    return Part(rates, {"disk": store, "disk by block and depth": table}, (*notes, *missing))


def store_rates(directory: Path, size_bytes: int, seconds: float = STORE_SECONDS) -> tuple[float, float]:
    """Bytes a second that the runtime's store reads and writes, its checksums included, a ring of extents on its way.

    Writes for ``seconds`` at most, or until ``size_bytes`` are there, and reads those again.
    """
    extent_bytes = aligned(min(EXTENT_BYTES, size_bytes), BLOCK_BYTES)
    store = Store(directory, size_bytes // extent_bytes * extent_bytes, Buckets().io_bytes)
    try:
        ring = [page_aligned(extent_bytes) for _ in range(UPDATE_RING)]
        noise = torch.randint(0, 256, ring[0].shape, dtype=torch.uint8)
        for buffer in ring:
            buffer.copy_(noise)
        extents = [store.take(extent_bytes) for _ in range(store.capacity_bytes // extent_bytes)]
        write, written = _through(store, extents, ring, seconds, write=True)
        read, _ = _through(store, written, ring, seconds, write=False)
    finally:
        store.close()
    return read, write


def _through(
    store: Store, extents: Sequence[Extent], ring: Sequence[torch.Tensor], seconds: float, *, write: bool
) -> tuple[float, list[Extent]]:
    """Bytes a second, and the extents that there was time for."""
    request = store.write if write else store.read
    tickets: list[Ticket] = []
    begun = time.perf_counter()
    for index, extent in enumerate(extents):
        if index >= len(ring):
            tickets[index - len(ring)].result()
            if time.perf_counter() - begun > seconds:
                break
        tickets.append(request(extent, ring[index % len(ring)]))
    for ticket in tickets:
        ticket.result()
    done = list(extents[: len(tickets)])
    return sum(extent.size_bytes for extent in done) / (time.perf_counter() - begun), done


def _table(
    directory: Path, size_bytes: int, blocks: Sequence[int], depths: Sequence[int], seconds: float
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Rows of block, depth, read and write; and what there was no time for, in a sentence."""
    cells = [(block, depth) for block, depth in product(blocks, depths) if block * depth <= size_bytes]
    end, missing = time.perf_counter() + seconds, 0
    rows = []
    with _direct_file(directory, size_bytes) as (file, direct):
        buffers = [mmap.mmap(-1, max(blocks)) for _ in range(max(depths))]  # aligned to pages, as direct I/O wants it
        noise = os.urandom(max(blocks))
        for buffer in buffers:
            buffer.write(noise)
        for block, depth in cells:
            if time.perf_counter() > end:
                missing += 1
                continue
            views = [memoryview(buffer)[:block] for buffer in buffers[:depth]]
            write, written = _requests(file, views, size_bytes, write=True)
            read, _ = _requests(file, views, written, write=False)  # what was never written is not read from the disk
            rows.append((f"{block // MIB} MiB", str(depth), gigabytes(read), gigabytes(write)))
    head = ("block", "requests at once", "read", "write" if direct else "write (page cache)")
    sentences = [f"disk: {missing} of {len(cells)} combinations of block and depth, for time"] if missing else []
    if not direct:
        sentences.append(f"disk: {directory} does not support direct I/O, so the page cache takes part")
    return (head, *rows), tuple(sentences)


def _requests(file: int, views: Sequence[memoryview], size_bytes: int, *, write: bool) -> tuple[float, int]:
    """Bytes a second of requests from one thread each, for a moment; and how far into the file they went.

    From the file's beginning to ``size_bytes``, and again.
    """
    block, depth = len(views[0]), len(views)
    stride = depth * block
    begun = time.perf_counter()

    def work(index: int) -> int:
        offset, done = index * block, 0
        while not done or time.perf_counter() - begun < CELL_SECONDS:
            done += os.pwrite(file, views[index], offset) if write else os.preadv(file, [views[index]], offset)
            offset = offset + stride if offset + stride + block <= size_bytes else index * block
        return done

    with ThreadPoolExecutor(depth) as workers:
        moved = sum(workers.map(work, range(depth)))
    return moved / (time.perf_counter() - begun), min(size_bytes, moved // stride * stride)


@contextmanager
def _direct_file(directory: Path, size_bytes: int) -> Iterator[tuple[int, bool]]:
    """A file of that size without a name, and whether it goes past the page cache."""
    handle, name = tempfile.mkstemp(prefix=".memplan-rate-", dir=directory)
    try:
        try:
            os.posix_fallocate(handle, 0, size_bytes)
            file, direct = open_direct(Path(name))
        finally:
            Path(name).unlink()
    finally:
        os.close(handle)
    try:
        yield file, direct
    finally:
        os.close(file)


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor for reading and writing, with O_DIRECT where the file system knows it; and whether it does."""
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT), True
    except (OSError, AttributeError):
        return os.open(path, os.O_RDWR), False
