"""The NVMe tier: one preallocated file of extents, direct I/O, many requests in flight, a checksum a block.

The file is unlinked as soon as it is open: however the process ends, the swap space goes with it.
"""

import asyncio
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiofiles
import torch
from aiofiles.threadpool.binary import AsyncFileIO
from crc32c import crc32c

from offload.errors import CorruptionError, TierError
from offload.residency import BLOCK_BYTES, aligned

QUEUE_DEPTH = 8
"""Requests in flight: where the disks measured so far stop gaining from more."""

Ticket = Future[None]
"""One request: ``result()`` returns when every byte is there, or raises."""


@dataclass(frozen=True)
class Extent:
    """A place in the file; both numbers are multiples of 4096."""

    offset_bytes: int
    size_bytes: int
    of: str = "something"
    """What is there, for a sentence."""


def check_directory(directory: Path, size_bytes: int) -> None:
    """Raise TierError when ``size_bytes`` of swap space can not be made in ``directory``; makes nothing."""
    if not directory.is_dir():
        raise TierError(f"the NVMe directory {directory} does not exist; create it, or name another with --nvme")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise TierError(f"the NVMe directory {directory} is not writable; change its permissions or name another")
    free = shutil.disk_usage(directory).free
    if size_bytes > free:
        raise TierError(
            f"the NVMe tier needs {size_bytes} bytes in {directory} but only {free} are free "
            f"({size_bytes - free} short); free some, or name another directory with --nvme"
        )


class Store:
    """``capacity_bytes`` of swap space in a directory.

    Buffers are uint8 tensors on host memory, page-aligned and as long as their extent. A read of an extent must be
    asked for after the ticket of its last write has its result.
    """

    def __init__(self, directory: Path, capacity_bytes: int, io_bytes: int) -> None:
        check_directory(directory, capacity_bytes)
        self._directory = directory
        self.bytes_read = self.bytes_written = 0
        self.capacity_bytes = capacity_bytes
        self.taken_bytes = 0
        self._io_bytes = aligned(io_bytes, BLOCK_BYTES)
        self._checksums: dict[int, int] = {}
        self._executor = ThreadPoolExecutor(QUEUE_DEPTH, thread_name_prefix="memplan-nvme")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="memplan-nvme-loop", daemon=True)
        self._thread.start()
        self._idle: asyncio.Queue[AsyncFileIO] = asyncio.Queue()
        self._handles: list[AsyncFileIO] = []
        try:
            self._run(self._open(directory)).result()
        except OSError as error:
            self.close()
            raise TierError(f"could not make {capacity_bytes} bytes of swap space in {directory}: {error}") from error

    def take(self, size_bytes: int, of: str = "something") -> Extent:
        """The next extent of the file, rounded up to whole blocks; ``of`` says what will be there."""
        extent = Extent(self.taken_bytes, aligned(size_bytes, BLOCK_BYTES), of)
        self.taken_bytes += extent.size_bytes
        assert self.taken_bytes <= self.capacity_bytes, "the store was sized for less than is taken from it"
        return extent

    def write(self, extent: Extent, source: torch.Tensor) -> Ticket:
        """Write the whole extent from ``source``, which must stay as it is until the ticket has its result."""
        self.bytes_written += extent.size_bytes
        return self._run(self._transfer(extent, source.numpy().data, write=True))

    def read(self, extent: Extent, target: torch.Tensor) -> Ticket:
        """Read the whole extent into ``target``; the ticket raises CorruptionError where a checksum differs.

        Here as in ``write`` it raises TierError where the disk fails.
        """
        self.bytes_read += extent.size_bytes
        return self._run(self._transfer(extent, target.numpy().data, write=False))

    def settle(self) -> None:
        """Wait until nothing is under way, whether it went well or not."""
        if self._loop.is_running():
            self._run(self._settle()).result()

    def close(self) -> None:
        """Close the file; what it held is gone."""
        if self._loop.is_running():
            self._run(self._close()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._executor.shutdown()

    def _run(self, work: Coroutine[Any, Any, None]) -> Ticket:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self, directory: Path) -> None:
        descriptor, path = tempfile.mkstemp(prefix="memplan-", suffix=".swap", dir=directory)
        try:
            await self._loop.run_in_executor(
                self._executor, os.posix_fallocate, descriptor, 0, max(self.capacity_bytes, BLOCK_BYTES)
            )
            for _ in range(QUEUE_DEPTH):
                handle = await aiofiles.open(
                    path, "r+b", buffering=0, opener=_open_direct, loop=self._loop, executor=self._executor
                )
                self._handles.append(handle)
                self._idle.put_nowait(handle)
        finally:
            os.close(descriptor)
            os.unlink(path)  # noqa: PTH108 - the counterpart of mkstemp above

    async def _settle(self) -> None:
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    async def _close(self) -> None:
        await self._settle()
        for handle in self._handles:
            await handle.close()

    async def _transfer(self, extent: Extent, buffer: memoryview, *, write: bool) -> None:
        assert len(buffer) == extent.size_bytes, (len(buffer), extent)
        one = self._write_block if write else self._read_block
        spans = range(0, extent.size_bytes, self._io_bytes)
        # All of them: a buffer belongs to its blocks until the last is over.
        blocks = (one(extent.offset_bytes + a, buffer[a : a + self._io_bytes]) for a in spans)
        ended = await asyncio.gather(*blocks, return_exceptions=True)
        for error in (e for e in ended if e is not None):
            if not isinstance(error, OSError):
                raise error
            raise TierError(
                f"{'writing' if write else 'reading'} the {extent.of} failed in the NVMe directory {self._directory} "
                f"({extent.size_bytes} bytes at {extent.offset_bytes} of the swap file): {error}. The kernel's log "
                "(dmesg) says more; if it comes again, name a directory on another disk with --nvme"
            ) from error

    async def _write_block(self, offset: int, block: memoryview) -> None:
        handle = await self._idle.get()
        try:
            self._checksums[offset] = await self._loop.run_in_executor(self._executor, crc32c, block)
            await handle.seek(offset)
            written = 0
            while written < len(block):
                written += await handle.write(block[written:])
        finally:
            self._idle.put_nowait(handle)

    async def _read_block(self, offset: int, block: memoryview) -> None:
        handle = await self._idle.get()
        try:
            await handle.seek(offset)
            read = 0
            while read < len(block):
                count = await handle.readinto(block[read:])
                if not count:
                    raise CorruptionError(f"the swap file ends at {offset + read}, inside a block that was written")
                read += count
            found = await self._loop.run_in_executor(self._executor, crc32c, block)
        finally:
            self._idle.put_nowait(handle)
        if found != self._checksums[offset]:
            raise CorruptionError(
                f"the swap file's block at {offset} ({len(block)} bytes) reads back with checksum {found:08x}, "
                f"it was written with {self._checksums[offset]:08x}; the disk or its driver loses data"
            )


def _open_direct(path: str, flags: int) -> int:
    """Open without the page cache, where the filesystem can."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)
