"""DeepSpeed configurations run as ``memplan plan --engine deepspeed`` emits them: peaks beside the prediction.

    python -m benchmarks.emitted --register

Every case is planned by the command line from a Hugging Face ``config.json``, and its ``ds_config.json`` is trained by
DeepSpeed in a process of its own: see ``benchmarks.emitted_training``. The allocator may hold no more than the plan's
GPU budget.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import LLAMAS, RESULTS, save
from benchmarks.emitted_training import shape_of
from memplan.configs.torchrun import EXPANDABLE, SETTINGS
from memplan.machine import HOST_RESERVE_BYTES
from offload.plan import Plan

GIB = 1 << 30
SHOWN_CHARACTERS = 2000
"""Of the log of a case that failed."""
BUILD = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
REGISTER = ",pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
"""Page-locks the same bytes in less than a tenth of the time: threads touch them before the driver sees them."""


@dataclass(frozen=True)
class Case:
    """A model, and the memory that its plan may take."""

    size: str
    gpu_gib: float
    host_gib: float

    @classmethod
    def read(cls, text: str) -> "Case":
        """From MODEL:GPU:HOST."""
        size, gpu, host = text.split(":")
        if size not in LLAMAS:
            raise ValueError(f"{size} is none of {', '.join(LLAMAS)}")
        return cls(size, float(gpu), float(host))

    def __str__(self) -> str:
        return f"{self.size} in {self.gpu_gib:g} GiB"


CASES = (Case("1b", 30, 100), Case("1b", 20, 100), Case("1b", 12, 100), Case("3b", 24, 105), Case("3b", 70, 100))


def plan_case(case: Case, out: Path, args: argparse.Namespace) -> Plan:
    """By the command line, as a person would; for an H200 wherever this runs."""
    options = f"--seq {args.length} --batch-size {args.batch} --engine deepspeed --machine H200".split()
    # Given in full: a virtual machine can show little host memory until it is used.
    options += [f"--gpu-memory={case.gpu_gib:g}GiB", f"--host-memory={case.host_gib:g}GiB"]
    options += [f"--calibration={args.calibration}", "--out", str(out)]
    command = [sys.executable, "-m", "memplan", "plan", str(out / "model"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no plan: {(done.stderr or done.stdout)[-SHOWN_CHARACTERS:]}")
    return Plan.load(out / "plan.json")


def build_update() -> str:
    """DeepSpeed compiles its CPU Adam at the first use: here, so that no case's time holds it."""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BUILD], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"CPU Adam not built: {(done.stdout + done.stderr)[-SHOWN_CHARACTERS:]}"
    return f"CPU Adam built or found in {time.perf_counter() - begun:.0f} s"


def train_case(case: Case, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, as DeepSpeed leaves much behind."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.emitted_training", str(out), case.size]
    environment = {**os.environ, SETTINGS: EXPANDABLE + (REGISTER if args.register else "")}  # as launch.sh has it
    log = out / "log"
    with log.open("wb") as stream, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [*command, "--steps", str(args.steps), "--length", str(args.length)],
            timeout=args.seconds,
            stdout=stream,
            stderr=stream,
            env=environment,
            check=False,
        )
    result = out / "result.json"
    if result.exists():
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured
    return {"failed": log.read_text(errors="replace")[-SHOWN_CHARACTERS:]}


