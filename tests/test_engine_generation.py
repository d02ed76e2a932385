"""Evaluation and generation between steps: the model is called as always, wherever its weights are."""

import copy
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.plan import Placement, Plan
from offload.weights import WeightMover
from tests.models import GPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, N, plan_for

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 60}
PLACEMENTS = [(RESIDENT,), EVERY_TIER, ((G, G, H),), ((H, H, H),), ((N, H, N),)]
WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "use_cache": False},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": True},
]


def language_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, **SIZES)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=kind == "tied llama",
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config)


def plan_of(model: nn.Module, placements: tuple, nvme: Path) -> Plan:
    """Its blocks and the root unit, and embedding and head as units where they are not tied."""
    blocks = "transformer.h" if "GPT2" in type(model).__name__ else "model.layers"
    units = ["", *(f"{blocks}.{i}" for i in range(4))]
    units += ["model.embed_tokens", "lm_head"] * (not model.config.tie_word_embeddings)
    tiers = islice(cycle(placements), len(units))
    return replace(
        plan_for(GPT(), (RESIDENT,), nvme),
        parameter_shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        placements=tuple(Placement(u, *t) for u, t in zip(units, tiers, strict=True)),
    )


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
@pytest.mark.parametrize("placements", PLACEMENTS)
def test_generate_between_steps_says_what_it_says_without_the_engine(
    kind: str, placements: tuple, tmp_path: Path
) -> None:
    model = language_model(kind).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    with Engine(model, plan_of(model, placements, tmp_path), torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        for how in WAYS:
            tokens = torch.randint(1, 60, (2, 12), generator=generator)
            loss, expected = engine(input_ids=tokens, labels=tokens).loss, plain(input_ids=tokens, labels=tokens).loss
            assert loss.item() == expected.item()
            engine.backward(loss)
            engine.step()
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            said = []
            for m in (model, plain):
                torch.manual_seed(7)
                prompt = {"input_ids": tokens[:, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
                said.append(m.eval().generate(**prompt, max_new_tokens=8, **how))
                m.train()
            assert torch.equal(*said)
        assert engine.overflow_count == 0


@pytest.mark.parametrize("placements", PLACEMENTS)
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_the_model_and_its_parts_can_be_called_without_gradients(
    without: Any, placements: tuple, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = TiedGPT()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with Engine(model, plan_for(model, placements, tmp_path), torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        for tokens in batches(4):
            engine.backward(engine(tokens))
            engine.step()
            plain(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            with without():
                hidden = torch.randn(2, 3, 32)
                assert torch.equal(model.wte(tokens), plain.wte(tokens))  # of the root unit, outside of any pass
                assert torch.equal(model(tokens), plain(tokens))
                assert torch.equal(engine(tokens), plain(tokens))
                assert torch.equal(model.h[2](hidden), plain.h[2](hidden))
        assert engine.overflow_count == 0


@pytest.mark.parametrize("placements", PLACEMENTS)
@pytest.mark.parametrize("recompute", [(), ("h.0", "h.1", "h.2", "h.3")])
def test_an_evaluation_may_come_between_a_forward_and_its_backward(
    recompute: tuple, placements: tuple, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    plan = plan_for(model, placements, tmp_path, recompute=recompute)
    with Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        for tokens, others in zip(batches(5), batches(5, seed=3), strict=True):
            loss, expected = engine(tokens), plain(tokens)
            with torch.no_grad():
                assert torch.equal(model(others), plain(others))
            engine.backward(loss)
            engine.step()
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert loss.item() == expected.item()
        assert engine.overflow_count == 0


def test_while_it_generates_every_unit_is_fetched_ahead_of_its_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[str] = []
    free_slot = WeightMover._free_slot

    def counted(mover: WeightMover, state: Any) -> Any:
        late.append(state.unit.name)
        return free_slot(mover, state)

    monkeypatch.setattr(WeightMover, "_free_slot", counted)
    model = GPT()
    placements = (RESIDENT,) * 5 + ((H, H, H),) * 4
    with Engine(model, plan_for(model, placements, tmp_path)) as engine, torch.no_grad():
        for _ in range(2):
            model(batches(1)[0])
        late.clear()
        for _ in range(3):
            model(batches(1)[0])
        assert late == []
        assert engine.overflow_count == 0


def test_an_evaluation_that_fails_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    with Engine(model, plan_for(model, EVERY_TIER, tmp_path)) as engine, torch.no_grad():
        for call in (model, engine):
            with pytest.raises(IndexError):
                call(torch.full((2, 5), 99))
        with torch.enable_grad():
            engine.backward(engine(batches(1)[0]))
        assert torch.equal(model(batches(1)[0]), plain(batches(1)[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER])
def test_generate_on_a_gpu_says_what_it_says_without_the_engine(placements: tuple, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = language_model("llama")
    plain = copy.deepcopy(model).cuda()
    prompt = torch.randint(1, 60, (2, 5), device="cuda")
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    with Engine(model, replace(plan_of(model, placements, tmp_path), device="cuda")):
        for _ in range(3):
            assert torch.equal(model.generate(prompt, **how), plain.generate(prompt, **how))
