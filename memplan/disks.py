"""What a directory is on: its file system, the room there, and whether it can be read past the page cache."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "beegfs", "gpfs", "glusterfs", "wekafs"}
    | {"fuse." + name for name in ("sshfs", "ceph", "glusterfs", "s3fs", "gcsfuse", "rclone", "juicefs", "mount-s3")}
)


@dataclass(frozen=True)
class Disk:
    """What is behind a directory."""

    directory: Path
    free_bytes: int
    """Free for this user."""
    filesystem: str
    network: bool
    """The bytes travel to another machine."""
    in_memory: bool
    """It takes host memory."""
    direct_io: bool
    """Files can be opened past the page cache."""

    @property
    def trouble(self) -> str | None:
        """What speaks against it as NVMe tier, as a sentence; ``None`` for a disk of this machine."""
        if self.in_memory:
            return f"{self.directory} is on {self.filesystem}: it takes host memory, not disk"
        if self.network:
            return f"{self.directory} is on {self.filesystem}, a network mount: the network bounds its speed"
        return None


class Mount(NamedTuple):
    """A file system, and where it is mounted."""

    point: str
    kind: str
    device: str


Mounts = Sequence[Mount]
"""In the order in which they were mounted."""


def inspect(directory: Path, mounts: Mounts | None = None, *, trial: bool = True) -> Disk:
    """What ``directory`` is on; raises OSError where that can not be told.

    A ``trial`` makes a file in it for a moment; without one nothing is written, and direct I/O counts as missing.
    """
    kind = filesystem(directory, mounts)
    stat = os.statvfs(directory)
    return Disk(
        directory=directory,
        free_bytes=stat.f_bavail * stat.f_frsize,
        filesystem=kind,
        network=kind in NETWORK,
        in_memory=kind in IN_MEMORY,
        direct_io=trial and _direct_io(directory),
    )


def filesystem(directory: Path, mounts: Mounts | None = None) -> str:
    """Kind of the file system that the directory lies on."""
    mount = mount_of(directory, mounts)
    return mount.kind if mount is not None else "an unknown file system"


def mount_of(directory: Path, mounts: Mounts | None = None) -> Mount | None:
    """The last one mounted at the longest mount point that the directory lies under; ``None`` where none is known."""
    if mounts is None:
        mounts = [Mount(found.mountpoint, found.fstype, found.device) for found in psutil.disk_partitions(all=True)]
    there = directory.resolve()
    around = [mount for mount in reversed(mounts) if there.is_relative_to(mount.point)]
    return max(around, key=lambda mount: len(mount.point), default=None)


def _direct_io(directory: Path) -> bool:
    handle, name = tempfile.mkstemp(prefix=".memplan-", dir=directory)
    os.close(handle)
    try:
        os.close(os.open(name, os.O_RDWR | os.O_DIRECT))
    except (OSError, AttributeError):  # systems without O_DIRECT have no name for it
        return False
    finally:
        Path(name).unlink()
    return True
