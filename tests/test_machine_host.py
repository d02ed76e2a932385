"""The host's memory, cores and nodes, read from trees of files as Linux makes them."""

from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.host import host_memory, numa_nodes, parse_cores

GIB = 1 << 30


def machine_tree(root: Path, monkeypatch, *, total: int, available: int, online: int = 0, offline: int = 0) -> Path:
    """A root with so many bytes in MemTotal and MemAvailable, and so many GiB of memory blocks."""
    proc, blocks = root / "proc", root / "sys/devices/system/memory"
    proc.mkdir()
    lines = {"MemTotal": total, "MemFree": available, "MemAvailable": available, "Buffers": 0, "Cached": 0}
    (proc / "meminfo").write_text("".join(f"{name}: {size // 1024} kB\n" for name, size in lines.items()))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(proc))
    for i, state in enumerate(["online"] * online + ["offline"] * offline):
        (blocks / f"memory{i}").mkdir(parents=True)
        (blocks / f"memory{i}" / "state").write_text(state + "\n")
        (blocks / "block_size_bytes").write_text(f"{GIB:x}\n")
    return root


# psutil says which fields a made-up file lacks.
pytestmark = pytest.mark.filterwarnings("ignore:.*memory stats couldn't be determined:RuntimeWarning")


def test_memory_that_is_all_there_does_not_grow(tmp_path, monkeypatch):
    root = machine_tree(tmp_path, monkeypatch, total=int(62.7 * GIB), available=50 * GIB, online=64)
    memory = host_memory(root)
    assert (memory.total_bytes, memory.available_bytes) == (pytest.approx(62.7 * GIB, abs=1024), 50 * GIB)
    assert (memory.growth_bytes, memory.offline_bytes, memory.limit_bytes) == (0, 0, None)


def test_memory_that_starts_small_may_grow_to_what_is_there(tmp_path, monkeypatch):
    root = machine_tree(tmp_path, monkeypatch, total=31 * GIB, available=30 * GIB, online=256)
    memory = host_memory(root)
    assert memory.available_bytes == 30 * GIB
    assert memory.growth_bytes is not None
    assert 0.9 * 256 * GIB < memory.available_bytes + memory.growth_bytes < 256 * GIB


def test_blocks_that_are_offline_are_counted_and_may_come(tmp_path, monkeypatch):
    memory = host_memory(machine_tree(tmp_path, monkeypatch, total=31 * GIB, available=30 * GIB, online=32, offline=32))
    assert memory.offline_bytes == 32 * GIB
    assert memory.growth_bytes is not None and memory.growth_bytes > 28 * GIB


def test_nothing_is_known_where_a_hypervisor_may_plug_memory_in(tmp_path, monkeypatch):
    root = machine_tree(tmp_path, monkeypatch, total=31 * GIB, available=30 * GIB, online=32)
    (root / "sys/bus/virtio/drivers/virtio_mem/virtio4").mkdir(parents=True)
    assert host_memory(root).growth_bytes is None


def test_nothing_is_known_where_blocks_are_not_listed(tmp_path, monkeypatch):
    assert host_memory(machine_tree(tmp_path, monkeypatch, total=GIB, available=GIB)).growth_bytes is None


def test_a_control_group_bounds_what_can_be_had_and_what_may_come(tmp_path, monkeypatch):
    root = machine_tree(tmp_path, monkeypatch, total=31 * GIB, available=30 * GIB, online=256)
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text("0::/\n")
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for limit, available, growth in ((64 * GIB, 30 * GIB, 34 * GIB), (8 * GIB, 8 * GIB, 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        memory = host_memory(root)
        assert (memory.limit_bytes, memory.available_bytes, memory.growth_bytes) == (limit, available, growth)


def test_nodes_have_the_cores_that_may_be_used_their_memory_and_their_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5})
    blocks = tmp_path / "sys/devices/system/memory"
    blocks.mkdir(parents=True)
    (blocks / "block_size_bytes").write_text("8000000\n")
    for index, cores in ((0, "0-3"), (1, "4-7")):
        node = tmp_path / f"sys/devices/system/node/node{index}"
        (node / "memory0").mkdir(parents=True)
        (node / "cpulist").write_text(cores + "\n")
    for bus, home in (("0000:17:00.0", "1"), ("0000:18:00.0", "-1")):
        device = tmp_path / "sys/bus/pci/devices" / bus
        device.mkdir(parents=True)
        (device / "numa_node").write_text(home + "\n")
    first, second = numa_nodes(["0000:18:00.0", "0000:17:00.0", None, "0000:99:00.0"], tmp_path)
    assert (first.index, first.cores, first.memory_bytes, first.gpus) == (0, (0, 1), 1 << 27, ())
    assert (second.index, second.cores, second.memory_bytes, second.gpus) == (1, (5,), 1 << 27, (1,))
    assert numa_nodes((), tmp_path / "nothing") == ()


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20)), max_size=6))
def test_a_list_of_cores_means_its_ranges(ranges):
    text = ",".join(f"{a}-{a + n}" if n else str(a) for a, n in ranges)
    assert list(parse_cores(text)) == [core for a, n in ranges for core in range(a, a + n + 1)]
