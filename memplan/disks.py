"""What a directory is on: its file system, the room there, and whether it can be read past the page cache."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


Mounts = Sequence[tuple[str, str]]
"""(mount point, file system), in the order in which they were mounted."""


def inspect(directory: Path, mounts: Mounts | None = None) -> Disk:
    """What ``directory`` is on; makes a file in it for a moment. Raises OSError where that can not be."""
    kind = filesystem(directory, mounts)
    stat = os.statvfs(directory)
    return Disk(
        directory=directory,
        free_bytes=stat.f_bavail * stat.f_frsize,
        filesystem=kind,
        network=kind in NETWORK,
        in_memory=kind in IN_MEMORY,
        direct_io=_direct_io(directory),
    )


def filesystem(directory: Path, mounts: Mounts | None = None) -> str:
    """Kind of the file system: the last one mounted at the longest mount point that the directory lies under."""
    if mounts is None:
        mounts = [(mount.mountpoint, mount.fstype) for mount in psutil.disk_partitions(all=True)]
    there = directory.resolve()
    around = [(len(point), order, kind) for order, (point, kind) in enumerate(mounts) if there.is_relative_to(point)]
    return max(around)[2] if around else "an unknown file system"


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
