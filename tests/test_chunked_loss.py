"""The loss in chunks is the plain loss: alone, and in an engine that moves the weights."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import memplan
from memplan.activations import ways_of
from memplan.train import TrainingOptions, prepare_run, train
from offload.chunked_loss import ChunkedCausalLoss, can_chunk, in_chunks
from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Placement, Plan
from profiler.profile import ModelProfile
from profiler.source import load_source
from tests.models import GPT
from tests.plans import EVERY_TIER, RESIDENT, H, N, plan_for

VOCABULARY, IGNORED = 61, -100
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "use_cache": False,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama, tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2),
    "qwen2": ("Qwen2", SIZES),
    "gemma2, logits capped": ("Gemma2", {**SIZES, "final_logit_softcapping": 3.0}),
    "cohere, logits scaled": ("Cohere", {**SIZES, "logit_scale": 0.3}),
    "granite, logits scaled": ("Granite", {**SIZES, "logits_scaling": 7.0}),
    "opt, projected": ("OPT", OPT),
}


def model_of(name: str) -> nn.Module:
    """A small model whose logits are large enough for a cap or a scale to show."""
    transformers = pytest.importorskip("transformers")
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    model: nn.Module = cls(getattr(transformers, f"{kind}Config")(**sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch_of(seed: int = 0, padded: bool = True) -> dict[str, torch.Tensor]:
    """Two sequences of 13 tokens, the second one shorter where padded."""
    tokens = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if padded:
        batch["attention_mask"] = torch.ones_like(tokens)
        batch["attention_mask"][1, 9:] = 0
        batch["labels"][1, 9:] = IGNORED
        batch["labels"][0, :3] = IGNORED
    return batch


def loss_and_gradients(model: nn.Module, call: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = call(**batch).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def assert_equal(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    # A small gradient can be what is left of large ones, and has their rounding.
    least = 1e-2 * torch.stack([gradient.norm() for gradient in expected[1].values()]).norm().item()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-6 * max(gradient.norm().item(), least), name


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_those_of_the_plain_model(name: str) -> None:
    model = model_of(name).eval()
    assert can_chunk(model) is None
    batch = batch_of()
    plain = loss_and_gradients(model, model, batch)
    assert_equal(loss_and_gradients(model, ChunkedCausalLoss(model, 4), batch), plain)  # of 26 tokens: 7, 7, 7, 5


@pytest.mark.parametrize("chunks", [1, 5, 26, 100])
def test_any_number_of_chunks_will_do(chunks: int) -> None:
    model, batch = model_of("llama"), batch_of()
    assert_equal(
        loss_and_gradients(model, ChunkedCausalLoss(model, chunks), batch), loss_and_gradients(model, model, batch)
    )


@pytest.mark.parametrize(
    "further",
    [
        {"num_items_in_batch": 40},
        {"num_items_in_batch": torch.tensor(40)},
        {"shift_labels": torch.arange(26).view(2, 13)},
        {"ignore_index": 7},
        {"use_cache": True},
    ],
    ids=str,
)
def test_what_the_plain_loss_is_told_the_chunks_are_told(further: dict[str, Any]) -> None:
    model, batch = model_of("gpt2").eval(), {**batch_of(padded=False), **further}
    assert_equal(loss_and_gradients(model, ChunkedCausalLoss(model, 3), batch), loss_and_gradients(model, model, batch))


def test_labels_by_position_and_a_tuple_as_output() -> None:
    model, batch = model_of("llama"), batch_of()
    order = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels")
    found = ChunkedCausalLoss(model, 3)(*(batch.get(name) for name in order))
    assert found.loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert found["loss"] is found[0] is found.loss
    assert found.logits is None
    assert type(found) is type(model(**batch))
    assert ChunkedCausalLoss(model, 3)(**batch, return_dict=False) == (found.loss,)


def test_without_labels_the_model_is_called_as_ever() -> None:
    model, batch = model_of("llama"), batch_of()
    del batch["labels"]
    assert torch.equal(ChunkedCausalLoss(model, 3)(**batch).logits, model(**batch).logits)


def test_the_model_is_left_as_it_was_and_its_hooks_are_called() -> None:
    model, calls = model_of("llama"), []
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    for module in (model.model, model.lm_head):
        module.register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    loss_and_gradients(model, ChunkedCausalLoss(model, 3), batch_of())
    assert calls[:4] == ["LlamaModel", "Linear", "Linear", "Linear"]
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before


def test_no_logits_are_larger_than_a_chunk() -> None:
    model, seen = model_of("llama"), []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.numel()))
    loss_and_gradients(model, ChunkedCausalLoss(model, 13), batch_of())
    assert max(seen) == 2 * VOCABULARY


class OwnLoss(nn.Module):
    base_model = get_decoder = get_output_embeddings = None

    @staticmethod
    def loss_function() -> None: ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def replaced() -> nn.Module:
    model = model_of("llama")
    model.forward = model.forward
    return model


def routed() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2, output_router_logits=True)
    with torch.device("meta"):
        return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (GPT, "GPT is not built as"),
        (OwnLoss, "the loss of OwnLoss is not"),
        (replaced, "was replaced"),
        (routed, "output_router_logits"),
    ],
)
def test_what_can_not_be_chunked_is_refused_with_the_reason(make: Any, why: str) -> None:
    model = make()
    assert why in str(can_chunk(model))
    assert in_chunks(model, 2) is None
    with pytest.raises(OffloadError, match=why):
        ChunkedCausalLoss(model, 2)


def test_a_loss_of_routers_asked_for_in_the_call_is_refused() -> None:
    model = model_of("llama")
    with pytest.raises(OffloadError, match="output_router_logits"):
        ChunkedCausalLoss(model, 2)(**batch_of(), output_router_logits=True)


def llama_plan(model: nn.Module, placements: tuple, nvme_dir: Path, **changes: Any) -> Plan:
    units = ("", "model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head")
    placed = tuple(Placement(u, *placements[i % len(placements)]) for i, u in enumerate(units))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    like = plan_for(GPT(), (RESIDENT,), nvme_dir, loss_chunks=3, **changes)
    return replace(like, parameter_shapes=shapes, placements=placed)


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
@pytest.mark.parametrize("placements", [EVERY_TIER, EVERY_TIER[3:], ((H, H, H),), ((N, H, N),)])
@pytest.mark.parametrize("recompute", [(), ("model.layers.0", "model.layers.1")])
def test_three_steps_in_chunks_through_every_tier_end_where_plain_adamw_does(
    name: str, placements: tuple, recompute: tuple[str, ...], tmp_path: Path
) -> None:
    model = model_of(name)
    plain = copy.deepcopy(model)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = llama_plan(model, placements, tmp_path, recompute=recompute)
    with Engine(model, plan, optimizer) as engine:
        for seed in range(3):
            loss = engine(**batch_of(seed)).loss
            engine.backward(loss)
            engine.step()
            expected = plain(**batch_of(seed)).loss
            expected.backward()
            reference.step()
            reference.zero_grad()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert engine.overflow_count == 0
        found = engine.state_dict()
    for parameter_name, parameter in plain.named_parameters():
        distance = (found[parameter_name] - parameter).norm() / parameter.norm()
        assert distance <= 1e-5, parameter_name


def test_an_engine_refuses_chunks_where_the_model_can_not_have_them() -> None:
    model = GPT()
    with pytest.raises(OffloadError, match="in chunks: GPT is not built"):
        Engine(model, plan_for(model, (RESIDENT,), loss_chunks=2))


def test_the_profile_has_points_in_chunks_with_lower_peaks_and_a_second_pass_of_the_head() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {**SIZES, "vocab_size": 4096, "num_hidden_layers": 5}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    tokens = torch.randint(0, 4096, (4, 32))
    profile = memplan.profile(model, {"input_ids": tokens, "labels": tokens}, precision="bf16")
    points = {(p.batch_size, p.recompute, p.loss_chunks): p for p in profile.activations}
    assert list(points)[:4] == [(4, False, 1), (4, True, 1), (1, False, 1), (1, True, 1)]
    assert set(points) == {(b, r, c) for b in (1, 2, 4) for r in (False, True) for c in (1, 8)}
    for (batch, recompute, chunks), point in points.items():
        if chunks == 1:
            continue
        plain = points[batch, recompute, 1]
        assert point.allocated_bytes < plain.allocated_bytes
        assert point.on_cpu_bytes < plain.on_cpu_bytes
        again = 2 * batch * 32 * 32 * 4096
        assert again < point.executed_flops - plain.executed_flops < 2 * again
    assert {chunks for _, _, chunks in ways_of(profile)} == {1, 8}
    assert ModelProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@pytest.mark.parametrize("why", ["small head", "no labels", "own loss"])
def test_there_are_no_points_in_chunks_where_they_would_tell_nothing(why: str) -> None:
    model, batch = model_of("llama"), batch_of(padded=False)
    if why == "no labels":
        del batch["labels"]
    loss = None if why == "small head" else lambda outputs, _: outputs.logits.float().square().mean()
    profile = memplan.profile(model, batch, loss=loss)
    assert {p.loss_chunks for p in profile.activations} == {1}
    assert any("in chunks is left out" in s for s in profile.assumptions) == (why == "own loss")


def test_a_plan_in_chunks_reaches_the_training_loop(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = load_source(tmp_path, 16)
    losses = {}
    for chunks in (1, 4):
        torch.manual_seed(0)
        plan = replace(llama_plan(source.build(), (RESIDENT,), tmp_path), loss_chunks=chunks, micro_batch_size=2)
        plan = replace(plan, prediction=replace(plan.prediction, gpu_peak_bytes=1 << 30, gpu_upper_bytes=1 << 30))
        options = TrainingOptions(2, 1e-2, 1.0, 0, resume=False, dashboard=False)
        run_dir = tmp_path / str(chunks)
        prepare_run(run_dir, resume=False)
        assert train(source, plan, run_dir, options, Console(quiet=True)) == 0
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        losses[chunks] = [e["loss"] for e in events if e["event"] == "step"]
    assert len(losses[1]) == 2
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)
