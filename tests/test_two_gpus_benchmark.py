"""What the benchmark of several GPUs decides before anything runs."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.common import LLAMAS, llama_config
from benchmarks.two_gpus import GB, cores_of, fewest_resident, held, ratios_of

OPTIONS = {"gpus": 2, "batch": 8, "length": 2048, "clip": 1.0, "update_gb": 20.0, "chunked": True, "accumulation": 1}


def options(model: str, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{**OPTIONS, "model": model, "nvme": Path("/nowhere"), "resident_layers": 0, **changes})


def test_as_many_layers_stay_on_the_gpus_as_the_host_has_no_room_for() -> None:
    args = options("20b", host_gb=100.0)
    args.resident_layers = fewest_resident(args)
    needed = held(args, "host")
    assert needed is not None
    assert needed.host_bytes <= 100 * GB
    args.resident_layers -= 1
    fewer = held(args, "host")
    assert fewer is not None
    assert fewer.host_bytes > 100 * GB


def test_the_20b_has_20e9_parameters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(LLAMAS["20b"], tie_word_embeddings=False))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(20e9, rel=0.01)


def test_a_small_model_needs_no_layer_on_the_gpus() -> None:
    assert fewest_resident(options("3b", host_gb=100.0)) == 0
    assert held(options("3b"), "deepspeed") is None


def test_processes_share_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(100, 106)))  # none of any node's
    assert cores_of(2) == [{100, 101, 102}, {103, 104, 105}]
    assert cores_of(1) == [set(range(100, 106))]


def test_ratios_are_of_what_ran() -> None:
    rows = [{"system": "host", "tokens_per_second": 30.0}, {"system": "host-one", "tokens_per_second": 15.0}]
    assert ratios_of([*rows, {"system": "deepspeed", "failed": "out of memory"}]) == {"host / host-one": 2.0}
