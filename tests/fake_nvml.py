"""An NVML that answers what a test says, and refuses every other question as the real one does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30


@dataclass
class FakeGpu:
    """One GPU; ``None`` is a question that it refuses."""

    name: str = "NVIDIA H200"
    uuid: str = "GPU-0"
    total: int = 140 * GIB
    used: int = 0
    bus: str = "00000000:17:00.0"
    generation: int | None = 5
    best_generation: int | None = 5
    width: int | None = 16
    best_width: int | None = 16
    links: Sequence[tuple[str | None, str]] = ()
    """(kind, bus) of what is at the other end of each link that is up."""
    link_megabytes: int | None = 26562
    memory: bool = True
    sliced: bool | None = None
    joined: frozenset[str] = frozenset()
    """Buses that the driver says it can talk to over NVLink."""
    slices: dict[str, "FakeGpu"] = field(default_factory=dict)


class FakeNvml:
    """Stands in for the module ``pynvml``."""

    NVML_NVLINK_MAX_LINKS = 36
    NVML_NVLINK_DEVICE_TYPE_GPU = 0
    NVML_NVLINK_DEVICE_TYPE_SWITCH = 2
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0
    NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON = 90

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: FakeGpu, driver: bool = True) -> None:
        self.gpus, self.driver = gpus, driver
        self.initialized = False

    def _known(self, answer: Any) -> Any:
        if answer is None or not self.driver:
            raise self.NVMLError("not supported")
        return answer

    def nvmlInit(self) -> None:  # noqa: N802
        self._known(True)
        self.initialized = True

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return self._known(13000)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        assert self.initialized
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        return self._known(next((g.slices[uuid] for g in self.gpus if uuid in g.slices), None))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, gpu: FakeGpu) -> FakeGpu:  # noqa: N802
        return self._known(next((g for g in self.gpus if gpu in g.slices.values()), None))

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:  # noqa: N802
        return [int(self._known(gpu.sliced)), 0]

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:  # noqa: N802
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:  # noqa: N802
        return gpu.name

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> SimpleNamespace:  # noqa: N802
        self._known(gpu.memory or None)
        return SimpleNamespace(total=gpu.total, used=gpu.used, free=gpu.total - gpu.used)

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(busId=gpu.bus)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, gpu: FakeGpu) -> int:  # noqa: N802
        return self._known(gpu.generation)

    def nvmlDeviceGetGpuMaxPcieLinkGeneration(self, gpu: FakeGpu) -> int:  # noqa: N802
        return self._known(gpu.best_generation)

    def nvmlDeviceGetCurrPcieLinkWidth(self, gpu: FakeGpu) -> int:  # noqa: N802
        return self._known(gpu.width)

    def nvmlDeviceGetMaxPcieLinkWidth(self, gpu: FakeGpu) -> int:  # noqa: N802
        return self._known(gpu.best_width)

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:  # noqa: N802
        return 1 if link < len(gpu.links) else self._known(None)

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, gpu: FakeGpu, link: int) -> int:  # noqa: N802
        kinds = {"gpu": self.NVML_NVLINK_DEVICE_TYPE_GPU, "switch": self.NVML_NVLINK_DEVICE_TYPE_SWITCH}
        return self._known(kinds.get(gpu.links[link][0]))

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu: FakeGpu, link: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(busId=self._known(gpu.links[link][1] or None))

    def nvmlDeviceGetP2PStatus(self, one: FakeGpu, other: FakeGpu, index: int) -> int:  # noqa: N802
        assert index == self.NVML_P2P_CAPS_INDEX_NVLINK
        return self.NVML_P2P_STATUS_OK if other.bus in one.joined else self._known(None)

    def nvmlDeviceGetFieldValues(self, gpu: FakeGpu, fields: list[int]) -> list[SimpleNamespace]:  # noqa: N802
        assert fields == [self.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON]
        refused = gpu.link_megabytes is None
        return [SimpleNamespace(nvmlReturn=3 if refused else 0, value=SimpleNamespace(uiVal=gpu.link_megabytes or 0))]


def bus(number: int) -> str:
    return f"00000000:{number:02X}:00.0"


def switched(count: int, links: int = 18, name: str = "NVIDIA H200") -> FakeNvml:
    """GPUs on one switch."""
    ends = [("switch", bus(0xC0))] * links
    return FakeNvml(*(FakeGpu(name=name, uuid=f"GPU-{i}", bus=bus(0x10 + i), links=ends) for i in range(count)))


def bridged(*pairs: tuple[int, int], count: int) -> FakeNvml:
    """GPUs of which some are joined in pairs, four links each."""
    ends: list[list[tuple[str | None, str]]] = [[] for _ in range(count)]
    for one, other in pairs:
        ends[one] += [("gpu", bus(0x10 + other))] * 4
        ends[other] += [("gpu", bus(0x10 + one))] * 4
    cards = [FakeGpu("NVIDIA RTX A6000", f"GPU-{i}", 48 * GIB, bus=bus(0x10 + i), links=ends[i]) for i in range(count)]
    return FakeNvml(*cards)
