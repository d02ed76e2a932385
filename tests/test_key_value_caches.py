"""Models of transformers as they come, with a key-value cache that every block appends to, in training."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from memplan.activations import Way
from memplan.api import plan as planned
from memplan.search import problem_of
from offload.engine import Engine
from offload.plan import OptimizerKind, Precision
from profiler.run import profile_model
from tests.plans import H, plan_for
from tests.synthetic_profiles import RATES, machine_of, transformer

transformers = pytest.importorskip("transformers")

BLOCKS = 4
SIZES = {"n_layer": BLOCKS, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
Batch = dict[str, Any]
Made = tuple[nn.Module, Batch]


def padded(vocabulary: int) -> Batch:
    tokens = torch.randint(3, vocabulary, (4, 12))
    mask = torch.ones_like(tokens)
    mask[1, -3:] = 0
    return {"input_ids": tokens, "labels": tokens, "attention_mask": mask}


def gpt2(attention: str, **changes: Any) -> Made:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, bos_token_id=1, eos_token_id=2, **SIZES, **changes)
    config._attn_implementation = attention
    return transformers.GPT2LMHeadModel(config), padded(97)


def imagegpt(attention: str, **changes: Any) -> Made:
    config = transformers.ImageGPTConfig(vocab_size=97, n_embd=32, **SIZES, **changes)
    config._attn_implementation = attention
    batch = padded(96)
    del batch["attention_mask"]  # its eager attention has a causal one of a fixed size
    return transformers.ImageGPTForCausalImageModeling(config), batch


def decisions(attention: str, **changes: Any) -> Made:
    sizes = {"state_dim": 3, "act_dim": 2, "hidden_size": 32, "max_ep_len": 20, **SIZES}
    config = transformers.DecisionTransformerConfig(**sizes, **changes)
    config._attn_implementation = attention
    mask = torch.ones(4, 6)
    mask[1, :2] = 0
    batch = {"states": torch.randn(4, 6, 3), "actions": torch.randn(4, 6, 2), "rewards": torch.randn(4, 6, 1)}
    batch |= {"returns_to_go": torch.randn(4, 6, 1), "timesteps": torch.arange(6).expand(4, 6), "attention_mask": mask}
    return transformers.DecisionTransformerModel(config), batch


def llama(attention: str, **changes: Any) -> Made:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes, **changes)
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config), padded(97)


CASES: list[tuple[Callable[..., Made], str]] = [
    (gpt2, "sdpa"),
    (gpt2, "eager"),
    (imagegpt, "eager"),
    (decisions, "eager"),
    (llama, "sdpa"),
]
"""Only Llama gives its blocks the cache by name, the others by position."""


def loss_of(found: Any) -> torch.Tensor:
    return found.loss if "loss" in found else found.action_preds.square().mean()


def blocks_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if re.search(r"\.(h|layers)\.\d+$", name)]


def trains_as_plain_pytorch(model: nn.Module, plain: nn.Module, batch: Batch, recompute: list[str]) -> None:
    """What a block computes without a cache lies in memory otherwise, and is summed in another order."""
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plan = plan_for(model, ((H, H, H),), units=["", *blocks_of(model)], recompute=tuple(recompute))
    plan = replace(plan, optimizer=OptimizerKind.SGD)
    with Engine(model, plan, torch.optim.SGD(model.parameters(), lr=0.1)) as engine:
        for _ in range(3):
            expected, loss = loss_of(plain(**batch)), loss_of(engine(**batch))
            torch.testing.assert_close(loss, expected)
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(loss)
            engine.step()
        torch.testing.assert_close(dict(engine.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize(("make", "attention"), CASES)
@pytest.mark.parametrize("count", [1, BLOCKS])
def test_recomputed_blocks_of_a_model_with_a_cache_train_as_with_plain_pytorch(
    make: Callable[..., Made], attention: str, count: int
) -> None:
    torch.manual_seed(0)
    model, batch = make(attention)
    blocks = blocks_of(model)
    assert model.config.use_cache
    assert len(blocks) == BLOCKS
    trains_as_plain_pytorch(model, copy.deepcopy(model), batch, blocks[:count])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_block_behind_torch_compile_that_is_recomputed_gets_no_cache_either() -> None:
    torch.manual_seed(0)
    model, batch = gpt2("eager")
    plain = copy.deepcopy(model)
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = torch.compile(block, backend="eager")
    blocks = [f"transformer.h.{i}" for i in range(BLOCKS)]
    plan = plan_for(model, ((H, H, H),), units=["", *blocks], recompute=tuple(blocks))
    with Engine(model, plan, torch.optim.AdamW(model.parameters())) as engine:
        for _ in range(2):
            expected, loss = plain(**batch).loss, engine(**batch).loss
            engine.backward(loss)
            expected.backward()
            torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("make", "attention"), CASES)
def test_recomputed_blocks_are_profiled_as_they_are_without_a_cache(make: Callable[..., Made], attention: str) -> None:
    def points(**changes: Any) -> list[Any]:
        model, batch = make(attention, **changes)
        profile = profile_model(model, batch, loss=lambda found, _: loss_of(found))
        assert not [remark for remark in profile.assumptions if "left out" in remark]
        return [p for p in profile.activations if p.recompute]

    found, expected = points(), points(use_cache=False)
    assert len(found) > 2
    assert [p.allocated_bytes for p in found] == [p.allocated_bytes for p in expected]


def test_a_gpt2_as_it_comes_with_a_padded_mask_can_be_planned_with_all_blocks_recomputed() -> None:
    profile = profile_model(*gpt2("sdpa"))
    machine = machine_of(1 << 30, 1 << 30)
    assert planned(profile, machine, rates=RATES)
    ways = {f.way for f in problem_of(profile, machine, RATES, 4, Precision.FP32).families()}
    assert Way(4, BLOCKS) in ways


def test_a_way_that_could_not_be_traced_for_the_whole_batch_is_planned_for_less() -> None:
    profile = transformer(4)
    known = tuple(p for p in profile.activations if not p.recompute or p.batch_size == 1)
    assert len(known) < len(profile.activations)
    profile = replace(profile, activations=known)
    problem = problem_of(profile, machine_of(1 << 30, 1 << 30), RATES, 4, Precision.FP32)
    found = {(bool(f.way.recomputed_blocks), f.way.micro_batch_size) for f in problem.families()}
    assert found == {(False, 1), (False, 2), (False, 4), (True, 1)}
    assert not planned(profile, machine_of(1 << 30, 1 << 30), rates=RATES).recompute
