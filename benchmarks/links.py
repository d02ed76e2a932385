"""How fast the engine carries weights and gradients where the link, and not the device, is what a pass waits for.

    python -m benchmarks.links

First the link itself: large pinned copies in one direction alone, and in both at once. Then passes of an engine whose
layers live on the host, over so few tokens that computing is nothing: a forward pass, where only weights come, and the
backward pass behind it, where gradients leave while weights come. Bytes are the engine's own counters; a pass's ratio
is that of its busier direction to the link under the same conditions.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.common import llama_config, save
from benchmarks.systems import H, Tiers
from offload.engine import Engine

COPY_BYTES = 1 << 28
COPIES = 24
SHAPE = (4096, 8, 32, 8, 14336, 4096)
"""Layers of an 8e9 model, 436 MB each; a vocabulary that is nothing beside them."""


def link(device: torch.device, *, up: bool, down: bool) -> float:
    """Seconds a byte of pinned copies to the device, from it, or of each of both at once."""
    here = [torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def copy() -> float:
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(COPIES):
            if up:
                with torch.cuda.stream(streams[0]):
                    there[0].copy_(here[0], non_blocking=True)
            if down:
                with torch.cuda.stream(streams[1]):
                    here[1].copy_(there[1], non_blocking=True)
        torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    copy()
    return statistics.median(copy() for _ in range(3)) / (COPY_BYTES * COPIES)


class Moved(NamedTuple):
    """What a pass took, and the bytes that it moved to the device and from it."""

    seconds: float
    up_bytes: int
    down_bytes: int


def moved(engine: Engine, work: Callable[[], Any], passes: int) -> Moved:
    """The mean of so many passes, behind some that warm up."""

    def settle() -> None:
        engine.finish()
        torch.cuda.synchronize()

    for _ in range(3):
        work()
    settle()
    before, begun = engine.traffic_bytes(), time.perf_counter()
    for _ in range(passes):
        work()
    settle()
    seconds, after = time.perf_counter() - begun, engine.traffic_bytes()
    up, down = ((after[name] - before[name]) // passes for name in ("host_to_device", "device_to_host"))
    return Moved(seconds / passes, up, down)


def row_of(name: str, found: Moved, seconds_a_byte: float) -> dict[str, Any]:
    """One pass beside the link."""
    rate = max(found.up_bytes, found.down_bytes) / found.seconds
    return {
        "pass": name,
        "seconds": round(found.seconds, 4),
        "up_bytes": found.up_bytes,
        "down_bytes": found.down_bytes,
        "busier_gb_per_second": round(rate / 1e9, 2),
        "link_gb_per_second": round(1e-9 / seconds_a_byte, 2),
        "ratio": round(rate * seconds_a_byte, 3),
    }


def main() -> None:
    """Measure link and engine in turn, print a table, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    from transformers import LlamaForCausalLM

    with device:
        model = LlamaForCausalLM(llama_config(SHAPE, use_cache=False, tie_word_embeddings=True)).train()
    options = argparse.Namespace(model="links", batch=1, accumulation=1, clip=1.0, update_gb=0.0, nvme="")
    engine = Engine(model, Tiers((H, H, H)).plan(options, model), max_grad_norm=1.0)
    tokens = torch.randint(0, 1000, (1, args.tokens), device=device)

    def forward() -> None:
        with torch.no_grad():
            engine(input_ids=tokens)

    def both() -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.zero_grad()  # the next pass sums nothing: gradients leave and none comes back

    alone, duplex = link(device, up=True, down=False), link(device, up=True, down=True)
    weights, all_of_it = moved(engine, forward, args.passes), moved(engine, both, args.passes)
    rest = Moved(*(b - a for a, b in zip(weights, all_of_it, strict=True)))
    rows = [row_of("forward", weights, alone), row_of("backward", rest, duplex)]
    for row in rows:
        print(row)
    engine.close()
    print(save("links", rows, tokens=args.tokens, passes=args.passes, copy_bytes=COPY_BYTES))


if __name__ == "__main__":
    main()
