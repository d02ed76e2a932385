"""A safetensors file written from front to back: tensors go out as they come, and are never all in memory."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from crc32c import crc32c

from offload.errors import CheckpointError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""Types of the format by torch's."""
SYNC_BYTES = 64 << 20
"""Written bytes after which they go to the disk and out of the page cache: it shall not fill with what nobody reads."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Of its data."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """Writes ``entries`` in their order; in the end every byte is on the disk. Space for all is taken at once.

    Raises OSError, and CheckpointError for a type that the format does not have.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
        header = _header(entries, metadata)
        self.path = path
        self.size_bytes = len(header) + sum(entry.size_bytes for entry in entries)
        self.crc32c = 0
        self._written = self._synced = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(self._descriptor, 0, self.size_bytes)
            self._append(memoryview(header))
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, tensor: torch.Tensor) -> None:
        """The next elements, on the host: a whole tensor of the file or a part of one."""
        flat = tensor.contiguous().view(-1)
        if flat.numel():
            self._append(flat.view(torch.uint8).numpy().data)

    def _append(self, data: memoryview) -> None:
        self.crc32c = crc32c(data, self.crc32c)
        while data:
            count = os.write(self._descriptor, data)
            data = data[count:]
            self._written += count
        if self._written - self._synced >= SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, self._synced, self._written - self._synced, os.POSIX_FADV_DONTNEED)
        self._synced = self._written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                assert self._written == self.size_bytes, (self._written, self.size_bytes)
                self._sync()
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON, as https://huggingface.co/docs/safetensors describes them; data begins at a multiple of 8."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for entry in entries:
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{entry.key} is of type {entry.dtype}, which safetensors files can not hold")
        offsets = [start, start + entry.size_bytes]
        described[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        start = offsets[1]
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
