"""The update on the host by one thread, with moments in fp32, bf16 and 8 bits: compiled, and in torch's operations.

    python -m benchmarks.host_update

In nanoseconds of the thread's own time an element: other work on the same cores counts only by what it takes of memory
and caches. Ways of one optimizer and precision take turns, and a row is its median; the numbers are more than the
caches hold. "widened" is the compiled update of fp32 moments, between torch's operations that widen others and
round them: what is used where the compiled pass does not agree with it.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.common import save
from offload.arithmetic import HOWS
from offload.moments import over_moments
from offload.native import native_update
from offload.optimizer import UpdateSpan, update_in_torch
from offload.plan import MomentFormat, OptimizerKind, Precision, StateFormat
from offload.residency import state_bytes
from offload.state import OptimizerState, carve_state, weight_dtype

WIDE = MomentFormat.FP32
CLIP = 0.7


def processor() -> str:
    """What the kernel calls it, and whether it permutes bytes, which the compiled pass over 8 bits makes use of."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in lines.items()}
    name = f"{known['model name']} family {known['cpu family']} model {known['model']}"
    return name + (", AVX-512 VBMI" if "avx512vbmi" in known["flags"].split() else "")


def numbers(form: StateFormat, elements: int) -> tuple[torch.Tensor, torch.Tensor, OptimizerState]:
    """Weights, gradients, and a state of zeros."""
    state = carve_state(torch.zeros(state_bytes(elements, form), dtype=torch.uint8), elements, form)
    weight, gradient = (torch.randn(elements).to(weight_dtype(form.precision)) for _ in range(2))
    return weight, gradient, state


def ways(compiled: UpdateSpan) -> dict[tuple[str, MomentFormat], UpdateSpan]:
    """By name and format of moments."""
    found: dict[tuple[str, MomentFormat], UpdateSpan] = {}
    for moments in MomentFormat:
        found["compiled", moments] = compiled
        if moments is not WIDE:
            found["widened", moments] = over_moments(compiled)
        found["torch", moments] = update_in_torch if moments is WIDE else over_moments(update_in_torch)
    return found


def main() -> None:
    """Measure all ways in turn, print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    compiled = native_update()
    if compiled is None:
        parser.error("there is no C compiler")
    rows = []
    for optimizer in (OptimizerKind.ADAMW, OptimizerKind.LION):
        for precision in (Precision.BF16, Precision.FP32):
            tried = ways(compiled)
            inputs = {m: numbers(StateFormat(precision, optimizer, m), args.elements) for m in MomentFormat}
            took: dict[tuple[str, MomentFormat], list[float]] = {key: [] for key in tried}
            for _ in range(args.rounds + 1):
                for key, update in tried.items():
                    begun = time.thread_time()
                    update(*inputs[key[1]], HOWS[optimizer], CLIP)
                    took[key].append((time.thread_time() - begun) * 1e9 / args.elements)
            for (way, moments), found in took.items():
                rows.append(
                    {
                        "optimizer": str(optimizer),
                        "precision": str(precision),
                        "moments": str(moments),
                        "way": way,
                        "nanoseconds": round(statistics.median(found[1:]), 3),  # the first one meets new pages
                    }
                )
                print(rows[-1], flush=True)
    print(save("host-update", rows, processor=processor(), threads=1, elements=args.elements, rounds=args.rounds))


if __name__ == "__main__":
    main()
