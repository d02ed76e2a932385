"""A few steps of DeepSpeed by a configuration that memplan emitted, and what they took.

    python -m benchmarks.emitted_training PLAN_DIRECTORY 3b

Writes ``result.json`` beside the plan. The optimizer and the recompute are this script's, as ``NOTES.md`` beside the
configuration asks for.
"""

import argparse
import gc
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import LLAMAS, HostPeak, llama_config
from offload.plan import Plan

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ENVIRONMENT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def shape_of(size: str, length: int) -> Any:
    """The Llama's configuration, as for plan and for training."""
    return llama_config(
        LLAMAS[size],
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
        max_position_embeddings=length,
        architectures=["LlamaForCausalLM"],
    )


def model_of(size: str, length: int, config: dict[str, Any], device: str) -> Any:
    """In bf16: partitioned as it is built in stage 3, else in host memory, as scripts build it."""
    import deepspeed
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    if config["zero_optimization"]["stage"] == 3:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = LlamaForCausalLM(shape_of(size, length))
    else:
        with torch.device(device):  # where first values are made in a hundredth of the time
            model = LlamaForCausalLM(shape_of(size, length))
        model.to("cpu")
    torch.set_default_dtype(torch.float32)
    if device == "cuda" and config["zero_optimization"]["stage"] != 3:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model.train()


def train(out: Path, size: str, steps: int, length: int) -> dict[str, Any]:
    """A few steps by the emitted configuration."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    plan = Plan.load(out / "plan.json")
    config = json.loads((out / "ds_config.json").read_text())
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.budget.gpu_bytes / total))
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    torch.zeros(1, device=device)
    peak = HostPeak()
    peak.start()
    begun = time.perf_counter()
    model = model_of(size, length, config, device)
    if plan.recompute:
        assert len(plan.recompute) == LLAMAS[size][1], "Hugging Face's models recompute all blocks or none"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        optimizer: Any = DeepSpeedCPUAdam(model.parameters(), adamw_mode=True, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attached = time.perf_counter() - begun
    print(f"attached in {attached:.1f} s", flush=True)
    data = torch.randint(0, 1000, (steps, plan.micro_batch_size, length), device=device)
    seconds, losses = [], []
    for tokens in data:
        begun = time.perf_counter()
        for _ in range(plan.gradient_accumulation_steps):
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
        losses.append(round(float(loss.detach()), 4))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - begun, 4))
        print(f"step of {seconds[-1]} s, loss {losses[-1]}", flush=True)
    pinned = torch.cuda.host_memory_stats() if cuda else {}
    return {
        "seconds": seconds,
        "losses": losses,
        "attach_seconds": round(attached, 2),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "gpu_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "resident_bytes": peak.resident_bytes,
        "begun_resident_bytes": peak.begun_bytes,
        "used_bytes": peak.used_bytes,
        "pinned_bytes": pinned.get("allocated_bytes.peak"),
        "pinned": {name: value for name, value in pinned.items() if name.endswith(("peak", "current", "total"))},
        "deepspeed": deepspeed.__version__,
    }


def main() -> None:
    """Train, and write the result or what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="the directory of a plan")
    parser.add_argument("size", choices=LLAMAS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = train(args.plan, args.size, args.steps, args.length)
    except Exception:  # noqa: BLE001 - a row of the result
        found = {"failed": traceback.format_exc()[-2000:]}
    (args.plan / "result.json").write_text(json.dumps(found))
    os._exit(0)  # DeepSpeed's threads can hang at an ordinary exit


if __name__ == "__main__":
    main()
