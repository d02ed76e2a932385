"""What a directory is on."""

import os
from pathlib import Path

import pytest

from memplan import disks
from memplan.disks import Mount, filesystem, inspect, mount_of


def mounted(*pairs: tuple[str, str]) -> list[Mount]:
    """Mounts of these points and kinds."""
    return [Mount(point, kind, f"/dev/{kind}") for point, kind in pairs]


@pytest.mark.parametrize(
    ("pairs", "kind"),
    [
        ([("/", "ext4")], "ext4"),
        ([("/", "ext4"), ("/data", "xfs")], "xfs"),
        ([("/data/fast", "tmpfs"), ("/data", "nfs4"), ("/", "ext4")], "tmpfs"),
        ([("/", "ext4"), ("/dat", "xfs"), ("/data/other", "nfs4")], "ext4"),
        ([("/", "rootfs"), ("/", "overlay"), ("/data", "xfs"), ("/data", "nfs4")], "nfs4"),
        ([], "an unknown file system"),
    ],
)
def test_the_last_mount_at_the_longest_point_counts(pairs, kind):
    directory, mounts = Path("/data/fast/swap"), mounted(*pairs)
    assert filesystem(directory, mounts) == kind
    mount = mount_of(directory, mounts)
    assert (mount.device if mount is not None else None) == (f"/dev/{kind}" if pairs else None)


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "lustre", "fuse.sshfs", "fuse.gcsfuse"])
def test_a_network_mount_is_seen(kind, tmp_path):
    disk = inspect(tmp_path, mounted(("/", kind)))
    assert (disk.network, disk.in_memory) == (True, False)
    assert disk.trouble is not None and f"is on {kind}, a network mount" in disk.trouble


def test_a_disk_that_is_memory_is_seen(tmp_path):
    disk = inspect(tmp_path, mounted(("/", "tmpfs")))
    assert (disk.network, disk.in_memory) == (False, True)
    assert disk.trouble is not None and "takes host memory" in disk.trouble


def test_a_disk_of_this_machine_has_no_trouble_and_is_left_as_it_was(tmp_path):
    disk = inspect(tmp_path, mounted(("/", "ext4")))
    assert disk.trouble is None
    stat = os.statvfs(tmp_path)
    assert disk.free_bytes == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.01)
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_opened_past_the_page_cache_is_said(tmp_path, monkeypatch):
    refused = os.open

    def no_direct(path, flags, *mode, **options):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return refused(path, flags, *mode, **options)

    monkeypatch.setattr(disks.os, "open", no_direct)
    assert not inspect(tmp_path, mounted(("/", "ext4"))).direct_io
    assert list(tmp_path.iterdir()) == []


def test_the_mounts_of_this_machine_are_known(tmp_path):
    assert filesystem(tmp_path) != "an unknown file system"
