"""What ``--nvme`` says: a directory that is here, or a disk that is only described."""

from dataclasses import dataclass, replace
from pathlib import Path

from memplan.disks import inspect
from memplan.errors import MachineError
from memplan.formatting import format_bytes
from memplan.machine import Machine, with_directory, with_disk
from memplan.sizes import is_rate, is_size, parse_bytes, parse_rate

ASSUMED_DISK_BYTES = 1 << 40
"""Of a described disk whose size nobody said."""
DESCRIBED_DIRECTORY = Path("/mnt/nvme")
"""Where a described disk without a directory is, so that a plan can name it."""


@dataclass(frozen=True)
class Nvme:
    """What ``--nvme`` says; ``None`` is what it leaves out."""

    directory: Path | None
    size_bytes: int | None
    bytes_per_second: float | None


def parse_nvme(text: str) -> Nvme:
    """What ``DIR``, ``DIR:SIZE``, ``RATE``, ``RATE:SIZE`` or ``DIR:SIZE:RATE`` says of a disk. Raises MachineError.

    A size alone says too little; a directory's name may have a colon.
    """
    rest, size, rate = text, None, None
    while rest:
        head, colon, last = rest.rpartition(":")
        if rate is None and is_rate(last):
            rate = parse_rate(last, "the rate in --nvme")
        elif size is not None or Path(rest).is_dir() or not (colon or is_size(rest)):
            break
        else:
            size = parse_bytes(last, "the size in --nvme")
        rest = head
    if not rest and rate is None:
        raise MachineError(f"--nvme is {text!r}; write DIR or DIR:SIZE, or for a described disk 7GB/s or 7GB/s:SIZE")
    if size == 0:
        raise MachineError("the size in --nvme is 0; leave --nvme out to use no disk")
    return Nvme(Path(rest) if rest else None, size, rate)


def local_nvme(text: str) -> tuple[Path, int | None]:
    """Directory and size of a disk that is here; raises MachineError, also for a rate, which can be measured here."""
    disk = parse_nvme(text)
    if disk.directory is None or disk.bytes_per_second is not None:
        raise MachineError(
            f"--nvme {text} names a rate, which describes a disk that is not here; write DIR or DIR:SIZE, or describe "
            "the whole machine by --machine"
        )
    return disk.directory, disk.size_bytes


def with_disk_here(machine: Machine, nvme: str | None) -> Machine:
    """``machine``, which is here, with the directory that ``nvme`` names. Raises MachineError."""
    return machine if nvme is None else with_directory(machine, *local_nvme(nvme))


def with_described_disk(machine: Machine, nvme: str | None) -> Machine:
    """``machine``, which is described, with the disk that ``nvme`` does; raises MachineError.

    Its size is the one that is said, else what is free in a directory of that name here, else an assumption. What kind
    of disk is behind such a directory counts as on a machine that is here: it may be memory, or a network's.
    """
    if nvme is None:
        return machine
    disk, remarks = parse_nvme(nvme), machine.remarks
    size, directory = disk.size_bytes, disk.directory or DESCRIBED_DIRECTORY
    here = disk.directory is not None and directory.is_dir()
    if not here and not directory.is_absolute():
        raise MachineError(
            f"--nvme {nvme} names no directory that is here, and no rate such as 7GB/s; of a machine that is "
            "elsewhere write the whole path"
        )
    if here:
        machine = with_disk(machine, inspect(directory.resolve(), trial=False), size)
        return replace(machine, nvme_bytes_per_second=disk.bytes_per_second)
    if size is None:
        size = ASSUMED_DISK_BYTES
        assumed = f"{format_bytes(size)} a node are assumed"
        remarks += (f"Nobody said how large the disk is: {assumed}. Say it by --nvme {nvme}:SIZE.",)
    return replace(
        machine,
        nvme_dir=directory,
        nvme_bytes=size,
        disk=None,
        nvme_bytes_per_second=disk.bytes_per_second,
        remarks=remarks,
    )
