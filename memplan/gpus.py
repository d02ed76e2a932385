"""The GPUs that CUDA will see, asked of NVML, which makes no context: memory, links, and NVLink between them.

Every function takes the ``nvml`` module, so that tests can hand in one of their own.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pynvml


@dataclass(frozen=True)
class HostLink:
    """What joins a GPU to its host."""

    generation: int
    """Of PCI Express: the highest that card and slot agree on. An idle GPU runs at a lower one."""
    width: int
    """Lanes."""
    c2c_bytes_per_second: float | None = None
    """Of NVLink-C2C, in one direction, where the host's processor is joined by it: copies then go that way."""

    @property
    def bytes_per_second(self) -> float:
        """In one direction, in theory: what the coding leaves of the signals, before packets' headers.

        Source: PCI Express base specifications. 2.5 and 5 GT/s with 8 bits in 10, from 8 GT/s on 128 in 130, from 64
        GT/s on 242 bytes in 256.
        """
        if self.c2c_bytes_per_second is not None:
            return self.c2c_bytes_per_second
        transfers = 2.5e9 * self.generation if self.generation < 3 else 1e9 * 2**self.generation
        coding = 8 / 10 if self.generation < 3 else 128 / 130 if self.generation < 6 else 242 / 256
        return transfers * coding * self.width / 8


@dataclass(frozen=True)
class Gpu:
    """One GPU, or a slice of one. ``None`` is what it does not tell."""

    name: str | None
    free_bytes: int | None
    """Now."""
    total_bytes: int | None
    bus_id: str | None
    """As /sys writes it: ``0000:17:00.0``."""
    link: HostLink | None
    """The width is that of now."""
    best_link: HostLink | None
    """What the card could do in a better slot."""
    nvlinks: int
    """NVLinks that are up."""
    nvlink_bytes_per_second: float | None
    """Of all of them together, in one direction."""
    nvlink_peers: frozenset[int]
    """Which of the other GPUs they reach, by index."""

    @classmethod
    def unknown(cls) -> "Gpu":
        """One that NVML tells nothing of."""
        return cls(None, None, None, None, None, None, 0, None, frozenset())


