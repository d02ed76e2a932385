"""GPUs as NVML tells of them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.gpus import Gpu, HostLink, all_joined, cuda_driver, find_gpus
from tests.fake_nvml import GIB, FakeGpu, FakeNvml, bridged, bus, switched


@pytest.mark.parametrize(
    ("generation", "width", "gigabytes"),
    [(1, 1, 0.25), (2, 16, 8.0), (3, 16, 15.754), (4, 16, 31.508), (5, 16, 63.015), (5, 8, 31.508), (6, 16, 121.0)],
)
def test_a_links_speed_is_that_of_the_pci_tables(generation, width, gigabytes):
    assert HostLink(generation, width).bytes_per_second == pytest.approx(gigabytes * 1e9, rel=1e-4)


@given(st.integers(1, 7), st.sampled_from([1, 2, 4, 8, 16]))
def test_a_newer_or_wider_link_is_faster(generation, width):
    link = HostLink(generation, width)
    assert HostLink(generation + 1, width).bytes_per_second > 1.8 * link.bytes_per_second
    assert HostLink(generation, 2 * width).bytes_per_second == 2 * link.bytes_per_second


def test_a_chip_to_chip_link_counts_in_place_of_pci_express():
    assert HostLink(5, 16, 450e9).bytes_per_second == 450e9


def test_a_gpu_tells_what_is_free_now_and_how_it_hangs_on_its_host():
    nvml = FakeNvml(FakeGpu(used=40 * GIB, generation=4, width=8))
    (gpu,) = find_gpus(nvml, {})
    assert (gpu.free_bytes, gpu.total_bytes) == (100 * GIB, 140 * GIB)
    assert (gpu.link, gpu.best_link) == (HostLink(4, 8), HostLink(5, 16))
    assert gpu.bus_id == "0000:17:00.0"
    assert cuda_driver(nvml) == "13.0"


def test_what_a_gpu_does_not_tell_is_unknown():
    (gpu,) = find_gpus(FakeNvml(FakeGpu(memory=False, generation=0, best_width=None)), {})
    assert (gpu.free_bytes, gpu.total_bytes, gpu.link, gpu.best_link) == (None, None, None, None)
    assert (gpu.nvlinks, gpu.nvlink_bytes_per_second) == (0, None)


def test_without_a_driver_there_are_no_gpus():
    nvml = FakeNvml(driver=False)
    assert find_gpus(nvml, {}) == ()
    assert cuda_driver(nvml) is None


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("", []),
        ("-1", []),
        ("2,0", ["c", "a"]),
        ("1, 0", ["b", "a"]),
        ("GPU-bb", ["b"]),
        ("GPU-cc,0", ["c", "a"]),
        ("0,7,1", ["a"]),
        ("0,GPU-zz,1", ["a"]),
    ],
)
def test_gpus_are_those_that_cuda_will_see(visible, names):
    nvml = FakeNvml(*(FakeGpu(name=name, uuid=f"GPU-{name * 4}", bus=bus(i)) for i, name in enumerate("abc")))
    assert [gpu.name for gpu in find_gpus(nvml, {"CUDA_VISIBLE_DEVICES": visible})] == names


def test_a_slice_tells_of_its_own_memory_and_its_cards_link():
    part = FakeGpu(name="NVIDIA H200 MIG 1g.18gb", total=16 * GIB, generation=None, bus="")
    nvml = FakeNvml(FakeGpu(sliced=True, slices={"MIG-1": part}))
    (gpu,) = find_gpus(nvml, {"CUDA_VISIBLE_DEVICES": "MIG-1"})
    assert gpu.free_bytes == 16 * GIB
    assert gpu.link == HostLink(5, 16)
    (whole,) = find_gpus(nvml, {})
    assert whole.free_bytes is None, "CUDA gives less than the card has"


def test_a_switch_joins_all_gpus():
    gpus = find_gpus(switched(8), {})
    assert all_joined(gpus)
    assert all(gpu.nvlink_peers == set(range(8)) - {i} for i, gpu in enumerate(gpus))
    assert gpus[0].nvlinks == 18
    assert gpus[0].nvlink_bytes_per_second == pytest.approx(18 * 26.562e9)


@pytest.mark.parametrize(
    ("pairs", "count", "joined"),
    [
        ([(0, 1)], 2, True),
        ([(0, 1), (2, 3)], 4, False),
        ([(0, 1), (1, 2), (2, 3)], 4, True),
        ([(0, 1)], 3, False),
        ([], 2, False),
        ([], 1, False),
    ],
)
def test_bridges_join_gpus_if_every_one_can_be_reached(pairs, count, joined):
    assert all_joined(find_gpus(bridged(*pairs, count=count), {})) is joined


@given(st.integers(2, 7), st.data())
def test_being_joined_is_being_connected(count, data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=10))
    groups = list(range(count))  # an independent reference: merge the groups of each pair
    for one, other in pairs:
        groups = [groups[one] if group == groups[other] else group for group in groups]
    peers = [frozenset(b for pair in pairs for a, b in (pair, pair[::-1]) if a == i != b) for i in range(count)]
    gpus = [replace(Gpu.unknown(), nvlink_peers=those) for those in peers]
    assert all_joined(gpus) == (len(set(groups)) == 1)


def test_where_the_ends_of_links_are_hidden_the_driver_is_asked_who_can_talk():
    hidden = [(None, "")] * 18
    one = FakeGpu(bus=bus(1), links=hidden, joined=frozenset({bus(2)}))
    other = FakeGpu(bus=bus(2), links=hidden, joined=frozenset({bus(1)}))
    assert all_joined(find_gpus(FakeNvml(one, other), {}))
    assert not all_joined(find_gpus(FakeNvml(one, replace(other, joined=frozenset(), bus=bus(3))), {}))


def test_links_whose_speed_is_not_told_have_none():
    nvml = switched(2)
    for gpu in nvml.gpus:
        gpu.link_megabytes = None
    assert [gpu.nvlink_bytes_per_second for gpu in find_gpus(nvml, {})] == [None, None]
