"""Machines that are not here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan import disks, quick_rates
from memplan.described import describe, find_machine, load_machine
from memplan.described_disk import ASSUMED_DISK_BYTES, DESCRIBED_DIRECTORY, Nvme, local_nvme, parse_nvme
from memplan.errors import MachineError
from memplan.gpus import HostLink
from memplan.machine import CONTEXT_BYTES
from offload.plan import Precision
from profiler.device import devices
from tests.synthetic_profiles import machine_of

GIB = 1 << 30
CPU = machine_of(20 * GIB, 2 * GIB)
GPU = replace(machine_of(80 * GIB, 100 * GIB, device="cuda"), gpu_name="a card")


def test_a_cluster_is_described_in_one_line():
    machine = find_machine("h100-80gb", gpus=8, nodes=4, host_memory="1TiB", nvme="7GB/s")
    assert (machine.device, machine.gpus, machine.nodes, machine.gpus_per_node) == ("cuda", 32, 4, 8)
    assert machine.described
    assert machine.gpu_name == "NVIDIA H100 SXM"
    assert machine.known_device is not None
    assert 75 * GIB < machine.gpu_bytes < 80 * GIB - CONTEXT_BYTES
    assert machine.host_bytes == 1 << 40
    assert (machine.link, machine.nvlink) == (HostLink(5, 16), 450e9)
    assert machine.nvme_bytes_per_second == 7e9
    assert (machine.nvme_dir, machine.nvme_bytes) == (DESCRIBED_DIRECTORY, ASSUMED_DISK_BYTES)
    assert (machine.cores, machine.numa_nodes, machine.disk) == (None, (), None)


@pytest.mark.parametrize("device", devices(), ids=lambda d: d.name)
def test_every_device_can_be_a_machine(device):
    machine = find_machine(device.name, host_memory="64GiB")
    assert machine.known_device is device
    assert 0.85 * device.memory_bytes < machine.gpu_bytes < device.memory_bytes - CONTEXT_BYTES
    assert machine.nvlink is None, "a GPU alone is joined to none"
    assert find_machine(device.name, gpus=2).nvlink == device.nvlink_bytes_per_second
    assert (machine.link is None) == (device.pcie_generation is None)
    assert machine.remarks == ()


def test_what_nobody_said_is_assumed_and_remarked_on():
    machine = find_machine("a100", gpus=8, nvme="7GB/s")
    assert machine.host_bytes == 640 * GIB
    host, disk = machine.remarks
    assert "640 GiB a node are assumed" in host and "--host-memory" in host
    assert "1.00 TiB a node are assumed" in disk and "--nvme 7GB/s:SIZE" in disk
    assert find_machine("a100", host_memory="1TiB", nvme="7GB/s:2TiB").remarks == ()


def test_the_network_between_nodes_is_said_or_assumed_and_remarked_on():
    two = {"gpus": 8, "nodes": 2, "host_memory": "1TiB"}
    said, assumed = find_machine("h100", **two, network="50GB/s"), find_machine("h100", **two)
    assert (said.inter_node_bytes_per_second, said.remarks) == (50e9, ())
    assert assumed.inter_node_bytes_per_second is None
    (remark,) = assumed.remarks
    assert "25 GB/s a GPU are assumed" in remark and "--network" in remark
    assert find_machine("h100", gpus=8, host_memory="1TiB").remarks == ()
    described = describe(CPU, gpus=4, gpu_memory="24GiB", host_memory="64GiB", nodes=2, network="12.5GB/s")
    assert (described.inter_node_bytes_per_second, described.remarks) == (12.5e9, ())


def test_the_network_between_nodes_comes_from_a_machine_file_too(tmp_path):
    path = tmp_path / "machine.json"
    two = {"gpus": 8, "nodes": 2, "host_memory": "1TiB"}
    path.write_text(json.dumps(find_machine("h100", **two, network="50GB/s").to_dict()))
    machine = find_machine(str(path), nodes=4)
    assert (machine.gpus, machine.inter_node_bytes_per_second, machine.remarks) == (32, 50e9, ())
    assert find_machine(str(path), network="10GB/s").inter_node_bytes_per_second == 10e9
    path.write_text(json.dumps(find_machine("h100", **two).to_dict()))
    assert len(find_machine(str(path)).remarks) == 1, "said once, though the file says it already"
    assert find_machine(str(path), network="10GB/s").remarks == ()


@pytest.mark.parametrize("base", [CPU, GPU, replace(GPU, described=True)])
def test_one_node_is_joined_to_none(base):
    with pytest.raises(MachineError, match=r"--network 50GB/s joins several nodes, and this is one: .* by --nodes"):
        describe(base, network="50GB/s")


def test_the_host_link_of_a_superchip_is_chip_to_chip():
    machine = find_machine("gh200", host_memory="480GB")
    assert machine.link is not None and machine.link.bytes_per_second == 450e9


def test_less_than_the_whole_card_can_be_planned_with():
    assert find_machine("h100", gpu_memory="40GiB").gpu_bytes == 40 * GIB - CONTEXT_BYTES
    assert find_machine("h100", gpu_memory="80GiB") == find_machine("h100")


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        ({"name": "h1000"}, "--machine h1000 is no GPU that is known, .* nearest names are NVIDIA H100 SXM"),
        ({"name": "h100", "gpus": 0}, "--gpus is 0"),
        ({"name": "h100", "nodes": 0}, "--nodes is 0"),
        ({"name": "h100", "gpu_memory": "81GiB"}, "more than the 80.0 GiB that NVIDIA H100 SXM has"),
        ({"name": "h100", "gpu_memory": "100MiB"}, "context alone"),
        ({"name": "h100", "gpu_memory": "0"}, "--gpu-memory is 0"),
        ({"name": "h100", "host_memory": "lots"}, "--host-memory is 'lots'"),
        ({"name": "h100", "nvme": "56Gb/s"}, "counts bits; write bytes: 7GB/s"),
        ({"name": "h100", "network": "50GB/s"}, "joins several nodes, and this is one"),
        ({"name": "h100", "nodes": 2, "network": "400Gb/s"}, "counts bits; write bytes: 50GB/s"),
        ({"name": "h100", "nodes": 2, "network": "fast"}, "--network is 'fast'; write a rate"),
        ({"name": "h100", "nvme": "2TiB"}, "write DIR or DIR:SIZE"),
        ({"name": "h100", "nvme": "fast disk"}, "names no directory that is here"),
        ({"name": "h100", "nvme": "7GB/s:0"}, "the size in --nvme is 0"),
        ({"name": "nowhere.json"}, "nowhere.json can not be read: No such file"),
    ],
)
def test_what_can_not_be_described_is_said_in_a_sentence(wishes, sentence):
    with pytest.raises(MachineError, match=sentence):
        find_machine(**wishes)


def test_several_nodes_must_be_described():
    for base in (CPU, GPU):
        with pytest.raises(MachineError, match=r"--nodes 2 describes machines that are not here: .* --machine NAME"):
            describe(base, nodes=2)
        assert describe(base, nodes=1) == base
    machine = describe(CPU, gpus=4, gpu_memory="24GiB", nodes=2)
    assert (machine.gpus, machine.nodes, machine.gpus_per_node) == (8, 2, 4)


def test_a_node_that_is_described_has_this_ones_memory_unless_it_is_said():
    machine = describe(GPU, gpus=4)
    assert machine.host_bytes == GPU.host_bytes
    assert any("host memory of this one, 100 GiB" in remark for remark in machine.remarks)
    assert describe(GPU, gpus=4, host_memory="1TiB").remarks == ()


def test_memory_that_may_come_can_be_planned_with_and_is_remarked_on():
    growing = replace(GPU, host_growth_bytes=50 * GIB)
    machine = describe(growing, host_memory="140GiB")
    assert machine.host_bytes == 140 * GIB
    assert any("140 GiB, and 100 GiB can be had now" in remark for remark in machine.remarks)
    assert describe(growing, host_memory="90GiB").remarks == ()
    with pytest.raises(MachineError, match="more than the 150 GiB that can be had here"):
        describe(growing, host_memory="151GiB")
    assert describe(replace(GPU, host_growth_bytes=None), host_memory="1TiB").host_bytes == 1 << 40
    assert describe(replace(CPU, host_growth_bytes=None), gpu_memory="64GiB").gpu_bytes == 64 * GIB


def test_a_machine_comes_from_a_file_or_from_a_calibration(tmp_path):
    own, calibration = tmp_path / "machine.json", tmp_path / "calibration.json"
    own.write_text(json.dumps(GPU.to_dict()))
    calibration.write_text(json.dumps({"schema": "memplan.calibration/1", "machine": GPU.to_dict()}))
    for path in (own, calibration):
        machine = find_machine(str(path))
        assert machine == replace(GPU, described=True, context_bytes=CONTEXT_BYTES)
    assert find_machine(str(own), gpus=8, nodes=2).gpus == 16
    assert find_machine(str(own), gpu_memory="40GiB").gpu_bytes == 40 * GIB - CONTEXT_BYTES
    with pytest.raises(MachineError, match="of each a card"):
        find_machine(str(own), gpu_memory="90GiB")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no JSON"),
        ("[" * 5000 + "]" * 5000, "is no JSON that can be read"),
        ("{}", "describes no machine"),
        ("[]", "describes no machine"),
        ('{"schema": "memplan.machine/0"}', "is a machine file from another version: memplan.machine/0"),
    ],
)
def test_a_file_of_something_else_is_refused(text, sentence, tmp_path):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(MachineError, match=f"m.json {sentence}"):
        load_machine(path)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("/swap", Nvme(Path("/swap"), None, None)),
        ("/swap:1GiB", Nvme(Path("/swap"), GIB, None)),
        ("7GB/s", Nvme(None, None, 7e9)),
        ("7GB/s:1GiB", Nvme(None, GIB, 7e9)),
        ("1GiB:7GB/s", Nvme(None, GIB, 7e9)),
        ("/swap:7GB/s", Nvme(Path("/swap"), None, 7e9)),
        ("/swap:1GiB:7GB/s", Nvme(Path("/swap"), GIB, 7e9)),
        ("/swap:7GB/s:1GiB", Nvme(Path("/swap"), GIB, 7e9)),
    ],
)
def test_a_disk_is_described_by_directory_size_and_rate(text, meaning):
    assert parse_nvme(text) == meaning


@given(
    st.sampled_from([None, "/swap", "/mnt/a b", "/data/s", "rel/maps"]),
    st.none() | st.integers(1, 1 << 50),
    st.none() | st.integers(1, 10**12),
    st.booleans(),
)
def test_the_parts_of_a_disk_are_found_in_any_order(directory, size, rate, rate_first):
    tail = [f"{size}B"] * (size is not None), [f"{rate}B/s"] * (rate is not None)
    parts = [*([directory] if directory else []), *(tail[1] + tail[0] if rate_first else tail[0] + tail[1])]
    if directory is None and rate is None:
        with pytest.raises(MachineError):
            parse_nvme(":".join(parts))
    else:
        assert parse_nvme(":".join(parts)) == Nvme(Path(directory) if directory else None, size, rate)


def test_a_directorys_name_may_have_a_colon(tmp_path):
    odd = tmp_path / "a:b"
    odd.mkdir()
    assert parse_nvme(str(odd)).directory == odd
    assert parse_nvme(f"{odd}:1GiB") == Nvme(odd, GIB, None)


@pytest.mark.parametrize(("text", "sentence"), [("/swap:lots", "size in --nvme"), (":1GiB", "DIR:SIZE"), ("", "DIR")])
def test_a_disk_that_can_not_be_read_is_refused(text, sentence):
    with pytest.raises(MachineError, match=sentence):
        parse_nvme(text)


def test_a_disk_that_is_here_has_no_rate_to_be_told():
    for text in ("7GB/s", "/tmp:7GB/s"):
        with pytest.raises(MachineError, match="names a rate"):
            local_nvme(text)
        with pytest.raises(MachineError, match="names a rate"):
            describe(CPU, nvme=text)


def test_a_described_disk_need_not_be_here(tmp_path):
    machine = find_machine("h100", host_memory="1TiB", nvme="/not/here:2TiB")
    assert (machine.nvme_dir, machine.nvme_bytes, machine.disk) == (Path("/not/here"), 2 << 40, None)
    here = find_machine("h100", host_memory="1TiB", nvme=str(tmp_path))
    assert here.nvme_bytes > 0 and here.remarks == ()


def on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every directory is on a file system of that kind."""
    monkeypatch.setattr(disks, "filesystem", lambda directory, mounts=None: kind)


