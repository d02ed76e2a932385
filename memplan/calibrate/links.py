"""The link between host and device: both directions, alone and together, by the size of one transfer; and pinning."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from memplan.calibrate.parts import Part, best_seconds, gigabytes
from memplan.formatting import format_bytes
from memplan.rates import Curve
from offload.arena import Arena

MOST_TRANSFERS = 64
"""One measurement moves no more pieces, and no more than is pinned."""
TYPICAL_BYTES = 64 << 20
"""The transfer at which the share of both directions is taken."""

Pieces = list[tuple[torch.Tensor, torch.Tensor]]


def pin(size_bytes: int, device: torch.device) -> tuple[Arena, Part]:
    """An arena as the runtime makes it (mapped, touched, registered with the driver), and how fast that went."""
    begun = time.perf_counter()
    arena = Arena(size_bytes, device)
    arena.pin()
    rate = size_bytes / (time.perf_counter() - begun)
    what = "mapped, touched and pinned" if device.type == "cuda" else "mapped and touched"
    table = (("host memory for the runtime", ""), (what, gigabytes(rate)))
    return arena, Part({"pinning_bytes_per_second": rate}, {"pinning": table})


def links(up: torch.Tensor, down: torch.Tensor, device: torch.device, sizes: Sequence[int]) -> Part:
    """Curves of both directions, and what each keeps while both are busy.

    ``up`` and ``down`` are pinned uint8 buffers on the host, of one size. Where the CPU is the device, copies share its
    cores whatever their direction.
    """
    there, back = (torch.zeros(len(up), dtype=torch.uint8, device=device) for _ in range(2))
    sizes = [size for size in sizes if size <= len(up)]
    both_ways = device.type != "cpu"
    rows: list[tuple[str, ...]] = [("transfer", "to the device", "to the host", "both at once, each way")]
    alone, duplex = [], []
    for size in sizes:
        to_device, to_host = _pieces(there, up, size), _pieces(down, back, size)
        one = [_rate([pieces], device, size) for pieces in (to_device, to_host)]
        both = _rate([to_device, to_host], device, size) if both_ways else min(one)
        alone.append(one)
        duplex.append(both)
        rows.append((format_bytes(size), *map(gigabytes, one), gigabytes(both) if both_ways else "-"))
    share = Curve(tuple(sizes), tuple(min(1.0, both / min(one)) for both, one in zip(duplex, alone, strict=True)))
    rates = {
        "host_to_device": Curve(tuple(sizes), tuple(h2d for h2d, _ in alone)),
        "device_to_host": Curve(tuple(sizes), tuple(d2h for _, d2h in alone)),
        "duplex_share": share.at(TYPICAL_BYTES),
    }
    return Part(rates, {"link": tuple(rows)})


def _pieces(target: torch.Tensor, source: torch.Tensor, size: int) -> Pieces:
    return list(zip(target.split(size), source.split(size), strict=True))[:MOST_TRANSFERS]


def _rate(directions: Sequence[Pieces], device: torch.device, size: int) -> float:
    """Bytes a second of each direction while all of these are busy, each on a stream of its own."""
    streams: list[AbstractContextManager[object]] = [
        torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext() for _ in directions
    ]

    def move() -> None:
        for pairs in zip(*directions, strict=True):
            for (target, source), stream in zip(pairs, streams, strict=True):
                with stream:
                    target.copy_(source, non_blocking=True)

    return len(directions[0]) * size / best_seconds(move, device.type)
