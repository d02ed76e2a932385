"""One calibration: every measurement in turn, what fails named and passed over, until the time is up."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from memplan.calibrate.collectives import collectives
from memplan.calibrate.compute import compute, host_memory
from memplan.calibrate.disk import disk
from memplan.calibrate.here import facts_here, fingerprint
from memplan.calibrate.links import links, pin
from memplan.calibrate.parts import Effort, Part
from memplan.calibrate.streamed import resident_update
from memplan.calibrate.updates import Regions, both_updates, host_bytes, host_update
from memplan.host import usable_cores
from memplan.machine import detect
from memplan.quick_rates import REFERENCE
from memplan.rates import Curve, Rates
from offload.plan import Precision
from offload.residency import BLOCK_BYTES, aligned
from offload.store import check_directory
from profiler.calibrate import calibrate as measure_kernels

Say = Callable[[str], object]


def calibrate(nvme_dir: Path | None = None, say: Say = lambda _: None, effort: Effort | None = None) -> Rates:
    """Measure this machine, on a GPU in about a minute; ``say`` hears what is being measured.

    ``nvme_dir`` is a directory on the disk to measure. What can not be measured keeps the figure of a reference and is
    named in ``skipped``. Raises MachineError or TierError for a directory of no use.
    """
    machine = detect(nvme_dir)  # while nothing here takes memory yet
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    effort = effort or Effort.of(device)
    if nvme_dir is not None:
        check_directory(nvme_dir, effort.disk_bytes)
    session = Session(device, effort, say)
    session.measure("compute", lambda: compute(device))
    session.measure("host memory by threads", lambda: host_memory(usable_cores()))
    session.measure_arena()
    session.measure_gpus()
    if nvme_dir is not None:
        session.measure(f"the disk of {nvme_dir}", lambda: _disk(nvme_dir, effort))
    else:
        session.skip("the disk: no directory on it was named, so its rates are a reference's")
    if device.type == "cuda":
        session.measure_kernels()
    return replace(session.result(facts_here(nvme_dir)), machine=machine.to_dict())


class Session:
    """What has been measured so far."""

    def __init__(self, device: torch.device, effort: Effort, say: Say) -> None:
        self._device, self._effort, self._say = device, effort, say
        self._end = time.perf_counter() + effort.seconds
        self._rates = replace(REFERENCE, spread=Rates.spread)

    def measure(self, name: str, work: Callable[[], Part]) -> bool:
        """Take over what ``work`` finds; a failure becomes a sentence, and False."""
        self._say(name)
        try:
            part = work()
        except Exception as error:  # noqa: BLE001 - whatever fails, the others are still worth having
            self.skip(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            return False
        finally:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        tables = {**self._rates.tables, **part.tables}
        skipped = (*self._rates.skipped, *part.skipped)
        self._rates = replace(self._rates, **part.rates, tables=tables, skipped=skipped)
        return True

    def skip(self, sentence: str) -> None:
        """Something was not measured."""
        self._rates = replace(self._rates, skipped=(*self._rates.skipped, sentence))

    def measure_arena(self) -> None:
        """Pinning, and what needs pinned memory: links, and updates on the host."""
        effort, device = self._effort, self._device
        elements = effort.update_elements
        state_bytes = aligned(max(host_bytes(elements, precision) for precision in Precision), BLOCK_BYTES)
        link_bytes = max(effort.link_bytes)
        with ExitStack() as stack:

            def make() -> Part:
                arena, part = pin(state_bytes + 2 * link_bytes, device)
                stack.callback(arena.close)
                regions.append(Regions(arena.take(state_bytes), arena.take(2 * link_bytes)))
                return part

            regions: list[Regions] = []
            if not self.measure("pinning", make):
                self.skip("the link and the updates on the host, which need that memory")
                return
            (part,) = regions
            self.measure("the link", lambda: links(part.up, part.down, device, effort.link_bytes))
            seconds = effort.repeat_seconds
            self.measure("the update on the host", lambda: host_update(part, device, elements, seconds))
            if device.type == "cuda":
                self.measure("the update streamed", lambda: both_updates(part, device, elements, seconds))

    def measure_gpus(self) -> None:
        """The update in a GPU's memory, and what several GPUs say to each other."""
        if self._device.type == "cpu":
            # The device's memory is the host's.
            cpu = self._rates.cpu_update_seconds
            self._rates = replace(self._rates, gpu_update_seconds=cpu, streamed_update_seconds={})
        else:
            elements = self._effort.update_elements
            self.measure("the update on the GPU", lambda: resident_update(self._device, elements))
        gpus = torch.cuda.device_count()
        if gpus > 1 and self.measure("collectives", lambda: collectives(gpus, self._effort.collective_bytes)):
            return
        if gpus < 2:
            self.skip("collectives: one device has nobody to talk to, so several would talk over their host links")
        largest = max(self._effort.link_bytes)
        slower = min(link.at(largest) for link in (self._rates.host_to_device, self._rates.device_to_host))
        self._rates = replace(self._rates, collective=Curve.flat(slower * self._rates.duplex_share))

    def measure_kernels(self) -> None:
        """What kernels reach, for as long as there is time."""

        def kernels() -> Part:
            found = measure_kernels(self._say, self._end - time.perf_counter())
            return Part({"kernels": found}, skipped=tuple(f"kernels: {sentence}" for sentence in found.skipped))

        self.measure("kernels", kernels)

    def result(self, facts: dict[str, str]) -> Rates:
        """All of it, with where it comes from."""
        today = datetime.now(UTC).strftime("%Y-%m-%d")
        what = facts["gpus"] if facts["gpus"] != "none" else f"{facts['cores']} cores of {facts['cpu']}"
        return replace(
            self._rates,
            source=f"Rates were measured by memplan calibrate on {what}, {today}.",
            facts={**facts, "date": today},
            fingerprint=fingerprint(facts),
        )


def _disk(directory: Path, effort: Effort) -> Part:
    return disk(directory, effort.disk_bytes, effort.disk_blocks, effort.disk_depths, effort.disk_seconds)
