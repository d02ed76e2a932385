"""One training step over the GPUs of a machine, each engine in turn: memplan's, DeepSpeed's and FSDP2's.

    python -m benchmarks.two_gpus --model 3b --update-gb 28
    python -m benchmarks.two_gpus --model tiny --batch 2 --length 64    # on any computer, over gloo

Every system is a training of its own: a process for each GPU, started anew, on its own part of the node's cores. All
take the same tokens, ``--batch`` sequences a GPU. ``host-one`` is the engine on one of the GPUs with all that it would
get alone, so ``host`` beside it says what the second GPU brings. The result is saved after each system.
"""

import argparse
import faulthandler
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import LARGE, LLAMAS, HostPeak, llama_config, save
from benchmarks.offload import GB
from benchmarks.systems import SYSTEMS, System, Tiers, warm_up_steps, world_size
from memplan.host import numa_nodes
from offload.arena import mapped
from offload.ranks import CONNECTIONS
from offload.residency import Footprint, footprint
from offload.shards import Shards
from offload.unit import partition

ALONE = "host-one"
NAMES = ("fsdp2-resident", "resident", "host", ALONE, "deepspeed", "fsdp2-offloaded")
CHUNKS = 16
"""Pieces of the loss, with ``--chunked``."""
RATIOS = (("resident", "fsdp2-resident"), ("host", ALONE), ("host", "deepspeed"), ("host", "fsdp2-offloaded"))
LEAVING_SECONDS = 20.0
"""For which a process that has its result waits for the others: what it holds, they may still read."""
DUMP_SECONDS = 10
"""Before its time is over, a process that hangs writes where its threads are."""
LOG_CHARACTERS = 2500
FILLED_SHARE = 1.05
"""Of what the tiers need, host memory that must be seen as free before."""
PIECE_BYTES = 1 << 30


def tiers_of(args: argparse.Namespace, name: str) -> Tiers | None:
    """Where memplan's engine keeps the model in this system; None for another engine."""
    found = SYSTEMS.get({"host": "host-ahead", ALONE: "host-ahead"}.get(name, name))
    if not isinstance(found, Tiers):
        return None
    kept = (args.resident_layers or 0) / LLAMAS[args.model][1] if name != "resident" else 0.0
    return replace(found, resident=kept, loss_chunks=CHUNKS if args.chunked else 1)


def system_of(args: argparse.Namespace, name: str) -> System:
    """What trains."""
    return tiers_of(args, name) or SYSTEMS[{"fsdp2-offloaded": "fsdp2"}.get(name, name)]


# What a system takes, before it runs


def held(args: argparse.Namespace, name: str) -> Footprint | None:
    """What each process of a system holds from first step to last; None where another engine decides."""
    from transformers import LlamaForCausalLM

    if (tiers := tiers_of(args, name)) is None:
        return None
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(LLAMAS[args.model], tie_word_embeddings=args.model not in LARGE))
    world = processes_of(args, name)
    plan = replace(tiers.plan(args, model), gpus=world, zero_stage=3 if world > 1 else 0)
    shards = Shards.of(plan)
    units = partition(model, plan.placements, shards)
    shapes, placements = [u.shape for u in units], [u.placement for u in units]
    return footprint(shapes, placements, plan.buckets, plan.state_format, plan.gpu_update_share, shards)


def fewest_resident(args: argparse.Namespace) -> int:
    """Layers that must stay on the GPUs, so that each process of ``host`` finds room on the host."""
    layers = LLAMAS[args.model][1]
    for count in range(layers):
        needed = held(argparse.Namespace(**{**vars(args), "resident_layers": count}), "host")
        if needed is not None and needed.host_bytes <= args.host_gb * GB:
            return count
    return layers


def processes_of(args: argparse.Namespace, name: str) -> int:
    """Of a system: one for each of its GPUs."""
    return 1 if name == ALONE else args.gpus


