"""The rates of a machine: calibrated, or the coarse ones measured in two seconds, or a reference."""

from dataclasses import replace
from pathlib import Path

import torch

from memplan.calibrate.compute import (
    COPY_BYTES,
    call_seconds,
    device_bytes_per_second,
    training_flops_per_second,
)
from memplan.calibrate.disk import store_rates
from memplan.calibrate.here import facts_here, load_cached, without_disk
from memplan.calibrate.parts import best_seconds
from memplan.errors import MachineError
from memplan.gpus import HostLink
from memplan.machine import Machine
from memplan.rates import PLANNED, Curve, Rates
from offload.arithmetic import HOWS
from offload.errors import TierError
from offload.optimizer import update_in_torch
from offload.plan import Precision, StateFormat
from offload.residency import state_bytes, update_traffic_bytes
from offload.state import carve_state, weight_dtype
from profiler.device import find_device

TRAINING_SHARE = 0.57
"""Share of the matmul ceiling that training reaches.

Measured on one H200: 3.21e9 parameters, 8 x 2048 tokens, every layer recomputed, take 4.3e14 executed FLOPs in
0.978 s, of which about 0.03 s are the optimizer's: 455 of 790 TFLOP/s.
"""
REFERENCE_CALL_SECONDS = 89e-6
"""Measured on the same machine."""
UPDATE_ELEMENTS = 1 << 22
DISK_BYTES = 128 << 20
DISK_SECONDS = 0.2
REFERENCE_GPU, REFERENCE_LINK = "H200", HostLink(generation=5, width=16)


REFERENCE = Rates(
    compute_flops_per_second={
        Precision.BF16: 790e12 * TRAINING_SHARE,
        Precision.AMP: 790e12 * TRAINING_SHARE,
        # Without tensor cores: the vendor's 67 TFLOP/s.
        Precision.FP32: 67e12 * TRAINING_SHARE,
    },
    device_bytes_per_second=4270e9,
    call_seconds=REFERENCE_CALL_SECONDS,
    host_to_device=Curve.flat(55.4e9),
    device_to_host=Curve.flat(55.4e9),
    duplex_share=50.9 / 55.4,
    cpu_update_seconds=dict.fromkeys(PLANNED, 0.34e-9),
    cpu_update_beside_links=0.50 / 0.34,
    links_beside_update=51 / 55.4,
    # 26 bytes an element through memory that copies 4270 GB/s.
    gpu_update_seconds=dict.fromkeys(PLANNED, 26 / 4270e9),
    streamed_update_seconds=dict.fromkeys(PLANNED, 0.277e-9),
    nvme_read_bytes_per_second=1.7e9,
    nvme_write_bytes_per_second=1.7e9,
    # Without a faster fabric the GPUs talk over their host links.
    collective=Curve.flat(50.9e9),
    inter_node_bytes_per_second=None,
    pinning_bytes_per_second=(1 << 30) / 0.05,
    cpu_update_beside_streamed=0.55 / 0.34,
    # Both together took 0.20 ns an element, of which the CPU did one each 0.55 ns.
    streamed_update_beside_cpu=1 / (1 / 0.20 - 1 / 0.55) / 0.277,
    source="Rates are a reference, measured on one H200 (PCIe 5 x16) with 16 cores; the machine described may differ.",
    spread=0.5,
)


def rates_of(machine: Machine, precision: Precision) -> Rates:
    """Those of a calibration of this machine; without one measured now; of a described machine the reference's.

    The reference's disk is a local one. A directory here that is on none, and whose rate nobody said, is measured.
    """
    if machine.described:
        rates, disk = for_described(machine), machine.disk
        if disk is None or not disk.trouble or machine.nvme_bytes_per_second is not None or not disk.directory.is_dir():
            return rates
        read, write = _disk_rates(disk.directory)
        return replace(rates, nvme_read_bytes_per_second=read, nvme_write_bytes_per_second=write)
    facts = facts_here(machine.nvme_dir)
    if (calibrated := load_cached(facts)) is not None:
        return calibrated
    if machine.nvme_dir is not None and (calibrated := load_cached(without_disk(facts))) is not None:
        read, write = _disk_rates(machine.nvme_dir)
        return replace(calibrated, nvme_read_bytes_per_second=read, nvme_write_bytes_per_second=write)
    return measure_rates(machine, precision)