def test_a_described_machine_gives_host_memory_to_a_directory_here_that_is_in_memory(tmp_path, monkeypatch):
    on("tmpfs", monkeypatch)
    machine = find_machine("h100", host_memory="8GiB", nvme=f"{tmp_path}:3GiB")
    assert (machine.host_bytes, machine.nvme_bytes) == (5 * GIB, 3 * GIB)
    assert "takes host memory, not disk" in machine.remarks[-1]
    with pytest.raises(MachineError, match=r"more than the 8\.00 GiB of host memory"):
        find_machine("h100", host_memory="8GiB", nvme=f"{tmp_path}:9GiB")


def test_a_network_mount_here_is_measured_for_a_described_machine_unless_its_rate_is_said(tmp_path, monkeypatch):
    on("nfs4", monkeypatch)
    monkeypatch.setattr(quick_rates, "_disk_rates", lambda directory: (3e8, 2e8))
    machine = find_machine("h100", host_memory="8GiB", nvme=f"{tmp_path}:3GiB")
    assert "a network mount" in machine.remarks[-1]
    assert quick_rates.rates_of(machine, Precision.BF16).nvme_read_bytes_per_second == 3e8
    told = find_machine("h100", host_memory="8GiB", nvme=f"{tmp_path}:3GiB:1GB/s")
    assert quick_rates.rates_of(told, Precision.BF16).nvme_read_bytes_per_second == 1e9