def cores_of(world: int) -> list[set[int]]:
    """The cores of each of so many processes: those of one NUMA node before those of the next."""
    allowed = os.sched_getaffinity(0)
    near = [core for node in numa_nodes() for core in node.cores]
    cores = near if set(near) == allowed else sorted(allowed)
    size = max(1, len(cores) // world)
    return [set(cores[rank * size : (rank + 1) * size]) or allowed for rank in range(world)]


def fill(size_bytes: int) -> None:
    """Touch host memory: some virtual machines show little until it is used."""
    torch.set_num_threads(1)  # such a machine grows at its own pace
    memory = mapped(size_bytes)
    for start in range(0, size_bytes, PIECE_BYTES):
        memory[start : start + PIECE_BYTES].zero_()


def make_room(needed_bytes: int) -> float:
    """Have this machine show as much memory as the tiers need; the seconds that took."""
    if psutil.virtual_memory().available >= needed_bytes:
        return 0.0
    begun = time.perf_counter()
    # In a process of its own, so that all of it is free again.
    subprocess.run([sys.executable, "-m", "benchmarks.two_gpus", "--fill", str(needed_bytes)], check=False)
    return time.perf_counter() - begun


# In a process of a system


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Seconds until the first step and of each timed one, losses, and the peaks of device and host."""
    begun = time.perf_counter()
    cuda, rank, world = torch.cuda.is_available(), int(os.environ["RANK"]), world_size()
    if cuda:
        torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    host = HostPeak()
    host.start()
    system = system_of(args, name)
    step = system(args)
    attached = time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    warm_up = warm_up_steps(args, system)
    generator = torch.Generator().manual_seed(1)
    shape = (warm_up + args.steps, args.batch * world, args.length)
    data = torch.randint(0, 1000, shape, generator=generator).chunk(world, dim=1)[rank].to("cuda" if cuda else "cpu")
    seconds, losses = [], []
    for tokens in data:
        since = time.perf_counter()
        losses.append(step(tokens).item())
        seconds.append(time.perf_counter() - since)
        print(f"rank {rank}: step {len(losses)} took {seconds[-1]:.3f} s, loss {losses[-1]:.4f}", flush=True)
    return {
        "attach_seconds": round(attached - begun, 1),
        "first_step_seconds": round(seconds[0], 2),
        "seconds": [round(s, 4) for s in seconds[warm_up:]],
        "losses": losses,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "host_bytes": host.resident_bytes,
        "cores": len(os.sched_getaffinity(0)),
    }


def child(args: argparse.Namespace) -> None:
    """Measure on this process's own cores, leave the result, and go when the others have theirs."""
    os.sched_setaffinity(0, cores_of(world_size())[int(os.environ["RANK"])])
    faulthandler.dump_traceback_later(max(1, args.seconds - DUMP_SECONDS))
    try:
        found = measure(args, args.child)
    except Exception as error:  # noqa: BLE001 - it becomes a row
        traceback.print_exc()
        found = {"failed": f"rank {os.environ['RANK']}: {type(error).__name__}: {error}"[:LOG_CHARACTERS]}
    aside = args.result.with_suffix(".part")
    aside.write_text(json.dumps(found))
    aside.replace(args.result)
    others = [args.result.with_name(f"{rank}.json") for rank in range(world_size())]
    until = time.monotonic() + LEAVING_SECONDS
    while time.monotonic() < until and not all(path.exists() for path in others):
        time.sleep(0.05)
    os._exit(0)  # threads and process groups of peers can hang at an ordinary exit


# Beside them


def together(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """What each process of a system found, or one that says why there is nothing."""
    world = processes_of(args, name)
    threads = len(cores_of(world)[0])
    with tempfile.TemporaryDirectory() as directory, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        counts = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": str(threads)}
        environment = {**CONNECTIONS, **os.environ, **meeting, **counts}
        results = [Path(directory) / f"{rank}.json" for rank in range(world)]
        own = [*sys.argv[1:], "--resident-layers", str(args.resident_layers), "--child", name]
        processes = []
        for rank, result in enumerate(results):
            command = [sys.executable, "-m", "benchmarks.two_gpus", *own, "--result", str(result)]
            with result.with_suffix(".log").open("wb") as log:
                own_place = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                started = subprocess.Popen(command, stdout=log, stderr=log, env=own_place, start_new_session=True)
                processes.append(started)
        try:
            late = not _ended(processes, results, args.seconds)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and the compilers that it started
                process.wait()
        found = [json.loads(path.read_text()) for path in results if path.exists()]
        failed = [each for each in found if "failed" in each]
        if not failed and len(found) == world:
            return found
        logs = [path.with_suffix(".log").read_text(errors="replace")[-LOG_CHARACTERS:] for path in results]
        said = [f"took more than {args.seconds} s"] * late + [each["failed"] for each in failed]
        return [{"failed": "\n".join([*said, *(f"rank {rank} wrote: {log}" for rank, log in enumerate(logs))])}]


def _ended(processes: Sequence[subprocess.Popen[bytes]], results: Sequence[Path], seconds: float) -> bool:
    """Wait until all have ended, or one has failed; whether that was in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        codes = [process.poll() for process in processes]
        if None not in codes or any(code not in (None, 0) for code in codes):
            return True
        if any("failed" in json.loads(path.read_text()) for path in results if path.exists()):
            return True
        time.sleep(0.1)
    return False


def row_of(args: argparse.Namespace, name: str, each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One system: steps are those of the first process, losses the mean, memory of the host the sum."""
    needed = held(args, name)
    predicted = {"predicted_host_bytes": needed.host_bytes, "predicted_gpu_bytes": needed.gpu_bytes} if needed else {}
    row: dict[str, Any] = {"system": name, "gpus": processes_of(args, name), **predicted}
    if "failed" in each[0]:
        return row | each[0]
    median = statistics.median(each[0]["seconds"])
    tokens = args.batch * args.length * len(each)
    return row | {
        "step_seconds": round(median, 4),
        "tokens_per_second": round(tokens / median, 1),
        "attach_seconds": each[0]["attach_seconds"],
        "first_step_seconds": each[0]["first_step_seconds"],
        "gpu_peak_bytes": [found["gpu_peak_bytes"] for found in each],
        "host_bytes": sum(found["host_bytes"] for found in each),
        "cores": [found["cores"] for found in each],
        "losses": [round(statistics.mean(step), 4) for step in zip(*(f["losses"] for f in each), strict=True)],
        "seconds": each[0]["seconds"],
    }


def ratios_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Tokens a second of systems beside others, where both ran."""
    rates = {row["system"]: row["tokens_per_second"] for row in rows if "failed" not in row}
    return {f"{a} / {b}": round(rates[a] / rates[b], 3) for a, b in RATIOS if a in rates and b in rates}


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    if "failed" in row:
        return f"{row['system']:16} failed: {row['failed']}"
    peaks = [peak for peak in row["gpu_peak_bytes"] if peak]
    gpu = f"GPU {max(peaks) / GB:5.1f} GB" if peaks else ""
    rate = f"{row['gpus']} x {row['step_seconds']:7.3f} s {row['tokens_per_second']:9.0f} tokens/s"
    host = f"host {row['host_bytes'] / GB:5.1f} GB attached in {row['attach_seconds']:.0f} s"
    return f"{row['system']:16} {rate} {gpu} {host} loss {row['losses'][-1]}"


def main() -> None:
    """Measure all systems in turn, save after each, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="3b", choices=LLAMAS)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences a GPU")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--clip", type=float, default=1.0, help="0 for none")
    parser.add_argument("--update-gb", type=float, default=28.0, help="on each GPU, for state that comes in backward")
    parser.add_argument("--chunked", action="store_true", help=f"the engine's loss in {CHUNKS} pieces")
    parser.add_argument("--host-gb", type=float, default=100.0, help="of each process of host, for model and state")
    parser.add_argument("--resident-layers", type=int, help="of host; the fewest that --host-gb allows if not given")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=3, help="steps, behind those in which a share settles")
    parser.add_argument("--seconds", type=int, default=150, help="after which one system is given up")
    parser.add_argument("--systems", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--name", help="of the result; as the model where none is given")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(accumulation=1, nvme=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    if args.fill is not None:
        fill(args.fill)
        return
    if args.child is not None:
        child(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes of a system end too
    if args.resident_layers is None:
        args.resident_layers = fewest_resident(args)
    needs = [(needed.host_bytes * processes_of(args, n)) for n in args.systems if (needed := held(args, n))]
    filled = make_room(round(FILLED_SHARE * max(needs, default=0)))
    said = ("model", "gpus", "batch", "length", "clip", "update_gb", "chunked", "resident_layers", "steps", "warm_up")
    facts = {name: getattr(args, name) for name in said} | {"fill_seconds": round(filled, 1)}
    print(json.dumps(facts), flush=True)
    rows: list[dict[str, Any]] = []
    for name in args.systems:
        rows.append(row_of(args, name, together(args, name)))
        print(json.dumps(rows[-1]), flush=True)
        path = save(f"two-gpus-{args.name or args.model}", rows, **facts, ratios=ratios_of(rows))
    for row in rows:
        print(line(row))
    for what, ratio in ratios_of(rows).items():
        print(f"{what}: {ratio}")
    print(path)


if __name__ == "__main__":
    main()
