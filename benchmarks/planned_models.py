"""The trainings that the planner's benchmark plans: six architectures, from configurations; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.building import QuickValues
from benchmarks.common import llama_config
from memplan.rates import Rates
from profiler.profile import ModelProfile
from profiler.run import profile_model


@dataclass(frozen=True)
class Model:
    """One training to plan."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]
    batch_size: int


def _text(length: int, vocabulary: int) -> Callable[[int], dict[str, torch.Tensor]]:
    def batch(size: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, vocabulary, (size, length))
        return {"input_ids": ids, "labels": ids}

    return batch


def _pictures(size: int) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda batch: {"pixel_values": torch.rand(batch, 3, size, size), "labels": torch.randint(0, 1000, (batch,))}


def models() -> list[Model]:
    """Six architectures of transformers of 0.2e9 to 0.6e9 parameters; nothing is downloaded.

    Batches are so large that an ample GPU computes most of the time: with a quarter and less of them a step is what the
    CPU takes to issue it, which is another time an hour later.
    """
    import transformers as t

    llama = llama_config((1536, 20, 12, 4, 4096, 32000), use_cache=False, attn_implementation="sdpa")
    gpt2 = t.GPT2Config(n_embd=1024, n_layer=24, n_head=16, use_cache=False)
    bert = t.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    vit = t.ViTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=1000
    )
    t5 = t.T5Config(
        d_model=768, num_layers=12, num_heads=12, d_ff=3072, d_kv=64, use_cache=False, decoder_start_token_id=0
    )
    convnext = t.ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536], num_labels=1000)
    return [
        Model("llama 0.5e9", lambda: t.LlamaForCausalLM(llama), _text(1024, 32000), 32),
        Model("gpt2 0.35e9", lambda: t.GPT2LMHeadModel(gpt2), _text(512, 50257), 32),
        Model("bert 0.34e9", lambda: t.BertForMaskedLM(bert), _text(256, 30522), 128),
        Model("vit 0.3e9", lambda: t.ViTForImageClassification(vit), _pictures(224), 128),
        Model("t5 0.25e9", lambda: t.T5ForConditionalGeneration(t5), _text(256, 32128), 128),
        Model("convnext 0.2e9", lambda: t.ConvNextForImageClassification(convnext), _pictures(224), 128),
    ]


def model_named(name: str) -> Model:
    """One of them."""
    return next(model for model in models() if model.name == name)


def chosen_models(words: list[str]) -> list[Model]:
    """Those whose names hold one of the words, or all."""
    return [model for model in models() if not words or any(word in model.name for word in words)]


def build(model: Model) -> nn.Module:
    """On the CPU, the same values every time."""
    torch.manual_seed(0)
    with QuickValues():
        return model.build().train()


def profiled(model: Model, rates: Rates, batch_size: int) -> ModelProfile:
    """Of a batch of this size."""
    network = build(model)
    return profile_model(network, model.batch(batch_size), precision="bf16", device="H200", calibration=rates.kernels)
