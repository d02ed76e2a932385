"""The prediction beside the plain training loop on a CUDA device. Run with ``-s`` to see the figures."""

from functools import partial

import pytest
import torch
from torch import nn

from profiler import PRECISIONS, profile_model
from profiler.contract import loss_of
from profiler.measure import measure_step
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
OPTIMIZERS = ("adamw", "adamw-fused", "sgd-momentum")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_name", MODELS)
def test_predicted_peak_is_within_8_percent_of_the_device(model_name, precision, optimizer):
    model, batch, loss = MODELS[model_name]()
    predicted = profile_model(model, batch, loss=loss, precision=precision, optimizer=optimizer)
    actual = measure_step(model, batch, partial(loss_of, loss=loss), precision, optimizer, timed_steps=0)
    figures = {
        "backward": (predicted.peaks.backward_bytes, actual.steady_bytes["backward"]),
        "step": (predicted.peaks.step_bytes, actual.steady_bytes["step"]),
        "overall": (predicted.peaks.overall_bytes, actual.overall_bytes),
        "reserved": (predicted.peaks.reserved_bytes, actual.reserved_bytes),
    }
    print(f"\n{model_name} {precision} {optimizer}:", end="")
    for name, (guess, truth) in figures.items():
        print(f"  {name} {guess / MIB:.0f}/{truth / MIB:.0f} MiB ({guess / truth - 1:+.1%})", end="")
    print()
    guess, truth = figures["overall"]
    assert abs(guess - truth) <= 0.08 * truth
