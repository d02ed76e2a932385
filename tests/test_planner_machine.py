import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from memplan.cgroup import cpu_quota, memory_headroom, memory_limit
from memplan.described import describe
from memplan.disks import Disk, Mount
from memplan.errors import MachineError
from memplan.gpus import HostLink
from memplan.host import NumaNode
from memplan.machine import CONTEXT_BYTES, HOST_RESERVE_BYTES, SCHEMA, Machine, detect, with_directory
from memplan.sizes import parse_bytes
from tests.fake_nvml import FakeGpu, FakeNvml, bridged, bus, switched
from tests.synthetic_profiles import machine_of

GIB = 1 << 30
CPU = machine_of(20 * GIB, 2 * GIB)
GPU = replace(machine_of(80 * GIB, 100 * GIB, device="cuda"), gpu_name="a card")


def test_sizes_are_read_as_the_field_writes_them():
    assert parse_bytes("24G") == parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes(" 1.5 MiB ") == 3 * 2**19
    assert parse_bytes(17) == parse_bytes("17") == parse_bytes("17B") == 17


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24 gigs", "1e9", "1,5GiB", "nan", "٣GiB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(MachineError, match=r"--gpu-memory is .*24GiB"):
        parse_bytes(text, "--gpu-memory")


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


@pytest.fixture
def cuda(monkeypatch):
    """Says that CUDA sees so many GPUs; NVML is asked about them."""

    def sees(count: int, free: int = 70 * GIB) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (free, 80 * GIB))
        monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "a slice")

    return sees


def test_a_machine_is_as_small_as_its_fullest_gpu_and_as_fast_as_its_narrowest_link(cuda):
    cuda(2)
    busy = FakeGpu(used=60 * GIB, uuid="GPU-1", bus=bus(2), width=8)
    machine = detect(nvml=FakeNvml(FakeGpu(), busy))
    assert (machine.device, machine.gpus, machine.nodes, machine.gpus_per_node) == ("cuda", 2, 1, 2)
    assert machine.gpu_bytes == 80 * GIB - CONTEXT_BYTES
    assert machine.link == HostLink(5, 8)
    assert machine.nvlink is None
    assert any("GPU 1 has 80.0 GiB free where GPU 0 has 140 GiB" in remark for remark in machine.remarks)
    assert machine.known_device is not None and machine.known_device.name == "NVIDIA H200 SXM"


def test_nvlink_counts_at_the_makers_speed_where_it_joins_all(cuda):
    cuda(8)
    assert detect(nvml=switched(8)).nvlink == 450e9
    assert detect(nvml=switched(8, name="NVIDIA of tomorrow")).nvlink == pytest.approx(18 * 26.562e9)
    cuda(4)
    machine = detect(nvml=bridged((0, 1), (2, 3), count=4))
    assert machine.nvlink is None
    assert any("NVLink joins some of the GPUs and not all" in remark for remark in machine.remarks)
    cuda(2)
    assert detect(nvml=bridged((0, 1), count=2)).nvlink == pytest.approx(4 * 26.562e9)


def test_every_process_has_its_share_of_host_memory_left_to_it(cuda):
    cuda(2)
    two = detect(nvml=switched(2)).host_bytes
    cuda(8)
    assert two - detect(nvml=switched(8)).host_bytes == pytest.approx(6 * HOST_RESERVE_BYTES["cuda"], abs=1e9)


@pytest.mark.parametrize(
    "nvml", [FakeNvml(FakeGpu(memory=False)), FakeNvml(FakeGpu(sliced=True)), FakeNvml(driver=False), switched(3)]
)
def test_cuda_is_asked_where_nvml_does_not_answer_or_sees_other_gpus(nvml, cuda):
    cuda(1)
    machine = detect(nvml=nvml)
    assert machine.gpu_bytes == 70 * GIB - CONTEXT_BYTES
    assert (machine.gpu_name, machine.known_device) == ("a slice", None)


def test_gpus_of_several_kinds_are_said(cuda):
    cuda(2)
    machine = detect(nvml=FakeNvml(FakeGpu(), FakeGpu(name="NVIDIA L4", uuid="GPU-1", bus=bus(2))))
    assert any("several kinds (NVIDIA H200, NVIDIA L4)" in remark for remark in machine.remarks)


def test_a_network_mount_is_remarked_on(tmp_path):
    machine = with_directory(GPU, tmp_path, None, [Mount("/", "nfs4", "/dev/any")])
    assert machine.disk is not None and machine.disk.network
    assert machine.host_bytes == GPU.host_bytes
    assert any("is on nfs4, a network mount" in remark for remark in machine.remarks)
    assert with_directory(GPU, tmp_path, None, [Mount("/", "ext4", "/dev/any")]).remarks == ()


def test_a_directory_in_memory_takes_its_bytes_from_the_host(tmp_path):
    memory = [Mount("/", "tmpfs", "/dev/any")]
    machine = with_directory(GPU, tmp_path, 1 * GIB, memory)
    assert (machine.host_bytes, machine.nvme_bytes) == (GPU.host_bytes - GIB, GIB)
    assert any("takes host memory" in remark for remark in machine.remarks)
    machine = with_directory(CPU, tmp_path, 1 * GIB, memory)
    assert machine.gpu_bytes + machine.host_bytes + machine.nvme_bytes == 22 * GIB
    whole = with_directory(CPU, tmp_path, None, memory)
    assert whole.nvme_bytes <= 11 * GIB
    assert whole.gpu_bytes + whole.host_bytes + whole.nvme_bytes == 22 * GIB
    with pytest.raises(MachineError, match="of host memory, which is what"):
        with_directory(replace(GPU, host_bytes=1 << 20), tmp_path, 2 << 20, memory)


FULL = replace(
    GPU,
    nodes=2,
    gpus=16,
    link=HostLink(5, 16),
    nvlink=450e9,
    inter_node_bytes_per_second=50e9,
    numa_nodes=(NumaNode(0, (0, 1), 1 << 36, (0,)), NumaNode(1, (2, 3), None, ())),
    disk=Disk(Path("/swap"), 1 << 40, "xfs", False, False, True),
    nvme_dir=Path("/swap"),
    nvme_bytes=1 << 39,
    host_growth_bytes=None,
    remarks=("Something.",),
)


@pytest.mark.parametrize("machine", [CPU, GPU, FULL])
def test_a_machine_survives_its_file(machine):
    written = json.loads(json.dumps(machine.to_dict()))
    assert written["schema"] == SCHEMA
    assert Machine.from_dict(written) == machine


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": "memplan.machine/7"}, "a machine file from another version: memplan.machine/7"),
        ({"schema": "memplan.plan/2"}, "describes no machine"),
        ({"schema": None}, "describes no machine"),
        ({"gpus": 3}, "gpus is 3; it must be a multiple of nodes, 2"),
        ({"nodes": 0}, "nodes is 0; it must be a whole number, at least 1"),
        ({"color": "blue"}, "color is nothing that this version knows"),
        ({"link": {"generation": 5}}, "link.width is missing"),
        ({"numa_nodes": None}, "numa_nodes is None; it must be a list of objects"),
    ],
)
def test_a_file_that_is_no_machine_of_this_version_is_refused(change, sentence):
    with pytest.raises(MachineError, match=f"m.json:? .*{sentence}|m.json: {sentence}|m.json is {sentence}"):
        Machine.from_dict({**FULL.to_dict(), **change}, "m.json")
    with pytest.raises(MachineError, match="describes no machine"):
        Machine.from_dict([1, 2], "m.json")


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
    print(json.dumps(machine.to_dict(), indent=1))
