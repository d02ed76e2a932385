"""The prediction beside the plain training loop on a CUDA device. Run with ``-s`` to see the figures."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from profiler import PRECISIONS, profile_model
from profiler.events import BACKWARD, FORWARD, STEP
from tests.profiler_models import GPT, conv_net, mean_square, next_token_loss, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20


def _mlp():
    layers = [layer for _ in range(4) for layer in (nn.Linear(4096, 4096), nn.GELU())]
    return nn.Sequential(*layers), torch.randn(4096, 4096), mean_square


def _gpt():
    model = GPT(width=512, layers=4, heads=8, vocabulary=8192, dropout=0.1)
    return model, tokens(8, 512, 8192), next_token_loss


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=16384,
    )
    batch = tokens(4, 512, 16384)
    return LlamaForCausalLM(config), {"input_ids": batch, "labels": batch}, lambda outputs, _: outputs.loss


def _conv():
    return conv_net(width=64), torch.randn(32, 3, 128, 128), mean_square


MODELS = {"mlp": _mlp, "gpt": _gpt, "llama": _llama, "conv": _conv}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}


def _to_device(batch, dtype):
    if isinstance(batch, dict):
        return {name: _to_device(value, dtype) for name, value in batch.items()}
    return batch.to("cuda", dtype) if batch.is_floating_point() else batch.cuda()


def measure(model, batch, loss_fn, precision, optimizer):
    """Peak bytes by phase of the third step of the plain loop, and the bytes reserved by its end."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    base, base_reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = model.to(dtype).cuda().train()
    batch = _to_device(batch, dtype)
    update = OPTIMIZERS[optimizer](model.parameters())
    peaks = {}

    def phase(name):
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - base
        torch.cuda.reset_peak_memory_stats()

    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16) if precision == "amp" else nullcontext():
            loss = loss_fn(model(**batch) if isinstance(batch, dict) else model(batch), batch)
        phase(FORWARD)
        loss.backward()
        phase(BACKWARD)
        update.step()
        update.zero_grad()
        phase(STEP)
    return peaks, torch.cuda.memory_reserved() - base_reserved


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_name", MODELS)
def test_predicted_peak_is_within_8_percent_of_the_device(model_name, precision, optimizer):
    model, batch, loss = MODELS[model_name]()
    predicted = profile_model(model, batch, loss=loss, precision=precision, optimizer=optimizer)
    actual, reserved = measure(model, batch, loss, precision, optimizer)
    figures = {
        FORWARD: (predicted.peaks.forward_bytes, actual[FORWARD]),
        BACKWARD: (predicted.peaks.backward_bytes, actual[BACKWARD]),
        STEP: (predicted.peaks.step_bytes, actual[STEP]),
        "overall": (predicted.peaks.overall_bytes, max(actual.values())),
        "reserved": (predicted.peaks.reserved_bytes, reserved),
    }
    print(f"\n{model_name} {precision} {optimizer}:", end="")
    for name, (guess, truth) in figures.items():
        print(f"  {name} {guess / MIB:.0f}/{truth / MIB:.0f} MiB ({guess / truth - 1:+.1%})", end="")
    print()
    guess, truth = figures["overall"]
    assert abs(guess - truth) <= 0.08 * truth
