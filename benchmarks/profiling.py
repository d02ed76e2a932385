"""How long it takes to profile large decoders, and how much memory.

    python -m benchmarks.profiling

Each in a process of its own, from its first trace on: the imports beside torch, and the building of the
model, are told apart. Batch 1 of
4096 tokens for the 70e9-parameter shape, of 512 for the deep one; ``scaled`` changes batch and sequence afterwards.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.common import llama_config, save

SHAPES = {
    # hidden, layers, heads, key-value heads, ffn, vocabulary, tokens
    "70b, 80 layers": (8192, 80, 64, 8, 28672, 128256, 4096),
    "400 layers": (1024, 400, 16, 8, 4096, 32000, 512),
}
REPEATS = 3


def main() -> None:
    """Profile every shape a few times, print and save the medians' rows."""
    rows = []
    for name in SHAPES:
        found = [
            json.loads(subprocess.check_output([sys.executable, "-W", "ignore", "-m", __spec__.name, name]))
            for _ in range(REPEATS)
        ]
        rows.append({"model": name, **sorted(found, key=lambda row: row["profile_seconds"])[REPEATS // 2]})
        print(rows[-1], flush=True)
    print(save("profiling", rows))


def measure(name: str) -> dict[str, Any]:
    """Seconds of each part, and the largest resident size of the process."""
    began = time.perf_counter()
    from transformers import LlamaForCausalLM

    from profiler import profile_model

    imported = time.perf_counter()
    *shape, length = SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(tuple(shape)))
    tokens = torch.zeros(1, length, dtype=torch.long)
    built = time.perf_counter()
    profile = profile_model(model, {"input_ids": tokens, "labels": tokens}, precision="bf16")
    profiled = time.perf_counter()
    larger = profile.scaled(batch=2)
    scaled = time.perf_counter()
    longer = profile.scaled(seq=length // 2)
    rescaled = time.perf_counter()
    assert larger.forward_flops > profile.forward_flops > longer.forward_flops
    return {
        "parameters": profile.parameter_elements,
        "import_seconds": round(imported - began, 2),
        "build_seconds": round(built - imported, 2),
        "profile_seconds": round(profiled - built, 2),
        "scaled_batch_seconds": round(scaled - profiled, 2),
        "scaled_seq_seconds": round(rescaled - scaled, 2),
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
