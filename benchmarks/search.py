"""How long the planner takes, how many candidates there were, and how many of them it had to price.

    python -m benchmarks.search

Machines are described, rates the reference, profiles made here: nothing runs. A candidate is a family (sharding,
micro-batch, recompute, loss) with a prefetch depth and any counts of ``memplan.memory.Counts``, whether it fits or not.
"""

import random
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.common import llama_config, save
from memplan import candidates
from memplan.candidates import PREFETCH_DEPTHS
from memplan.machine import Machine
from memplan.memory import Counts
from memplan.pipeline import step_seconds
from memplan.problem import Problem
from memplan.quick_rates import REFERENCE
from memplan.search import plan, problem_of
from memplan.spans import Times
from memplan.work import StepWork
from offload.plan import Buckets
from profiler import ModelProfile
from profiler.run import profile_source
from profiler.source import load_source

GPU_BYTES = (80 << 30) - 790_000_000
SEQUENCE = 2048
PRICED_AT_ONCE = 100_000
REPEATS = 2
SHAPES = {
    # hidden, layers, heads, key-value heads, ffn, vocabulary
    "llama 70b": (8192, 80, 64, 8, 28672, 128256),
    "400 layers": (2048, 400, 16, 8, 8192, 128256),
}
CASES = (
    # model, GPUs, nodes, samples of a step, host bytes of a node, NVMe bytes of a node
    ("llama 70b", 8, 1, 8, 1 << 40, 0),
    ("llama 70b", 8, 1, 64, 1 << 40, 0),
    ("llama 70b", 8, 1, 64, 256 << 30, 8 << 40),
    ("llama 70b", 32, 4, 256, 1 << 40, 0),
    ("400 layers", 1, 1, 8, 512 << 30, 0),
    ("400 layers", 1, 1, 8, 64 << 30, 2 << 40),
)


def main() -> None:
    """Time every case, print one line each, and save them."""
    profiles = {name: _profile(name) for name in SHAPES}
    rows = [_search(profiles[case[0]], *case) for case in CASES]
    rows.append(_price(profiles["llama 70b"]))
    print(save("search", rows, sequence=SEQUENCE, gpu_bytes=GPU_BYTES))


def _profile(name: str) -> ModelProfile:
    config = llama_config(SHAPES[name], tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        return profile_source(load_source(Path(directory) / "config.json", SEQUENCE), 2, "bf16", device="H100")


def _machine(gpus: int, nodes: int, host_bytes: int, nvme_bytes: int) -> Machine:
    return Machine(
        device="cuda",
        gpus=gpus,
        gpu_name="H100",
        gpu_bytes=GPU_BYTES,
        host_bytes=host_bytes,
        nvme_dir=Path("/swap") if nvme_bytes else None,
        nvme_bytes=nvme_bytes,
        memlock_bytes=None,
        cores=64,
        nodes=nodes,
        described=True,
    )


def _search(
    profile: ModelProfile, model: str, gpus: int, nodes: int, batch_size: int, host_bytes: int, nvme_bytes: int
) -> dict[str, Any]:
    """The fastest of a few searches, each from nothing."""
    machine = _machine(gpus, nodes, host_bytes, nvme_bytes)
    families = list(problem_of(profile, machine, REFERENCE, batch_size, None).families())
    units = len(problem_of(profile, machine, REFERENCE, batch_size, None).shapes)
    priced = 0

    def counting(work: StepWork, counts: Counts) -> Times:
        nonlocal priced
        priced += len(counts.state)
        return step_seconds(work, counts)

    seconds = []
    with mock.patch.object(candidates, "step_seconds", counting):
        for _ in range(REPEATS):
            priced, start = 0, time.perf_counter()
            found = plan(profile, machine, REFERENCE, batch_size=batch_size)
            seconds.append(time.perf_counter() - start)
    row = {
        "model": model,
        "gpus": gpus,
        "nodes": nodes,
        "batch_size": batch_size,
        "host_bytes": host_bytes,
        "nvme_bytes": nvme_bytes,
        "families": len(families),
        "candidates": len(families) * len(PREFETCH_DEPTHS) * every_count(units),
        "priced": priced,
        "seconds": round(min(seconds), 3),
        "slowest_seconds": round(max(seconds), 3),
        "step_seconds": found.prediction.step_seconds if found.prediction else None,
    }
    print(
        f"{model}, {gpus} GPUs on {nodes} nodes, batch {batch_size}, NVMe {nvme_bytes >> 40} TiB: {row['seconds']} s "
        f"(slowest {row['slowest_seconds']} s), {len(families)} families, {row['candidates']:.3g} candidates, "
        f"{priced} priced",
        flush=True,
    )
    return row


def every_count(units: int) -> int:
    """How many candidates there are in one family at one depth."""
    # Pairs of gradients and parameters for each count of state, then the state that may be on NVMe, then weights too.
    return sum((s + 1) ** 2 * (s + 1) + (s + 1) * s * (s + 1) // 2 for s in range(units + 1))


def _price(profile: ModelProfile) -> dict[str, Any]:
    """Pricing alone: so many candidates of one family, without bounds."""
    machine = _machine(8, 1, 1 << 40, 8 << 40)
    problem: Problem = problem_of(profile, machine, REFERENCE, 8, None)
    family = next(f for f in problem.families() if f.sharding.zero_stage == 3)
    work = problem.work(family, Buckets())
    r, n = random.Random(0), len(problem.shapes)
    drawn = []
    for _ in range(PRICED_AT_ONCE):
        state = r.randint(0, n)
        drawn.append((state, r.randint(0, state), r.randint(0, state), r.randint(0, state), 0))
    columns = np.array(drawn).T
    start = time.perf_counter()
    for first in range(0, PRICED_AT_ONCE, candidates.LARGEST_BATCH):
        step_seconds(work, Counts(*(column[first : first + candidates.LARGEST_BATCH] for column in columns)))
    seconds = time.perf_counter() - start
    print(f"{PRICED_AT_ONCE} candidates of {n} units priced one and all: {seconds:.2f} s", flush=True)
    return {"model": "llama 70b", "priced": PRICED_AT_ONCE, "units": n, "seconds": round(seconds, 3)}


if __name__ == "__main__":
    main()
