"""What a calibration runs, as far as a CPU can tell: that everything runs, and is what the predictions will ask for."""

import pytest
import torch

from profiler import calibrate as module
from profiler import calibrate_blocks as blocks
from profiler.calibrate import Session, calibrate
from profiler.calibrate_issue import SHORT, _counts, issue_programs
from profiler.calibrate_kernels import grids
from profiler.calibrate_numbers import Grid
from profiler.calibrate_update import UPDATES, update
from profiler.calibration import ASSUMED, Calibration, Rate
from profiler.device import find_device
from profiler.errors import ProfilerError
from profiler.events import BACKWARD, FORWARD
from profiler.roofline import rate_of

H200 = find_device("h200")
# Convolutions of many groups are slow on a CPU.
GRIDS = [grid for grid in grids("cpu") if "grouped" not in grid.name]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)
def test_the_smallest_point_of_each_grid_runs_and_is_what_a_prediction_asks_for(grid):
    found = list(grid.prepare(*(axis[0] for axis in grid.axes)))
    assert found
    for timed in found:
        timed.run()
        for op in timed.ops:
            name, sizes = rate_of(op)
            assert f"{name}/{op.dtype}" == timed.name or name == "elementwise"
            assert len(sizes) == len(grid.axes)


def test_every_assumed_rate_is_measured_but_those_of_optimizers_outside_of_torch():
    measured = {timed for grid in GRIDS for timed in (grid.name.split("/")[0],)} | set(UPDATES)
    missing = {n for n in ASSUMED.rates if n.removesuffix("_backward") not in measured}
    assert {n for n in missing if "grouped" not in n} == {"optimizer/lion", "optimizer/adamw-8bit"}


@pytest.mark.parametrize("name", UPDATES)
def test_updates_run(name):
    run = update(name, 3, 16, "cpu") if name != "optimizer/adamw-fused" else None
    if run:
        run()
        run()


def test_each_program_adds_one_kind_of_operation_a_phase_to_the_known_ones():
    known: set[str] = set()
    for program in issue_programs():
        counts = _counts(program, SHORT)
        for phase in (FORWARD, BACKWARD):
            # What happens once a program is there already with the first ones.
            new = {name for name, count in counts[phase].items() if name not in known and count >= SHORT}
            assert len(new) <= 1, program.name
            known |= new
    assert {"call", "gradient", "forward/matmul", "backward/convolution_backward"} <= known


def test_costs_in_blocks_keep_their_proportions_and_add_up_to_what_blocks_took(monkeypatch):
    known = {"forward/elementwise": 1e-6, "forward/matmul": 2e-6, "backward/elementwise": 3e-6, "call": 1e-6}

    def three_times(block, shape, precision):
        more = blocks._more_issues(block, shape, precision)
        return {
            phase: 3 * sum(known.get(name, known[f"{phase}/elementwise"]) * count for name, count in counts.items())
            for phase, counts in more.items()
        }

    monkeypatch.setattr(blocks, "_block_seconds", three_times)
    assert blocks.in_blocks(known) == pytest.approx({name: 3 * seconds for name, seconds in known.items()})


def test_measurements_that_fail_are_skipped_and_named(monkeypatch):
    monkeypatch.setattr(module, "device_seconds", lambda run: 1e-3)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def prepare(size):
        if size == 2:
            raise RuntimeError("no kernel\nfor this")
        yield from ()

    session = Session(H200, lambda _: None)
    session.measure(Grid("odd", ((1.0, 2.0),), prepare))
    assert session.skipped == ["odd at (2.0,): RuntimeError: no kernel"]
    assert not session.rates


def test_a_grid_becomes_a_rate_of_what_was_measured(monkeypatch):
    monkeypatch.setattr(module, "device_seconds", lambda run: 1e-3)
    grid = next(g for g in GRIDS if g.name == "elementwise/float32")
    session = Session(H200, lambda _: None)
    session.measure(Grid(grid.name, ((16384.0, 65536.0),), grid.prepare))
    rate = session.rates["elementwise/float32"]
    assert rate.least_seconds == pytest.approx(1e-3 / 3)
    ideal = 8 * (65536 // 12 // 8 * 8) * 4 / H200.memory_bytes_per_second
    assert rate.fraction((65536,)) == pytest.approx(ideal / 1e-3)


def test_without_a_device_it_ends_in_a_sentence():
    if not torch.cuda.is_available():
        with pytest.raises(ProfilerError, match="needs a CUDA device"):
            calibrate()


def test_a_calibration_survives_its_file(tmp_path):
    rates = {"matmul/bfloat16": Rate(((1.0, 4.0), (2.0, 8.0)), (0.5, None, 0.25, 0.125), 3e-6)}
    calibration = Calibration("x", rates, {"call": 1e-6}, {"torch": "2"}, ("this: that",))
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    (tmp_path / "c.json").write_text('{"schema": "other"}')
    with pytest.raises(ProfilerError, match="is not a calibration that this version can read"):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(ProfilerError, match="is not a calibration"):
        Calibration.load(tmp_path / "missing.json")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_calibration_on_a_device_measures_everything():
    found = calibrate(print)
    assert not [s for s in found.skipped if "points, for time" not in s]
    assert all(0 < f < 10 for rate in found.rates.values() for f in rate.fractions if f)