def find_gpus(nvml: Any = pynvml, environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; none where there is no driver."""
    handles = _visible(nvml, environ)
    cards = [_card(nvml, handle) for handle in handles]
    buses = [_bus_id(_ask(nvml, nvml.nvmlDeviceGetPciInfo, card)) for card in cards]
    remotes = [_remotes(nvml, card) for card in cards]
    found = []
    for i, (handle, card) in enumerate(zip(handles, cards, strict=True)):
        peers = (j for j in range(len(cards)) if j != i and _joined(nvml, i, j, cards, buses, remotes))
        memory = _memory(nvml, handle, card)
        found.append(
            Gpu(
                name=_ask(nvml, nvml.nvmlDeviceGetName, handle),
                free_bytes=None if memory is None else int(memory.free),
                total_bytes=None if memory is None else int(memory.total),
                bus_id=buses[i],
                link=_link(nvml, card, nvml.nvmlDeviceGetMaxPcieLinkGeneration, nvml.nvmlDeviceGetCurrPcieLinkWidth),
                best_link=_link(
                    nvml, card, nvml.nvmlDeviceGetGpuMaxPcieLinkGeneration, nvml.nvmlDeviceGetMaxPcieLinkWidth
                ),
                nvlinks=len(remotes[i]),
                nvlink_bytes_per_second=_nvlink_rate(nvml, card, len(remotes[i])),
                nvlink_peers=frozenset(peers) if remotes[i] else frozenset(),
            )
        )
    return tuple(found)


def all_joined(gpus: Sequence[Gpu]) -> bool:
    """Whether every GPU reaches every other over NVLink, if need be through others, as rings of collectives do."""
    reached, todo = {0}, [0]
    while todo:
        new = gpus[todo.pop()].nvlink_peers - reached
        reached |= new
        todo += new
    return len(gpus) > 1 and len(reached) == len(gpus)


def cuda_driver(nvml: Any = pynvml) -> str | None:
    """The newest CUDA that the driver runs, like ``13.0``; ``None`` where there is no driver."""
    version = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion)
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def _visible(nvml: Any, environ: Mapping[str, str]) -> list[Any]:
    """Handles by CUDA's rules: indices or beginnings of UUIDs, up to the first that names nothing."""
    try:
        nvml.nvmlInit()
        everything = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return everything
    handles = []
    for entry in (text.strip() for text in chosen.split(",")):
        if entry.isdecimal():
            handle = everything[int(entry)] if int(entry) < len(everything) else None
        elif entry.startswith("MIG-"):
            handle = _ask(nvml, nvml.nvmlDeviceGetHandleByUUID, entry)
        else:
            named = (h for h in everything if entry and _text(_ask(nvml, nvml.nvmlDeviceGetUUID, h)).startswith(entry))
            handle = next(named, None)
        if handle is None:
            break
        handles.append(handle)
    return handles


def _card(nvml: Any, handle: Any) -> Any:
    """The card that a slice belongs to; a whole GPU is its own."""
    parent = _ask(nvml, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
    return handle if parent is None else parent


def _memory(nvml: Any, handle: Any, card: Any) -> Any:
    """A slice's own memory. A card that is cut into slices tells of more than CUDA will give from it."""
    sliced = handle is card and (_ask(nvml, nvml.nvmlDeviceGetMigMode, card) or [0])[0]
    return None if sliced else _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)


def _link(nvml: Any, card: Any, generation: Callable[..., Any], width: Callable[..., Any]) -> HostLink | None:
    # Some virtual machines answer 0.
    found, lanes = _ask(nvml, generation, card), _ask(nvml, width, card)
    return HostLink(int(found), int(lanes)) if found and lanes else None


def _remotes(nvml: Any, card: Any) -> list[str]:
    """For each NVLink that is up: ``switch``, the bus of the device at its other end, or "" where that is not told."""
    ends = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if not _ask(nvml, nvml.nvmlDeviceGetNvLinkState, card, link):
            continue
        kind = _ask(nvml, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, card, link)
        bus = _bus_id(_ask(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, card, link))
        ends.append("switch" if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH else bus or "")
    return ends


def _joined(
    nvml: Any, i: int, j: int, cards: Sequence[Any], buses: Sequence[str | None], remotes: Sequence[list[str]]
) -> bool:
    """Over a switch that both are on, by a link between them, or, where a virtual machine hides those, by the driver's
    word that they can talk over NVLink."""
    if "switch" in remotes[i] and "switch" in remotes[j]:
        return True
    if buses[j] is not None and buses[j] in remotes[i]:
        return True
    status = _ask(nvml, nvml.nvmlDeviceGetP2PStatus, cards[i], cards[j], nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    return bool(status is not None and status == nvml.NVML_P2P_STATUS_OK)


def _nvlink_rate(nvml: Any, card: Any, links: int) -> float | None:
    answers = _ask(nvml, nvml.nvmlDeviceGetFieldValues, card, [nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])
    if not links or answers is None or answers[0].nvmlReturn != 0 or not answers[0].value.uiVal:
        return None
    return links * answers[0].value.uiVal * 1e6


def _bus_id(pci: Any) -> str | None:
    """NVML writes eight digits of domain, /sys four."""
    domain, colon, rest = _text(getattr(pci, "busId", "")).partition(":")
    return f"{int(domain, 16):04x}:{rest.lower()}" if colon else None


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else answer or ""


def _ask(nvml: Any, question: Callable[..., Any], *about: Any) -> Any:
    """NVML's answer; ``None`` where this GPU or this driver does not know."""
    try:
        return question(*about)
    except nvml.NVMLError:
        return None