def row_of(case: Case, planning: "Future[Plan]", out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One case: planned, trained, both to be compared."""
    row: dict[str, Any] = {"model": case.size, "gpu_budget_bytes": int(case.gpu_gib * GIB)}
    try:
        plan = planning.result()
    except Exception as error:  # noqa: BLE001 - a row of the result
        return {**row, "plan": None, "measured": {"failed": f"{type(error).__name__}: {error}"}}
    p, last = plan.prediction, plan.placements[-1]
    return {
        **row,
        "plan": f"stage {plan.zero_stage}, {plan.micro_batch_size} x {plan.gradient_accumulation_steps}, recompute "
        f"{len(plan.recompute)}, {last.parameters}/{last.optimizer}, GPU's share of the update {plan.gpu_update_share}",
        "predicted": {
            "gpu_peak_bytes": p.gpu_peak_bytes,
            "gpu_upper_bytes": p.gpu_upper_bytes,
            "host_bytes": p.host_bytes,
            "host_upper_bytes": p.host_upper_bytes,
            "process_bytes": HOST_RESERVE_BYTES["cuda"],
            "pinned_bytes": p.pinned_bytes,
            "phases": p.phases,
            "seconds": p.step_seconds,
            "seconds_range": p.step_seconds_range,
        },
        "measured": train_case(case, out, args),
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    m = row["measured"]
    head = f"{row['model']} in {row['gpu_budget_bytes'] / GIB:g} GiB: {row['plan']}:"
    if "failed" in m:
        return f"{head} failed: {m['failed']}"
    p = row["predicted"]

    def gib(of: dict[str, Any], name: str) -> str:
        return f"{of[name] / GIB:.2f}" if of[name] is not None else "?"

    gpu = f"GPU allocated {gib(m, 'gpu_peak_bytes')} (reserved {gib(m, 'gpu_reserved_bytes')}) "
    gpu += f"of {gib(p, 'gpu_peak_bytes')}, at most {gib(p, 'gpu_upper_bytes')} GiB"
    most = p["host_upper_bytes"] + p["process_bytes"]
    host = f"host {gib(m, 'resident_bytes')}, at most {most / GIB:.2f} with the process's own"
    pinned = f"pinned {gib(m, 'pinned_bytes')} of {gib(p, 'pinned_bytes')}"
    # The first step allocates and traces.
    seconds = statistics.median(m["seconds"][1:] or m["seconds"])
    return f"{head} {gpu}; {host}; {pinned}; {seconds:.2f} s of {p['seconds']:.2f} {m['seconds']}"


def main() -> None:
    """Plan and train every case, print lines, save the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, default=RESULTS / "rates-h200.json")
    parser.add_argument("--cases", nargs="*", type=Case.read, default=CASES, help="MODEL:GPU:HOST, memory in GiB")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=150, help="after which a case is given up")
    parser.add_argument("--register", action="store_true", help="page-lock by registering, which is quicker")
    parser.add_argument("--name", default="emitted-deepspeed", help="of the result")
    parser.add_argument("--beside", type=int, default=0, help="other cases that train on this machine meanwhile: noted")
    parser.add_argument("--out", type=Path, help="a second place for the result")
    args = parser.parse_args()
    begun, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as directory:
        outs = [Path(directory) / str(i) for i in range(len(args.cases))]
        for case, out in zip(args.cases, outs, strict=True):  # not in threads: transformers imports as it goes
            (out / "model").mkdir(parents=True)
            shape_of(case.size, args.length).save_pretrained(out / "model")
        # All before the first is trained, or planning would take cores from the one that is timed.
        with ThreadPoolExecutor(len(outs) + 1) as pool:
            building = pool.submit(build_update)
            planning = [pool.submit(plan_case, c, out, args) for c, out in zip(args.cases, outs, strict=True)]
        print(f"{time.perf_counter() - begun:6.1f} s  planned; {building.result()}", flush=True)
        for case, future, out in zip(args.cases, planning, outs, strict=True):
            print(f"{time.perf_counter() - begun:6.1f} s  {case} ...", flush=True)
            rows.append(row_of(case, future, out, args))
            print(f"{time.perf_counter() - begun:6.1f} s  {line(rows[-1])}", flush=True)
            path = save(args.name, rows, batch=args.batch, length=args.length, steps=args.steps, beside=args.beside)
            if args.out is not None:
                shutil.copyfile(path, args.out)
    print(path)


if __name__ == "__main__":
    main()
