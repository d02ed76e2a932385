"""Machine and calibration files that somebody changed with an editor."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memplan.described import load_machine
from memplan.errors import MachineError
from memplan.rates import Rates
from profiler.calibration import Calibration
from profiler.errors import ProfilerError
from tests.synthetic_profiles import RATES, machine_of

BYTES = "it must be a whole number of bytes, at least 0 and at most 1152921504606846976"
COUNT = "it must be a whole number, at least 1 and at most 100000"
MACHINE = machine_of(1 << 40, 1 << 40, 1 << 40)
MEASURED = replace(RATES, device_bytes_per_second=1e12)
MACHINE_CHANGES = [
    ("gpu_bytes", "80GiB", BYTES),
    ("gpu_bytes", None, BYTES),
    ("gpu_bytes", -5, BYTES),
    ("host_bytes", "1TiB", BYTES),
    ("host_bytes", None, BYTES),
    ("nvme_bytes", "1", BYTES),
    ("host_growth_bytes", "x", f"{BYTES}, or null"),
    ("device", "tpu", "it must be 'cuda' or 'cpu'"),
    ("device", None, "it must be 'cuda' or 'cpu'"),
    ("gpu_bytes", 10**30, BYTES),
    ("gpus", 0, COUNT),
    ("gpus", -2, COUNT),
    ("gpus", "8", COUNT),
    ("gpus", 10**20, COUNT),
    ("cores", "x", "it must be a whole number, at least 1, or null"),
    ("gpu_name", 5, "it must be a string, or null"),
    ("nvme_dir", 3, "it must be a string, or null"),
    ("remarks", [1], "it must be a list of strings"),
    ("link", "x", "it must be an object, or null"),
    ("nvlink", 0, "it must be a number above 0, or null"),
]
RATES_CHANGES = [
    ("nvme_read_bytes_per_second", 0, "it must be a number above 0"),
    ("nvme_read_bytes_per_second", -1, "it must be a number above 0"),
    ("device_bytes_per_second", None, "it must be a number above 0"),
    ("device_bytes_per_second", float("nan"), "it must be a number above 0"),
    ("device_bytes_per_second", True, "it must be a number above 0"),
    ("cpu_update_seconds", "x", "it must be an object"),
    ("call_seconds", -1.0, "it must be a number, at least 0"),
    ("spread", "x", "it must be a number between 0 and 1"),
    ("spread", 5, "it must be a number between 0 and 1"),
    ("duplex_share", 9, "it must be a number above 0 and at most 1"),
    ("host_to_device", None, "it must be an object"),
    ("cpu_update_beside_links", 0.5, "it must be a number, at least 1"),
]


def written(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(json.dumps(data))
    return path


def rates_data(folder: Path) -> dict[str, Any]:
    MEASURED.save(folder / "rates.json")
    data = json.loads((folder / "rates.json").read_text())
    assert isinstance(data, dict)
    return data


@pytest.mark.parametrize(("key", "value", "says"), MACHINE_CHANGES)
def test_a_machine_that_can_not_be_names_file_key_and_value(key: str, value: Any, says: str, tmp_path: Path) -> None:
    path = written(tmp_path / "e.json", {**MACHINE.to_dict(), key: value})
    with pytest.raises(MachineError) as caught:
        load_machine(path)
    assert str(caught.value) == f"{path}: {key} is {value!r}; {says}"


@pytest.mark.parametrize(("key", "value", "says"), RATES_CHANGES)
def test_rates_that_can_not_be_name_file_key_and_value(key: str, value: Any, says: str, tmp_path: Path) -> None:
    path = written(tmp_path / "e.json", {**rates_data(tmp_path), key: value})
    with pytest.raises(MachineError) as caught:
        Rates.load(path)
    assert str(caught.value) == f"{path}: {key} is {value!r}; {says}"


def test_what_is_inside_of_a_value_is_named_with_it(tmp_path: Path) -> None:
    path, data = tmp_path / "e.json", rates_data(tmp_path)
    compute = {**data["compute_flops_per_second"], "fp32": 0.0}
    for values, says in (
        ({"compute_flops_per_second": compute}, "compute_flops_per_second.fp32 is 0.0; it must be a number above 0"),
        (
            {"gpu_update_seconds": {"fp8": 1.0}},
            "gpu_update_seconds.fp8 is of no precision that is known: fp32, amp, bf16, fp16",
        ),
        ({"tables": {"a": [1]}}, "tables.a is [1]; it must be a list of lists of strings"),
        (
            {"collective": {"sizes_bytes": [1]}},
            "collective.bytes_per_second is missing; memplan calibrate makes such files",
        ),
    ):
        with pytest.raises(MachineError) as caught:
            Rates.load(written(path, {**data, **values}))
        assert str(caught.value) == f"{path}: {says}"
    link = {"generation": 0, "width": 16, "c2c_bytes_per_second": None}
    with pytest.raises(MachineError, match=r"link.generation is 0; it must be a whole number, at least 1"):
        load_machine(written(path, {**MACHINE.to_dict(), "link": link}))


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ([], "collective: a curve of sizes (1,) and rates () is none"),
        ([0.0], "collective.bytes_per_second is [0.0]; it must be a list of numbers above 0"),
        ([float("nan")], "collective.bytes_per_second is [nan]; it must be a list of numbers above 0"),
        (["fast"], "collective.bytes_per_second is ['fast']; it must be a list of numbers above 0"),
    ],
)
def test_a_curve_without_rates_is_none(rates: list[Any], says: str, tmp_path: Path) -> None:
    curve = {"sizes_bytes": [1], "bytes_per_second": rates}
    with pytest.raises(MachineError, match=f"e.json: {re.escape(says)}"):
        Rates.load(written(tmp_path / "e.json", {**rates_data(tmp_path), "collective": curve}))


def test_what_was_saved_is_read_again(tmp_path: Path) -> None:
    rates_data(tmp_path)
    assert Rates.load(tmp_path / "rates.json") == MEASURED
    assert load_machine(written(tmp_path / "e.json", MACHINE.to_dict())).gpu_bytes == MACHINE.gpu_bytes


@pytest.mark.parametrize(
    ("rate", "says"),
    [
        (
            {"axes": [[1.0, 4.0]], "fractions": [0.5]},
            "has 1 fractions; they must be as many as its axes have points, 2",
        ),
        ({"axes": [[4.0, 1.0]], "fractions": [0.5, 0.5]}, "has an axis whose sizes do not ascend from above 0"),
        ({"axes": [], "fractions": [0.0]}, "must have fractions, all above 0 or null"),
    ],
)
def test_rates_of_kernels_that_nothing_can_be_told_from_are_named(
    rate: dict[str, Any], says: str, tmp_path: Path
) -> None:
    kernels = {**Calibration("x", {}, {}).to_dict(), "rates": {"matmul/fp32": rate}}
    path = written(tmp_path / "e.json", {**rates_data(tmp_path), "kernels": kernels})
    with pytest.raises(MachineError, match=re.escape(f"(kernels.rates['matmul/fp32'] {says}); make it again")):
        Rates.load(path)
    with pytest.raises(ProfilerError, match=re.escape(f"(kernels.rates['matmul/fp32'] {says}); make it again")):
        Calibration.load(path)