def for_described(machine: Machine) -> Rates:
    """The reference, with what is known of the machine in proportion: its GPU, its links, its disk; pure.

    Links reach the same share of what they can do in theory as the reference's does.
    """
    rates = _with_gpu(REFERENCE, machine)
    if machine.link is not None:
        faster = machine.link.bytes_per_second / REFERENCE_LINK.bytes_per_second
        rates = replace(
            rates,
            host_to_device=rates.host_to_device.scaled(faster),
            device_to_host=rates.device_to_host.scaled(faster),
            # State that streams through the GPU is bound by the link.
            streamed_update_seconds={p: s / faster for p, s in rates.streamed_update_seconds.items()},
            collective=rates.collective.scaled(faster),
        )
    if machine.nvlink is not None:
        share = REFERENCE.host_to_device.at(1) / REFERENCE_LINK.bytes_per_second
        rates = replace(rates, collective=Curve.flat(machine.nvlink * share))
    if (disk := machine.nvme_bytes_per_second) is not None:
        rates = replace(rates, nvme_read_bytes_per_second=disk, nvme_write_bytes_per_second=disk)
    return rates


def _with_gpu(rates: Rates, machine: Machine) -> Rates:
    own, known = machine.known_device, find_device(REFERENCE_GPU)
    if own is None or own == known:
        return rates
    classes = {Precision.BF16: "bf16", Precision.AMP: "bf16", Precision.FP32: "fp32"}
    memory = own.memory_bytes_per_second / known.memory_bytes_per_second
    return replace(
        rates,
        compute_flops_per_second={
            precision: rate * own.peak(classes[precision]) / known.peak(classes[precision])
            for precision, rate in rates.compute_flops_per_second.items()
        },
        device_bytes_per_second=rates.device_bytes_per_second * memory,
        gpu_update_seconds={p: seconds / memory for p, seconds in rates.gpu_update_seconds.items()},
        source=f"{rates.source} Its arithmetic and memory are in the proportion that {own.name}'s maker states.",
    )


def measure_rates(machine: Machine, precision: Precision) -> Rates:
    """Measure this machine, in under two seconds. The NVMe directory's file is removed again."""
    to_device, to_host = _copy_rates(machine.device)
    # Without a directory nothing goes to disk, and no plan depends on its rates.
    read, write = REFERENCE.nvme_read_bytes_per_second, REFERENCE.nvme_write_bytes_per_second
    if machine.nvme_dir is not None:
        read, write = _disk_rates(machine.nvme_dir)
    cpu_update = _update_seconds_per_element(precision)
    memory = device_bytes_per_second(machine.device)
    gpu_update = cpu_update
    if machine.device == "cuda":
        # Weight, gradient and state are read, weight and state written.
        gpu_update = update_traffic_bytes(1, StateFormat(precision)) / memory
    name = machine.gpu_name or f"{machine.cores} CPU cores"
    return replace(
        REFERENCE,
        compute_flops_per_second={precision: training_flops_per_second(machine.device, precision)},
        device_bytes_per_second=memory,
        call_seconds=call_seconds(machine.device),
        host_to_device=Curve.flat(to_device),
        device_to_host=Curve.flat(to_host),
        cpu_update_seconds={precision: cpu_update},
        gpu_update_seconds={precision: gpu_update},
        nvme_read_bytes_per_second=read,
        nvme_write_bytes_per_second=write,
        collective=Curve.flat(min(to_device, to_host)),
        source=f"Rates were measured on this machine ({name}) just now, in a hurry; memplan calibrate does it well.",
        spread=0.3,
    )


def _copy_rates(device: str) -> tuple[float, float]:
    """Bytes a second from pinned host memory to the device, and back."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=device == "cuda").zero_()
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    to_device = best_seconds(lambda: there.copy_(host, non_blocking=True), device)
    to_host = best_seconds(lambda: host.copy_(there, non_blocking=True), device)
    return COPY_BYTES / to_device, COPY_BYTES / to_host


def _update_seconds_per_element(precision: Precision) -> float:
    """The runtime's own update, over state that is larger than the caches."""
    dtype = weight_dtype(precision)
    weight, gradient = torch.rand(UPDATE_ELEMENTS).to(dtype), torch.rand(UPDATE_ELEMENTS).to(dtype)
    form = StateFormat(precision)
    raw = torch.zeros(state_bytes(UPDATE_ELEMENTS, form), dtype=torch.uint8)
    state, how = carve_state(raw, UPDATE_ELEMENTS, form), HOWS[form.optimizer]
    return best_seconds(lambda: update_in_torch(weight, gradient, state, how, 0.5)) / UPDATE_ELEMENTS


def _disk_rates(directory: Path) -> tuple[float, float]:
    """Bytes a second of reading and writing; raises MachineError for a directory that can not be used."""
    try:
        return store_rates(directory, DISK_BYTES, DISK_SECONDS)
    except (OSError, TierError) as error:
        raise MachineError(f"the NVMe directory {directory} can not be used: {error}") from error
