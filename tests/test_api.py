"""The library: three lines to plan, one to initialize, and the loop of DeepSpeed's users."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import memplan
from tests.models import GPT, batches

MIB = 1 << 20


def test_a_hugging_face_llama_is_profiled_planned_and_trained(tmp_path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 256, (4, 32))
    profile = memplan.profile(model, {"input_ids": tokens, "labels": tokens})
    here = memplan.detect(tmp_path)
    resident = memplan.plan(profile, here)
    machine = replace(here, gpu_bytes=resident.prediction.gpu_peak_bytes * 3 // 5, host_bytes=4 * MIB)
    plan = memplan.plan(profile, machine)
    assert any(p.optimizer != "gpu" for p in plan.placements)
    engine, optimizer, loader, scheduler = memplan.initialize(
        model,
        plan,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
        training_data=TensorDataset(tokens.repeat(8, 1)),
        max_grad_norm=1.0,
    )
    assert loader is not None
    losses = []
    with engine:
        for (batch,) in loader:
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    steps = len(losses) // plan.gradient_accumulation_steps
    assert scheduler.last_epoch == steps
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5 ** (steps // 2))


def test_an_optimizer_that_the_engine_does_not_know_is_refused() -> None:
    model = GPT()
    plan = memplan.plan(memplan.profile(model, (batches(1)[0],)))
    with pytest.raises(memplan.OffloadError, match="sgd, and the plan counts the state of adamw"):
        memplan.initialize(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_profile_in_a_precision_that_can_not_be_trained_is_refused() -> None:
    profile = memplan.profile(GPT(), (batches(1)[0],), precision="amp-fp16", device="H200", optimizer="lion")
    assert profile.step_seconds is not None
    with pytest.raises(memplan.PlanningError, match="amp-fp16; plans are made for one of fp32, amp, bf16"):
        memplan.plan(profile)
