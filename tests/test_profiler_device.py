"""The devices that are shipped, and how they are found."""

import pytest

from profiler.device import ARITHMETIC, devices, find_device
from profiler.errors import ProfilerError


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "NVIDIA H100 SXM"),
        ("H100-PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H200", "NVIDIA H200 SXM"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 SXM 40GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 PCIe 80GB"),
        ("Tesla T4", "NVIDIA T4"),
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("mi300x", "AMD Instinct MI300X"),
    ],
)
def test_a_device_is_found_as_people_and_drivers_write_it(written, name):
    assert find_device(written).name == name


@pytest.mark.parametrize(("written", "near"), [("h1000", "NVIDIA H100 SXM"), ("4090ti", "RTX 4090"), ("", "H200")])
def test_an_unknown_device_ends_in_a_sentence_with_near_names(written, near):
    with pytest.raises(ProfilerError, match=f"there is no device {written!r}; the nearest names are .*{near}"):
        find_device(written)


def test_no_two_devices_share_a_name():
    for device in devices():
        assert all(find_device(name) is device for name in (device.name, *device.aliases))


@pytest.mark.parametrize("device", devices(), ids=lambda d: d.name)
def test_every_device_names_its_sources_and_has_plausible_figures(device):
    assert device.sources
    assert set(device.flops_per_second) <= set(ARITHMETIC)
    assert 8 << 30 <= device.memory_bytes <= 200 << 30
    assert 2e11 < device.memory_bytes_per_second < 1e13
    assert device.peak("fp8") >= device.peak("fp32") > 1e12
    assert device.peak("tf32") <= device.peak("fp16") or device.peak("tf32") == device.peak("fp32")


@pytest.mark.parametrize("device", devices(), ids=lambda d: d.name)
def test_links_of_a_device_are_those_of_its_time(device):
    assert device.pcie_generation in (None, 3, 4, 5)
    assert device.nvlink_bytes_per_second is None or 80e9 <= device.nvlink_bytes_per_second <= 900e9
    assert device.c2c_bytes_per_second in (None, 450e9)
    assert 0.9 < device.usable_share < 1


@pytest.mark.parametrize(
    ("name", "generation", "gigabytes"),
    [("h100", 5, 450), ("h100 pcie", 5, None), ("a100", 4, 300), ("v100", 3, 150), ("b200", 5, 900), ("4090", 4, None)],
)
def test_nvlink_counts_one_direction_where_the_board_comes_with_it(name, generation, gigabytes):
    device = find_device(name)
    assert device.pcie_generation == generation
    assert device.nvlink_bytes_per_second == (None if gigabytes is None else gigabytes * 1e9)


def test_no_card_offers_more_memory_than_was_measured_on_one():
    h200 = find_device("h200")
    assert h200.memory_bytes * h200.usable_share <= 139.8 * 2**30


def test_arithmetic_that_a_device_lacks_runs_at_the_rate_of_fp32():
    t4 = find_device("t4")
    assert t4.peak("bf16") == t4.peak("fp32") < t4.peak("fp16")
