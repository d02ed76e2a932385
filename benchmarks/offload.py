"""One training step through the tiers beside plain PyTorch with everything on the device, and beside the peers.

    python -m benchmarks.offload --model 3b --systems plain host host-shared deepspeed fsdp2 --nvme DIR
    python -m benchmarks.offload --model 3b --systems plain host-ahead plain,clip=0 host-ahead,clip=0,update_gb=7

Every system trains the same Llama on the same tokens: see ``benchmarks.systems``. Each runs in a process of its own,
warmed up and timed for some steps, and the whole round is repeated, so that the systems alternate. Behind its name a
system can have options of its own. A row gives the median step and its ratio to the median of plain PyTorch with the
same batch and clipping.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import HostPeak, save
from benchmarks.systems import SYSTEMS, one_process, warm_up_steps

GB = 1e9
COMPARED = ("batch", "accumulation", "length", "clip")
"""Options that plain PyTorch must have, too, to be compared with."""


def options_of(args: argparse.Namespace, asked: str) -> tuple[str, argparse.Namespace]:
    """The name of a system, and all options with those that stand behind it."""
    name, *changes = asked.split(",")
    if name not in SYSTEMS:
        raise SystemExit(f"{name} is no system; there are {', '.join(SYSTEMS)}")
    own = copy.copy(args)
    for change in changes:
        key, _, value = change.partition("=")
        if key not in vars(args):
            raise SystemExit(f"{asked}: {key} is no option")
        setattr(own, key, type(getattr(args, key))(value))
    return name, own


def measure(args: argparse.Namespace, asked: str) -> dict[str, Any]:
    """Seconds of each timed step, losses, and the peaks of device and host."""
    name, args = options_of(args, asked)
    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = True
    if cuda and args.gpu_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gpu_gb * GB / total))
    one_process()
    begun = time.perf_counter()
    step = SYSTEMS[name](args)
    attach_seconds = time.perf_counter() - begun
    host = HostPeak()
    host.start()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(1)
    warm_up = warm_up_steps(args, SYSTEMS[name])
    shape = (warm_up + args.steps, args.batch * args.accumulation, args.length)
    data = torch.randint(0, 1000, shape, generator=generator).to("cuda" if cuda else "cpu")
    seconds, losses = [], []
    for tokens in data:
        begun = time.perf_counter()
        losses.append(round(step(tokens).item(), 4))
        seconds.append(time.perf_counter() - begun)
    return {
        "attach_seconds": round(attach_seconds, 1),
        "seconds": [round(s, 4) for s in seconds[warm_up:]],
        "losses": losses,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "host_bytes": host.resident_bytes,
    }


def in_child(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The same in a process of its own: what a peer leaves behind, or fails with, stays there."""
    with tempfile.TemporaryDirectory() as directory:
        result, log = Path(directory) / "result.json", Path(directory) / "log"
        command = [sys.executable, "-m", "benchmarks.offload", *sys.argv[1:], "--child", name, "--result", str(result)]
        with log.open("wb") as out:
            try:
                subprocess.run(command, stdout=out, stderr=out, timeout=args.seconds, check=False)
            except subprocess.TimeoutExpired:
                return {"failed": f"took more than {args.seconds} s"}
        if result.exists():
            found: dict[str, Any] = json.loads(result.read_text())
            return found
        return {"failed": log.read_text(errors="replace")[-300:]}


def row_of(name: str, each: list[dict[str, Any]], plain_seconds: float | None) -> dict[str, Any]:
    """One system over all rounds."""
    done = [run for run in each if "seconds" in run]
    if not done:
        return {"system": name, "failed": each[0].get("failed")}
    median = statistics.median(s for run in done for s in run["seconds"])
    return {
        "system": name,
        "step_seconds": round(median, 4),
        "ratio_to_plain": round(median / plain_seconds, 3) if plain_seconds else None,
        "gpu_peak_bytes": done[0]["gpu_peak_bytes"],
        "host_bytes": max(run["host_bytes"] for run in done),
        "attach_seconds": done[0]["attach_seconds"],
        "losses": done[0]["losses"],
        "rounds": [run.get("seconds", run.get("failed")) for run in each],
    }


def rows_of(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The systems that have run."""
    plain: dict[tuple[Any, ...], float] = {}
    rows = []
    for asked, each in runs.items():
        if each:
            name, own = options_of(args, asked)
            alike = tuple(getattr(own, key) for key in COMPARED)
            if name == "plain":
                plain[alike] = row_of(asked, each, None).get("step_seconds", 0.0)
            rows.append(row_of(asked, each, plain.get(alike)))
    return rows


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    if "failed" in row:
        return f"{row['system']:48} failed: {row['failed']}"
    gpu = f"GPU {row['gpu_peak_bytes'] / GB:5.1f} GB" if row["gpu_peak_bytes"] else ""
    ratio = f"{row['ratio_to_plain']:5.2f} x" if row["ratio_to_plain"] else ""
    host = f"host {row['host_bytes'] / GB:5.1f} GB"
    return f"{row['system']:48} {row['step_seconds']:7.3f} s {ratio} {gpu} {host} loss {row['losses'][-1]}"


def main() -> None:
    """Measure all systems in turn, print a table, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--clip", type=float, default=1.0, help="0 for none")
    parser.add_argument("--gpu-gb", type=float, default=0.0, help="the most that the allocator may hold; 0 for all")
    parser.add_argument("--update-gb", type=float, default=32.0, help="on the GPU, for state that comes in backward")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=150, help="after which one system is given up")
    parser.add_argument("--nvme", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--systems", nargs="*", default=["plain", "resident", "host", "host-shared"])
    parser.add_argument("--name", help="of the result; as the model where none is given")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        try:
            found = measure(args, args.child)
        except Exception as error:  # noqa: BLE001 - it becomes a row
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        args.result.write_text(json.dumps(found))
        os._exit(0)  # threads and process groups of peers can hang at an ordinary exit
    for asked in args.systems:
        options_of(args, asked)  # before an hour has passed
    facts = {
        name: getattr(args, name)
        for name in ("model", "batch", "accumulation", "length", "clip", "gpu_gb", "update_gb", "steps", "rounds")
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.systems}
    for _ in range(args.rounds):
        for name, each in runs.items():
            each.append(in_child(args, name))
            print(f"  {name}: {each[-1].get('seconds', each[-1].get('failed'))}", flush=True)
            save(f"offload-{args.name or args.model}", rows_of(args, runs), **facts)  # should the time end
    for row in rows_of(args, runs):
        print(line(row))


if __name__ == "__main__":
    main()
