"""The update of offloaded state alone: by the CPU, by the GPU with state that streams, by both, beside weights too.

    python -m benchmarks.optimizer --elements 1073741824

Everything is the engine's own: its lanes, its updater, its arithmetic. Times are of one update of all elements, bf16
weights with exact masters, in nanoseconds an element; a row is its median. Whoever updates, the bytes are the same: so
the rate at which the host's memory is read and written stands in each row, and before them what it reaches.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import nn

from benchmarks.common import save
from memplan.calibrate.compute import team_of
from memplan.calibrate.parts import best_seconds
from offload.arena import Arena
from offload.arithmetic import HOWS, host_update
from offload.optimizer import update_in_torch
from offload.plan import Buckets, Placement, Precision, StateFormat, Tier
from offload.residency import chunks, state_bytes
from offload.setup import update_threads
from offload.state import UnitState, carve_state
from offload.streamed_update import StreamedUpdate
from offload.streams import Done, Lane
from offload.unit import partition
from offload.unit_update import ClipFactor, Segment, UnitUpdate
from offload.updater import Updater

UNIT_ELEMENTS = 1 << 26
"""Of one unit: a block of some billion-parameter models."""
CORES = torch.get_num_threads()
MEMORY_BYTES = 4 << 30
FORM = StateFormat(Precision.BF16)
HOW = HOWS[FORM.optimizer]


def units_on_host(elements: int, arena: Arena) -> list[UnitState]:
    """Units of pinned weights, gradients and state."""
    found = []
    sizes = [stop - start for start, stop in chunks(elements, UNIT_ELEMENTS)]
    layers = nn.ModuleList(nn.Embedding(1, size, device="meta") for size in sizes)
    places = [Placement(name, Tier.HOST, Tier.HOST, Tier.HOST) for name in ("", *map(str, range(len(sizes))))]
    for unit in partition(layers, places)[1:]:  # nothing is in the root
        size = unit.shape.elements
        weights, gradients = (arena.take(size * 2).view(torch.bfloat16) for _ in range(2))
        gradients.fill_(1e-2)
        state = carve_state(arena.take(state_bytes(size, FORM)), size, FORM)
        spans = chunks(size, Buckets().update_elements)
        found.append(UnitState(unit, spans, spans, host_weights=weights, host_gradients=gradients, host_state=state))
    return found


def update_bytes(elements: int) -> int:
    """Of host memory, read and written in an update: all is read, and all but gradients is written in its place."""
    weights = gradients = 2 * elements
    return 2 * (weights + state_bytes(elements, FORM)) + gradients


def memory_bytes_per_second(threads: int) -> float:
    """Of host memory, read and written in place as an update does it."""
    numbers = torch.ones(MEMORY_BYTES // 4)
    with team_of(threads):
        return 2 * numbers.nbytes / best_seconds(lambda: numbers.add_(1.0))


class Weights(Enum):
    """What the link to the device carries beside the update."""

    STAY = "stay"
    ONCE = "stream once"
    """Each unit's, behind its update: what the next forward pass fetches."""
    ALWAYS = "stream always"
    """One copy after another, without an end."""


class Bench:
    """The engine's updater over some units."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self.device, self.elements = device, elements
        self.arena = Arena(4 * elements + state_bytes(elements, FORM) + (1 << 20), device)
        self.units = units_on_host(elements, self.arena)
        self.arena.pin()
        self.weights = [u.host_weights for u in self.units if u.host_weights is not None]
        self.there = torch.zeros(UNIT_ELEMENTS, dtype=torch.bfloat16, device=device)

    @contextmanager
    def updater(self, share: float, *, in_torch: bool) -> Iterator[Updater]:
        """With this share for the device; ``in_torch`` by torch's own operations on the host."""
        threads = update_threads(self.device) if self.device.type == "cuda" else CORES
        names = ("update", threads), *((name, 1) for name in ("down", "up", "home", "leaving", "streamed"))
        lanes = {name: Lane(name, self.device, threads) for name, threads in names}
        streamed = None
        if share:
            streams = lanes["streamed"], lanes["home"], lanes["leaving"]
            streamed = StreamedUpdate(FORM, Buckets(), share, self.units, self.device, *streams)
        links = lanes["update"], lanes["down"], lanes["up"]
        updater = Updater(FORM, *links, None, [self.arena.take(0)] * 3, streamed, self.device)
        # Where there is no GPU: what would be used beside one.
        updater._update_on_host = update_in_torch if in_torch else host_update(torch.device("cuda"), FORM)
        try:
            yield updater
        finally:
            updater.finish()
            for lane in lanes.values():
                lane.close()

    def seconds(self, updater: Updater, beside: Lane, weights: Weights) -> tuple[float, int]:
        """Of one update, and the bytes of weights that were copied to the device meanwhile."""
        clip = ClipFactor(torch.ones((), device=self.device), 0.5)
        landed = Done.now(self.device)
        updates = [UnitUpdate(u, (Segment(0, u.unit.shape.trainable_elements, HOW),), landed) for u in self.units]
        moved = beside.bytes_moved
        updater.coming()
        begun = time.perf_counter()
        updater.begin(updates, clip)
        if weights is Weights.ONCE:
            for update, source in zip(updates, self.weights, strict=True):
                beside.copy(self.there[: len(source)], source, after=[update.promise])
        i = 0
        while not all(u.promise.settled for u in updates):
            if weights is not Weights.ALWAYS:
                time.sleep(1e-4)
                continue
            source = self.weights[i % len(self.weights)]
            beside.copy(self.there[: len(source)], source).synchronize()
            i += 1
        updater.finish()
        took = time.perf_counter() - begun
        beside.submit(lambda: None).synchronize()
        return took, beside.bytes_moved - moved


def main() -> None:
    """Measure all ways in turn, print a table, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    reached = memory_bytes_per_second(CORES)
    print(f"host memory {reached / 1e9:.0f} GB/s", flush=True)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    bench = Bench(args.elements, device)
    ways = {"CPU": (0.0, False)}
    if device.type == "cuda":
        ways |= {"GPU, streamed": (1.0, False), "both": (0.5, False)}
    rows = []
    beside = Lane("weights", device)
    for weights in Weights if device.type == "cuda" else (Weights.STAY,):
        in_turn = ways if weights is not Weights.STAY else {"CPU, torch's operations": (0.0, True), **ways}
        for name, (share, in_torch) in in_turn.items():
            with bench.updater(share, in_torch=in_torch) as updater:
                for _ in range(9 if share == 0.5 else 1):  # until the share is learned
                    bench.seconds(updater, beside, weights)
                found = [bench.seconds(updater, beside, weights) for _ in range(args.rounds)]
                learned = updater._streamed.device_share if updater._streamed is not None else 0.0
            nanoseconds = statistics.median(s for s, _ in found) * 1e9 / args.elements
            link = statistics.median(moved / s for s, moved in found) / 1e9
            memory = statistics.median((update_bytes(args.elements) + moved) / s for s, moved in found) / 1e9
            rows.append(
                {
                    "way": name,
                    "weights": weights.value,
                    "nanoseconds": round(nanoseconds, 4),
                    "device_share": round(learned, 3),
                    "link_gb_per_second": round(link, 1),
                    "host_memory_gb_per_second": round(memory, 1),
                }
            )
            print(rows[-1], flush=True)
    beside.close()
    print(
        save(
            "optimizer",
            rows,
            elements=args.elements,
            rounds=args.rounds,
            host_memory_gb_per_second=round(reached / 1e9, 1),
        )
    )


if __name__ == "__main__":
    main()
