"""What a calibration of the machine measures, as far as a CPU and tiny sizes can tell."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from memplan.calibrate import run as module
from memplan.calibrate import updates
from memplan.calibrate.collectives import collectives
from memplan.calibrate.compute import host_memory, team_of
from memplan.calibrate.disk import disk
from memplan.calibrate.links import links, pin
from memplan.calibrate.parts import Effort, Part
from memplan.calibrate.run import calibrate
from memplan.calibrate.streamed import resident_update
from memplan.calibrate.updates import HostUpdate, Regions, host_bytes, pumped, timed
from memplan.disks import Disk
from memplan.errors import MachineError
from memplan.machine import Machine
from memplan.quick_rates import REFERENCE
from memplan.rates import PLANNED, Rates
from memplan.show_rates import rates_tables
from offload.errors import TierError
from offload.plan import Precision
from offload.streams import Done
from profiler.calibration import ASSUMED, Calibration
from profiler.errors import ProfilerError

KIB, MIB = 1 << 10, 1 << 20
CPU = torch.device("cpu")
TINY = Effort(
    link_bytes=(16 * KIB, 64 * KIB),
    update_elements=8192,
    repeat_seconds=0.01,
    disk_bytes=MIB,
    disk_blocks=(64 * KIB,),
    disk_depths=(1, 2),
    disk_seconds=1.0,
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what has a size of its own."""
    monkeypatch.setattr(module, "host_memory", lambda threads: host_memory(threads, KIB))
    monkeypatch.setattr(module, "compute", lambda device: Part())


def printed(rates: Rates) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(rates_tables(rates))
    return capture.get()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured in another test")
def test_a_machine_without_a_gpu_is_measured_for_what_it_has(quick, tmp_path):
    heard: list[str] = []
    rates = calibrate(tmp_path, heard.append, TINY)
    assert rates.kernels is None
    assert rates.streamed_update_seconds == {}
    assert rates.host_to_device.sizes_bytes == TINY.link_bytes
    assert set(rates.cpu_update_seconds) == set(PLANNED)
    assert rates.gpu_update_seconds == rates.cpu_update_seconds
    assert rates.nvme_read_bytes_per_second != REFERENCE.nvme_read_bytes_per_second
    assert rates.facts["disk"]
    assert rates.machine is not None
    assert Machine.from_dict(rates.machine).nvme_dir == tmp_path.resolve()
    assert "memplan calibrate" in rates.source
    assert rates.spread < REFERENCE.spread
    assert list(tmp_path.iterdir()) == []
    assert {"the link", "pinning", "the update on the host"} <= set(heard)
    shown = printed(rates)
    for name in ("what plans use", "host memory", "link", "update on the host", "disk by block and depth"):
        assert name in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured in another test")
def test_what_fails_is_a_sentence_and_the_reference_stands_in_its_place(quick, monkeypatch):
    def fails(*_: object) -> Part:
        raise RuntimeError("no such luck\nsecond line")

    monkeypatch.setattr(module, "links", fails)
    rates = calibrate(effort=TINY)
    assert "the link: RuntimeError: no such luck" in rates.skipped
    assert rates.host_to_device == REFERENCE.host_to_device
    assert any(s.startswith("the disk:") for s in rates.skipped)
    assert "no such luck" in printed(rates)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured in another test")
def test_without_memory_to_pin_the_rest_is_measured(quick, monkeypatch):
    def refuses(*_: object) -> None:
        raise TierError("the driver could not pin")

    monkeypatch.setattr(module, "pin", refuses)
    rates = calibrate(effort=TINY)
    assert any("could not pin" in s for s in rates.skipped)
    assert rates.cpu_update_seconds == REFERENCE.cpu_update_seconds
    assert "host memory" in rates.tables


def test_a_directory_of_no_use_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(MachineError, match="does not exist"):
        calibrate(tmp_path / "gone", effort=TINY)


def test_the_update_that_is_timed_is_the_engines_own():
    elements = 8192
    for precision in Precision:
        raw = torch.zeros(host_bytes(elements, precision), dtype=torch.uint8)
        update = HostUpdate(elements, precision, raw, CPU)
        try:
            assert timed(update.begin, [], int, 0.01).update_seconds > 0
            state = update._state
        finally:
            update.close()
        assert state.host_state is not None
        # Gradients of 0.01, clipped by a half of their norm of one.
        assert state.host_state.moments[0].min() > 0
        assert state.host_weights is not None
        assert state.host_weights.max() < 0


def test_pumps_run_while_an_update_goes_on_and_are_counted():
    calls, pending = [], []

    def begin() -> Done:
        pending.append(Done())
        return pending[-1]

    def pump() -> None:
        calls.append(None)
        if len(calls) % 5 == 0:
            pending.pop(0).finish(None)

    found = timed(begin, [pump], lambda: len(calls), 0.0)
    assert len(calls) == 10
    assert found.update_seconds * found.count_per_second == pytest.approx(5)
    assert pumped([pump, lambda: pending.append(Done())], lambda: len(calls), 0.01) > 0


