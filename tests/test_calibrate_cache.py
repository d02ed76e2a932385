"""Which calibration belongs to which machine, and what plans take."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan import quick_rates
from memplan.calibrate import here
from memplan.calibrate.here import cache_path, facts_here, fingerprint, load_cached, save_cached, without_disk
from memplan.errors import MachineError
from memplan.gpus import HostLink
from memplan.quick_rates import REFERENCE, for_described, rates_of
from memplan.rates import Curve, Rates
from offload.plan import Precision
from profiler.calibration import Calibration, Rate
from tests.synthetic_profiles import machine_of

FACTS = st.dictionaries(st.text(max_size=8), st.text(max_size=8), min_size=1, max_size=6)
CURVES = st.dictionaries(st.integers(1, 1 << 32), st.floats(1e6, 1e12), min_size=1, max_size=8).map(
    lambda points: Curve(tuple(sorted(points)), tuple(points[size] for size in sorted(points)))
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@given(FACTS, st.data())
def test_the_fingerprint_changes_with_each_fact_and_not_with_their_order(facts, data):
    reversed_order = dict(reversed(facts.items()))
    assert fingerprint(facts) == fingerprint(reversed_order)
    name = data.draw(st.sampled_from(sorted(facts)))
    assert fingerprint({**facts, name: facts[name] + "x"}) != fingerprint(facts)
    assert fingerprint({n: f for n, f in facts.items() if n != name}) != fingerprint(facts)


def test_facts_are_the_same_each_time_and_the_disk_is_one_of_them(tmp_path):
    assert facts_here() == facts_here()
    assert {"gpus", "driver", "cpu", "cores", "memory", "torch"} == set(facts_here())
    assert without_disk(facts_here(tmp_path)) == facts_here()
    assert fingerprint(facts_here(tmp_path)) != fingerprint(facts_here())


def test_memory_that_differs_by_what_the_kernel_keeps_is_one_fact(monkeypatch):
    class Memory:
        total = 125 << 30

    monkeypatch.setattr(here.psutil, "virtual_memory", lambda: Memory)
    first = facts_here()["memory"]
    Memory.total = 126 << 30
    assert facts_here()["memory"] == first == "128 GiB"


def test_what_was_kept_is_found_again_for_its_disk_and_for_plans_without_one(cache):
    facts = facts_here(cache)
    assert load_cached(facts) is None
    rates = replace(REFERENCE, source="measured", fingerprint=fingerprint(facts), machine={"gpus": 1})
    path = save_cached(rates, cache)
    assert path == cache_path(facts)
    assert load_cached(facts) == load_cached(facts_here()) == rates
    assert load_cached({**facts, "torch": "another"}) is None


def test_a_file_of_another_version_in_the_cache_counts_as_none(cache):
    save_cached(REFERENCE)
    cache_path(facts_here()).write_text(json.dumps({"schema": "memplan.rates/0"}))
    assert load_cached(facts_here()) is None


def test_plans_take_a_calibration_and_measure_only_a_disk_that_it_lacks(cache, monkeypatch):
    monkeypatch.setattr(quick_rates, "_disk_rates", lambda _: (1.0, 2.0))
    machine = machine_of(1 << 30, 1 << 30)
    save_cached(replace(REFERENCE, source="calibrated"))
    assert rates_of(machine, Precision.FP32).source == "calibrated"
    found = rates_of(replace(machine, nvme_dir=cache), Precision.FP32)
    assert (found.source, found.nvme_read_bytes_per_second, found.nvme_write_bytes_per_second) == ("calibrated", 1, 2)


def test_a_described_gpu_scales_the_reference_by_what_its_maker_states():
    machine = replace(machine_of(1 << 30, 1 << 30, device="cuda"), described=True)
    assert for_described(replace(machine, gpu_name="NVIDIA H200")) is REFERENCE
    assert for_described(replace(machine, gpu_name="a toaster")) is REFERENCE
    slower = for_described(replace(machine, gpu_name="NVIDIA A100-SXM4-80GB"))
    ratio = slower.compute_flops_per_second[Precision.BF16] / REFERENCE.compute_flops_per_second[Precision.BF16]
    assert ratio == pytest.approx(312 / 989, rel=0.01)
    assert slower.device_bytes_per_second < REFERENCE.device_bytes_per_second
    assert slower.host_to_device == REFERENCE.host_to_device


def test_a_described_link_fabric_and_disk_scale_what_they_bound():
    machine = replace(machine_of(1 << 30, 1 << 30, device="cuda"), described=True, link=HostLink(4, 16))
    half = for_described(machine)
    assert half.host_to_device.at(1) == pytest.approx(REFERENCE.host_to_device.at(1) / 2)
    assert half.streamed_update_seconds[Precision.BF16] == pytest.approx(0.277e-9 * 2)
    fabric = for_described(replace(machine, nvlink=450e9))
    assert 300e9 < fabric.collective.at(1 << 26) < 450e9
    assert for_described(replace(machine, nvme_bytes_per_second=7e9)).nvme_write_bytes_per_second == 7e9


@given(CURVES, st.floats(1, 1 << 33))
def test_a_curve_stays_between_its_points_and_is_flat_outside_of_them(curve, size):
    found = curve.at(size)
    points = list(zip(curve.sizes_bytes, curve.bytes_per_second, strict=True))
    near = {"rel": 1e-9, "abs": 1e-9 * max(curve.bytes_per_second)}
    assert all(curve.at(s) == pytest.approx(r, **near) for s, r in points)
    if size <= points[0][0]:
        assert found == points[0][1]
    elif size >= points[-1][0]:
        assert found == points[-1][1]
    else:
        (_, low), (_, high) = next(p for p in pairwise(points) if p[0][0] <= size <= p[1][0])
        assert min(low, high) - near["abs"] <= found <= max(low, high) + near["abs"]
    assert curve.scaled(2.0).at(size) == pytest.approx(2 * found)


@pytest.mark.parametrize(
    ("sizes", "rates"), [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 1.0)), ((0, 1), (1.0, 1.0)), ((1,), (0.0,))]
)
def test_what_is_no_curve_is_refused(sizes, rates):
    with pytest.raises(ValueError, match="is none"):
        Curve(sizes, rates)


@given(CURVES, CURVES, st.floats(0.1, 1.0), st.dictionaries(st.text(), st.text(), max_size=3))
def test_rates_survive_their_file(tmp_path_factory, first, second, share, facts):
    rates = replace(
        REFERENCE,
        host_to_device=first,
        collective=second,
        duplex_share=share,
        facts=facts,
        kernels=Calibration("x", {"matmul": Rate(((1.0, 4.0),), (0.5, None))}, {"call": 1e-6}),
        tables={"link": (("a", "b"), ("1", "2"))},
        skipped=("this: that",),
        machine={"device": "cuda", "gpus": 2},
    )
    path = tmp_path_factory.mktemp("rates") / "rates.json"
    rates.save(path)
    assert Rates.load(path) == rates


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"schema": "other"}', "7"])
def test_a_foreign_file_is_refused_with_a_sentence(tmp_path, text):
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(MachineError, match=r"is not a calibration that this version can read.*memplan calibrate"):
        Rates.load(path)
