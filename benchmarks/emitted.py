"""DeepSpeed configurations run as ``memplan plan --engine deepspeed`` emits them: peaks beside the prediction.

    python -m benchmarks.emitted --calibration calibration.json

Every case is planned by the command line from a Hugging Face ``config.json``, and its ``ds_config.json`` is trained by
DeepSpeed in a process of its own. The optimizer and the recompute are this script's, as ``NOTES.md`` beside the
configuration asks for. The allocator may hold no more than the plan's GPU budget.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import LLAMAS, llama_config, save
from offload.plan import Plan

GIB = 1 << 30
BATCH, LENGTH, STEPS = 8, 2048, 3
CASES = (("1b", 30, 100), ("1b", 20, 100), ("1b", 12, 100), ("3b", 24, 105), ("3b", 70, 100))
"""Model, GiB of GPU memory, GiB of host memory."""
ENVIRONMENT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def shape_of(size: str) -> Any:
    """The Llama's configuration, as for plan and for training."""
    return llama_config(
        LLAMAS[size],
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
        max_position_embeddings=LENGTH,
        architectures=["LlamaForCausalLM"],
    )


class HostPeak(threading.Thread):
    """The most that was taken of the host's available memory since the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._first = psutil.virtual_memory().available
        self.taken_bytes = 0

    def run(self) -> None:
        """Look again and again."""
        while True:
            self.taken_bytes = max(self.taken_bytes, self._first - psutil.virtual_memory().available)
            time.sleep(0.02)


def plan_case(size: str, gpu_gib: int, host_gib: int, calibration: Path, out: Path) -> Plan:
    """By the command line, as a person would."""
    model = out / "model"
    model.mkdir(parents=True)
    shape_of(size).save_pretrained(model)
    options = f"--seq {LENGTH} --batch-size {BATCH} --engine deepspeed --machine H200".split()
    options += [f"--gpu-memory={gpu_gib}GiB", f"--host-memory={host_gib}GiB", f"--calibration={calibration}"]
    command = [sys.executable, "-m", "memplan", "plan", str(model), *options, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Plan.load(out / "plan.json")


def train(out: Path, size: str) -> dict[str, Any]:
    """A few steps by the emitted configuration."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from transformers import LlamaForCausalLM

    plan = Plan.load(out / "plan.json")
    config = json.loads((out / "ds_config.json").read_text())
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, plan.budget.gpu_bytes / total))
    peak = HostPeak()
    peak.start()
    deepspeed.init_distributed("nccl", verbose=False)
    sharded = config["zero_optimization"]["stage"] == 3
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with deepspeed.zero.Init(config_dict_or_path=config) if sharded else torch.device("cuda"):
        model = LlamaForCausalLM(shape_of(size)).train()
    torch.set_default_dtype(torch.float32)
    if plan.recompute:
        assert len(plan.recompute) == LLAMAS[size][1], "Hugging Face's models recompute all blocks or none"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rates: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        optimizer: Any = DeepSpeedCPUAdam(model.parameters(), adamw_mode=True, **rates)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **rates)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    data = torch.randint(0, 1000, (STEPS, plan.micro_batch_size, LENGTH), device="cuda")
    seconds = []
    for tokens in data:
        begun = time.perf_counter()
        for _ in range(plan.gradient_accumulation_steps):
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - begun, 4))
    return {
        "seconds": seconds,
        "loss": float(loss.detach()),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
        "gpu_reserved_bytes": torch.cuda.max_memory_reserved(),
        "host_bytes": peak.taken_bytes,
        "deepspeed": deepspeed.__version__,
    }


def row_of(case: tuple[str, int, int], calibration: Path) -> dict[str, Any]:
    """One case: planned, trained in a process of its own, compared."""
    size, gpu_gib, host_gib = case
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "plan"
        plan = plan_case(size, gpu_gib, host_gib, calibration, out)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.emitted", "--train", str(out), "--model", size]
        with (out / "log").open("wb") as log, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=150, stdout=log, stderr=log, check=False)
        result = out / "result.json"
        last = (out / "log").read_text(errors="replace")[-400:]
        measured = json.loads(result.read_text()) if result.exists() else {"failed": last}
    p = plan.prediction
    tiers = f"{plan.placements[-1].parameters}/{plan.placements[-1].optimizer}"
    predicted = {"gpu_peak_bytes": p.gpu_peak_bytes, "gpu_upper_bytes": p.gpu_upper_bytes, "host_bytes": p.host_bytes}
    return {
        "model": size,
        "gpu_budget_bytes": plan.budget.gpu_bytes,
        "plan": f"stage {plan.zero_stage}, {plan.micro_batch_size} x {plan.gradient_accumulation_steps}, recompute "
        f"{len(plan.recompute)}, {tiers}, GPU's share of the update {plan.gpu_update_share}",
        "predicted": {**predicted, "seconds": p.step_seconds},
        "measured": measured,
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    p, m = row["predicted"], row["measured"]
    head = f"{row['model']} in {row['gpu_budget_bytes'] / GIB:.0f} GiB: {row['plan']}:"
    if "gpu_peak_bytes" not in m:
        return f"{head} {m}"
    gpu, upper, predicted = (n / GIB for n in (m["gpu_peak_bytes"], p["gpu_upper_bytes"], p["gpu_peak_bytes"]))
    host = f"host {m['host_bytes'] / GIB:.1f} of {p['host_bytes'] / GIB:.1f}"
    seconds = f"{m['seconds']} of {p['seconds']:.2f} s"
    return f"{head} GPU {gpu:.2f} of {predicted:.2f}, at most {upper:.2f} GiB; {host}; {seconds}"


def main() -> None:
    """Plan and train every case, print lines, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--train", type=Path, help="the directory of a plan: what a process of its own does")
    parser.add_argument("--model", default="1b")
    args = parser.parse_args()
    if args.train is not None:
        os.environ.update(ENVIRONMENT)
        try:
            found = train(args.train, args.model)
        except Exception as error:  # noqa: BLE001 - a row of the result
            found = {"failed": f"{type(error).__name__}: {error}"[:400]}
        (args.train / "result.json").write_text(json.dumps(found))
        os._exit(0)  # DeepSpeed's threads can hang at an ordinary exit
    rows = []
    for case in CASES:
        rows.append(row_of(case, args.calibration.resolve()))
        print(line(rows[-1]), flush=True)
    print(save("emitted-deepspeed", rows))


if __name__ == "__main__":
    main()