def test_a_stream_counts_the_pieces_that_have_arrived(monkeypatch):
    monkeypatch.setattr(updates, "PIECE_BYTES", KIB)
    regions = Regions(torch.zeros(0, dtype=torch.uint8), torch.arange(16 * KIB).to(torch.uint8))
    update = HostUpdate(64, Precision.FP32, torch.zeros(host_bytes(64, Precision.FP32), dtype=torch.uint8), CPU)
    up, _ = updates._streams(update, regions, CPU)
    for _ in range(10):
        up.pump()
    assert up.moved_bytes() == (10 - updates.ON_THEIR_WAY) * KIB
    update.close()
    assert torch.equal(up.target, regions.up)


def test_links_give_a_curve_of_the_sizes_that_fit_and_an_arena_its_rate():
    arena, part = pin(64 * KIB, CPU)
    assert part.rates["pinning_bytes_per_second"] > 0
    buffer = arena.take(64 * KIB)
    part = links(buffer[: 32 * KIB], buffer[32 * KIB :], CPU, (16 * KIB, 32 * KIB, 64 * KIB))
    arena.close()
    assert part.rates["host_to_device"].sizes_bytes == (16 * KIB, 32 * KIB)
    assert part.rates["duplex_share"] == 1.0
    assert len(part.tables["link"]) == 3


def test_the_update_in_the_devices_memory_has_a_time_for_every_precision():
    part = resident_update(CPU, 1024)
    assert set(part.rates["gpu_update_seconds"]) == set(PLANNED)


def test_a_disk_is_measured_by_block_and_depth_and_no_file_stays(tmp_path):
    part = disk(tmp_path, MIB, (64 * KIB, 256 * KIB), (1, 2, 8), 5.0)
    rows = part.tables["disk by block and depth"]
    assert len(rows) == 1 + 5  # eight requests of 256 KiB are more than the file
    assert part.rates["nvme_write_bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "word"), [("tmpfs", "host memory"), ("nfs4", "network mount")])
def test_what_is_no_local_disk_is_measured_and_named(tmp_path, monkeypatch, kind, word):
    found = Disk(tmp_path, 1 << 30, kind, network=kind == "nfs4", in_memory=kind == "tmpfs", direct_io=True)
    monkeypatch.setattr("memplan.calibrate.disk.inspect", lambda _: found)
    part = disk(tmp_path, MIB, (64 * KIB,), (1,), 1.0)
    assert any(word in sentence and kind in sentence for sentence in part.skipped)
    assert part.rates["nvme_read_bytes_per_second"] > 0


def test_combinations_without_time_left_are_named(tmp_path):
    part = disk(tmp_path, MIB, (64 * KIB,), (1, 2), 0.0)
    assert any("2 of 2 combinations" in sentence for sentence in part.skipped)


def test_host_memory_is_measured_up_to_all_threads_and_the_team_is_as_before():
    with team_of(2):
        rows = host_memory(3, KIB).tables["host memory"]
        assert [row[0] for row in rows[1:]] == ["1", "2", "3"]
        with team_of(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2


def test_collectives_run_in_a_process_a_rank():
    part = collectives(2, (64 * KIB, 256 * KIB), "gloo")
    curve = part.rates["collective"]
    assert curve.sizes_bytes == (64 * KIB, 256 * KIB)
    assert min(curve.bytes_per_second) > 0


def test_collectives_that_fail_say_why():
    with pytest.raises(MachineError, match=r"a process of the collectives ended with 1: .*nonsense"):
        collectives(1, (KIB,), "nonsense")


def test_profile_takes_the_kernels_out_of_a_machines_rates(tmp_path):
    kernels = Calibration("NVIDIA H200", dict(list(ASSUMED.rates.items())[:2]), {"call": 1e-6})
    path = tmp_path / "rates.json"
    replace(REFERENCE, kernels=kernels).save(path)
    assert Calibration.load(path) == kernels
    assert Rates.load(path).kernels == kernels
    REFERENCE.save(path)
    with pytest.raises(ProfilerError, match="without a GPU"):
        Calibration.load(path)


def test_matmuls_are_shown_from_the_grid_that_was_timed():
    from profiler.calibration import Rate

    rate = Rate(((1024.0,), (1024.0,), (1024.0,)), (0.5,))
    shown = printed(replace(REFERENCE, kernels=Calibration("NVIDIA H200", {"matmul/bfloat16": rate}, {})))
    assert "matmul, bfloat16" in shown
    assert "TFLOP/s" in shown


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_machine_with_a_gpu_is_measured_whole(tmp_path):
    import time

    begun = time.perf_counter()
    rates = calibrate(tmp_path, print)
    print(f"calibrated in {time.perf_counter() - begun:.1f} s")
    Console(width=160).print(rates_tables(rates))
    assert rates.kernels is not None
    assert rates.cpu_update_beside_links >= 1
    assert 0 < rates.links_beside_update <= 1
    assert 0 < rates.duplex_share <= 1
    assert set(rates.streamed_update_seconds) == set(PLANNED)
    assert rates.gpu_update_seconds[Precision.BF16] < rates.streamed_update_seconds[Precision.BF16]
    assert not [s for s in rates.skipped if "Error" in s and not s.startswith("kernels:")]
    rates.save(tmp_path / "rates.json")
    assert json.loads(Path(tmp_path / "rates.json").read_text())["schema"] == "memplan.rates/1"
