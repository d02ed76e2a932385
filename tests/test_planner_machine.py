from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memplan.cgroup import cpu_quota, memory_headroom, memory_limit
from memplan.errors import MachineError
from memplan.machine import CONTEXT_BYTES, describe, detect, nvml_handles, parse_bytes, parse_nvme
from tests.synthetic_profiles import machine_of

GIB = 1 << 30
CPU = machine_of(20 * GIB, 2 * GIB)
GPU = replace(machine_of(80 * GIB, 100 * GIB, device="cuda"), gpu_name="a card")


@given(st.integers(0, 1 << 50), st.sampled_from([("KiB", 2**10), ("M", 2**20), ("GB", 10**9), ("tib", 2**40), ("", 1)]))
def test_a_size_means_its_number_times_its_unit(number, unit):
    assert parse_bytes(f"{number}{unit[0]}") == number * unit[1]


def test_sizes_are_read_as_the_field_writes_them():
    assert parse_bytes("24G") == parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes(" 1.5 MiB ") == 3 * 2**19
    assert parse_bytes(17) == parse_bytes("17") == parse_bytes("17B") == 17


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24 gigs", "1e9", "1,5GiB", "nan", "٣GiB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(MachineError, match=r"--gpu-memory is .*24GiB"):
        parse_bytes(text, "--gpu-memory")


def test_nvme_takes_a_directory_and_perhaps_a_size(tmp_path):
    assert parse_nvme("/swap") == (Path("/swap"), None)
    assert parse_nvme("/swap:1GiB") == (Path("/swap"), GIB)
    odd = tmp_path / "a:b"
    odd.mkdir()
    assert parse_nvme(str(odd)) == (odd, None)
    with pytest.raises(MachineError, match="size in --nvme"):
        parse_nvme("/swap:lots")
    with pytest.raises(MachineError, match="DIR:SIZE"):
        parse_nvme(":1GiB")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_both_tiers_are_cut_from_memory_that_is_available():
    machine = detect()
    assert machine.device == "cpu"
    assert 0 < machine.host_bytes < machine.gpu_bytes
    assert machine.gpu_bytes + machine.host_bytes <= psutil.virtual_memory().total


def test_the_disk_of_a_directory_is_detected(tmp_path):
    machine = detect(tmp_path)
    assert machine.nvme_dir == tmp_path.resolve()
    assert 0 < machine.nvme_bytes < psutil.disk_usage(str(tmp_path)).free * 1.01


def test_on_the_cpu_the_gpu_tier_is_a_budget_and_the_rest_is_the_hosts():
    machine = describe(CPU, gpu_memory="1GiB")
    assert (machine.device, machine.gpu_bytes, machine.host_bytes) == ("cpu", GIB, 21 * GIB)
    assert describe(CPU, gpu_memory="1GiB", host_memory="2GiB").host_bytes == 2 * GIB
    assert describe(CPU) == CPU


def test_gpus_that_are_not_here_describe_another_machine():
    machine = describe(CPU, gpus=8, gpu_memory="80GiB", host_memory="1TiB")
    assert (machine.device, machine.gpus, machine.described) == ("cuda", 8, True)
    assert machine.gpu_bytes == 80 * GIB - CONTEXT_BYTES
    assert machine.host_bytes == 1024 * GIB
    assert describe(GPU, gpus=2).described
    assert not describe(GPU, gpus=1, gpu_memory="24GiB").described


@pytest.mark.parametrize(
    ("base", "wishes", "sentence"),
    [
        (CPU, {"gpus": 0}, "--gpus is 0"),
        (CPU, {"gpus": -2}, "--gpus is -2"),
        (CPU, {"gpus": 2}, "--gpu-memory 24GiB"),
        (CPU, {"gpus": 2, "gpu_memory": "100MiB"}, "context alone"),
        (CPU, {"gpu_memory": 0}, "--gpu-memory is 0"),
        (CPU, {"gpu_memory": "64GiB"}, "add --gpus N"),
        (CPU, {"gpu_memory": "12GiB", "host_memory": "12GiB"}, "together"),
        (GPU, {"gpu_memory": "81GiB"}, "81.0 GiB, more than the 80.0 GiB free on each a card"),
        (GPU, {"host_memory": "1TiB"}, "--host-memory asks for"),
        (GPU, {"nvme": "/not/here"}, "does not exist"),
    ],
)
def test_what_can_not_be_is_said_in_a_sentence(base, wishes, sentence):
    with pytest.raises(MachineError, match=sentence):
        describe(base, **wishes)


def test_an_nvme_directory_must_be_one_with_room(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(MachineError, match="not a directory"):
        describe(CPU, nvme=str(file))
    with pytest.raises(MachineError, match="free in"):
        describe(CPU, nvme=f"{tmp_path}:900TiB")
    with pytest.raises(MachineError, match="size in --nvme is 0"):
        describe(CPU, nvme=f"{tmp_path}:0")
    assert describe(CPU, nvme=f"{tmp_path}:1MiB").nvme_bytes == 1 << 20


def test_a_directory_that_can_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(MachineError, match="not writable"):
        describe(CPU, nvme=str(tmp_path))


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_tightest_control_group_on_the_way_up_counts_v2(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    group(tmp_path / "outer", memory__max="1000", memory__current="700", memory__stat="anon 1\ninactive_file 300")
    group(tmp_path / "outer" / "inner", memory__max="max", memory__current="5", cpu__max="150000 100000")
    assert memory_limit(tmp_path, membership) == 1000
    assert memory_headroom(tmp_path, membership) == 600
    assert cpu_quota(tmp_path, membership) == 1.5


def test_control_groups_v1_are_read_too(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/job\n3:cpu,cpuacct:/job\n")
    group(tmp_path / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="9")
    group(tmp_path / "memory" / "job", memory__limit_in_bytes="500", memory__usage_in_bytes="100")
    group(tmp_path / "cpu" / "job", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert memory_headroom(tmp_path, membership) == 400
    assert cpu_quota(tmp_path, membership) == 2.0


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert memory_limit(tmp_path, tmp_path / "none") is None
    assert memory_headroom(tmp_path, tmp_path / "none") is None
    assert cpu_quota(tmp_path, tmp_path / "none") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_offers_what_is_free_less_the_context():
    machine = detect()
    total = torch.cuda.get_device_properties(0).total_memory
    assert machine.device == "cuda"
    assert machine.gpus == torch.cuda.device_count()
    assert 0 < machine.gpu_bytes <= total - CONTEXT_BYTES
    assert machine.gpu_name
    assert 0 < machine.host_bytes < psutil.virtual_memory().total


def test_only_visible_gpus_are_asked(monkeypatch):
    monkeypatch.setattr("pynvml.nvmlInit", lambda: None)
    monkeypatch.setattr("pynvml.nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr("pynvml.nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr("pynvml.nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    for visible, handles in ((None, [0, 1, 2]), ("2,0", [2, 0]), ("GPU-ab, 1", ["GPU-ab", 1]), ("", []), ("-1", [])):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert nvml_handles() == handles
