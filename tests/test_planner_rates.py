from dataclasses import replace

import pytest
import torch

from memplan.errors import MachineError
from memplan.quick_rates import REFERENCE, measure_rates, rates_of
from memplan.rates import PLANNED
from offload.plan import Precision
from tests.synthetic_profiles import machine_of


@pytest.mark.parametrize("precision", PLANNED)
def test_every_measured_rate_is_positive_and_leaves_no_file(tmp_path, precision):
    machine = replace(machine_of(1 << 30, 1 << 30, 1 << 30), nvme_dir=tmp_path)
    rates = measure_rates(machine, precision)
    assert rates.compute_flops_per_second[precision] > 0
    assert rates.host_to_device.at(1 << 26) > 0
    assert rates.nvme_read_bytes_per_second > 0
    assert rates.nvme_write_bytes_per_second > 0
    assert 0 < rates.cpu_update_seconds[precision] < 1e-3
    assert "measured on this machine" in rates.source
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_named(tmp_path):
    machine = replace(machine_of(1 << 30, 1 << 30, 1 << 30), nvme_dir=tmp_path / "gone")
    with pytest.raises(MachineError, match="gone can not be used"):
        measure_rates(machine, Precision.FP32)


def test_a_described_machine_gets_the_reference_and_says_so():
    machine = replace(machine_of(1 << 30, 1 << 30, device="cuda"), described=True)
    assert rates_of(machine, Precision.BF16) is REFERENCE
    assert "H200" in REFERENCE.source
    assert set(REFERENCE.compute_flops_per_second) == set(PLANNED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured():
    rates = measure_rates(machine_of(1 << 30, 1 << 30, device="cuda"), Precision.BF16)
    assert rates.compute_flops_per_second[Precision.BF16] > 1e12
    bf16 = Precision.BF16
    assert rates.gpu_update_seconds[bf16] < rates.cpu_update_seconds[bf16]
    assert rates.host_to_device.at(1 << 26) > 1e9
