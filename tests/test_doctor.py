"""What the doctor finds."""

import re
from pathlib import Path

import pytest

from memplan import doctor
from memplan.host import HostMemory, NumaNode
from tests.fake_nvml import GIB, FakeGpu, FakeNvml, bridged, switched


def test_the_doctor_finds_this_machine_and_has_a_remedy_for_every_trouble(tmp_path):
    found = doctor.checks(tmp_path)
    assert {"Python", "PyTorch", "Host memory", "Cores", "NVMe file system"} <= {c.name for c in found}
    assert all(c.status in ("ok", "info", "warn", "fail") for c in found)
    assert all(c.remedy for c in found if c.status in ("warn", "fail"))
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_warns_of_a_disk_that_is_memory(monkeypatch, tmp_path):
    monkeypatch.setattr("memplan.disks.filesystem", lambda directory, mounts: "tmpfs")
    check = next(c for c in doctor.checks(tmp_path) if c.name == "NVMe file system")
    assert check.status == "warn"
    assert re.search("takes host memory", check.detail)


def test_the_doctor_says_which_directory_is_missing():
    found = doctor.checks(Path("/not/here"))
    assert any(c.status == "fail" and c.remedy == "mkdir -p /not/here" for c in found)


def test_the_doctor_sees_more_threads_than_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    check = next(c for c in doctor.checks(tmp_path) if c.name == "Cores")
    assert (check.status, check.remedy) == ("warn", "export OMP_NUM_THREADS=1")


def found_with(nvml, folder) -> dict[str, doctor.Check]:
    found = doctor.checks(folder, nvml=nvml)
    assert all(check.remedy for check in found if check.status in ("warn", "fail"))
    return {check.name: check for check in found}


def test_the_doctor_sees_a_busy_gpu_behind_a_narrow_link(tmp_path):
    found = found_with(FakeNvml(FakeGpu(name="a card", used=8 * GIB, generation=4, width=4)), tmp_path)
    assert found["GPU 0 memory"].status == "warn"
    assert found["GPU 0 memory"].remedy.startswith("nvidia-smi")
    assert found["GPU 0 link"].status == "warn"
    assert found["GPU 0 link"].detail == "PCIe 4 x4, the card can do PCIe 5 x16"
    assert "13.0" in found["CUDA driver"].detail


def test_a_link_of_an_older_generation_is_a_fact_and_no_fault(tmp_path):
    assert found_with(FakeNvml(FakeGpu(generation=4)), tmp_path)["GPU 0 link"].status == "info"
    assert found_with(FakeNvml(FakeGpu()), tmp_path)["GPU 0 link"].status == "ok"


def test_a_slice_of_a_gpu_is_no_fault(tmp_path):
    found = found_with(FakeNvml(FakeGpu(memory=False, width=None)), tmp_path)
    assert found["GPU 0 memory"].status == "info"
    assert "GPU 0 link" not in found


@pytest.mark.parametrize(
    ("nvml", "status", "detail"),
    [
        (switched(8), "ok", "joins all 8 GPUs, 18 links each"),
        (bridged((0, 1), (2, 3), count=4), "warn", "joins GPUs 0-1, 2-3 and not all"),
        (bridged(count=2), "info", "none: the GPUs talk over their host links"),
        (FakeNvml(*(FakeGpu(bus=f"00000000:0{i}:00.0", links=[("gpu", "")]) for i in (1, 2))), "warn", "joins no two"),
    ],
)
def test_the_doctor_says_what_joins_the_gpus(nvml, status, detail, tmp_path):
    check = found_with(nvml, tmp_path)["NVLink"]
    assert check.status == status
    assert detail in check.detail


def test_one_gpu_needs_no_nvlink_and_two_kinds_are_told_apart(tmp_path):
    assert "NVLink" not in found_with(switched(1), tmp_path)
    mixed = FakeNvml(FakeGpu(name="one"), FakeGpu(name="other", bus="00000000:02:00.0"))
    assert found_with(mixed, tmp_path)["GPUs"].detail == "of several kinds: one, other"


def test_the_doctor_sees_a_gpu_far_from_all_cores_that_may_be_used(monkeypatch, tmp_path):
    nodes = (NumaNode(0, (0, 1), 1 << 36, ()), NumaNode(1, (), 1 << 36, (0, 1)))
    monkeypatch.setattr(doctor, "numa_nodes", lambda buses, root: nodes)
    found = found_with(switched(2), tmp_path)
    assert found["NUMA"].detail == "node 0: 2 cores; node 1: 0 cores, GPU 0, 1"
    assert found["NUMA node 1"].status == "warn"
    assert found["NUMA node 1"].remedy.startswith("numactl --cpunodebind=1")


def test_a_host_whose_memory_is_all_near_has_no_more_to_say(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "numa_nodes", lambda buses, root: (NumaNode(0, (0, 1), 1 << 36, ()),))
    assert "NUMA" not in found_with(FakeNvml(driver=False), tmp_path)


@pytest.mark.parametrize(
    ("growth", "offline", "says"),
    [(32 * GIB, 0, "32.0 GiB more may come"), (32 * GIB, 16 * GIB, "16.0 GiB more are offline")],
)
def test_the_doctor_says_what_memory_may_come(growth, offline, says, monkeypatch, tmp_path):
    memory = HostMemory(31 * GIB, 30 * GIB, None, growth, offline)
    monkeypatch.setattr(doctor, "host_memory", lambda root: memory)
    check = found_with(FakeNvml(driver=False), tmp_path)["Host memory"]
    assert check.status == "info"
    assert says in check.detail
    assert check.remedy
