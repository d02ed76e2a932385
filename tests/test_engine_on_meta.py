"""A model that was built on meta starts from the numbers that its own initialisation gives."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memplan
from offload.engine import Engine
from offload.errors import OffloadError
from offload.on_meta import SMALL_BYTES, on_meta
from offload.plan import Precision
from tests.models import GPT, FrozenGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, H, plan_for
from tests.test_engine_odd_models import plan_of

AWAY = (H, H, H)
CONTEXTS = {"torch's": lambda: torch.device("meta"), "ours": on_meta}


def built(kind: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def started(model: nn.Module, plan: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the engine begins with, buffers that are not saved included."""
    torch.manual_seed(seed)
    with Engine(model, plan) as engine:
        return {**dict(model.named_buffers()), **engine.state_dict()}


def assert_equal(found: dict[str, torch.Tensor], expected: nn.Module) -> None:
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name], parameter), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(found[name], buffer), name


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("kind", [GPT, TiedGPT])
@pytest.mark.parametrize("shift", range(len(EVERY_TIER)))
def test_from_the_same_seed_it_has_the_numbers_of_a_real_one_in_every_placement(
    kind: type[GPT], precision: Precision, context: Any, shift: int, tmp_path: Path
) -> None:
    plain = built(kind)
    with context():
        model = built(kind)
    placements = EVERY_TIER[shift:] + EVERY_TIER[:shift]
    assert_equal(started(model, plan_for(model, placements, tmp_path, precision)), plain)
    assert not any(p.is_meta for p in model.parameters())


def test_it_trains_as_a_real_one_with_an_optimizer_made_before(tmp_path: Path) -> None:
    plain = built(FrozenGPT)
    with on_meta():
        model = built(FrozenGPT)
    losses = []
    for network in (plain, model):
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(0)
        with Engine(network, plan_for(network, EVERY_TIER, tmp_path), optimizer) as engine:
            assert [p for group in optimizer.param_groups for p in group["params"]] == [
                p for p in network.parameters() if p.requires_grad
            ]
            losses.append([])
            for tokens in batches(4):
                loss = engine(tokens)
                engine.backward(loss)
                engine.step()
                losses[-1].append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("placements", [(RESIDENT,), (AWAY,)])
def test_on_a_gpu_the_numbers_have_the_right_spread(placements: tuple) -> None:
    with on_meta():
        model = GPT(width=256)
    found = started(model, plan_for(model, placements, precision=Precision.BF16, device="cuda"))
    expected = GPT(width=256)
    for name, parameter in expected.named_parameters():
        if parameter.ndim > 1:
            assert found[name].std().item() == pytest.approx(parameter.std().item(), rel=0.05), name


class WithBuffers(nn.Module):
    """Batch norm, attention and a recurrent layer: each has its own way to begin."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.recurrent = nn.BatchNorm1d(8), nn.MultiheadAttention(8, 2), nn.GRU(8, 8)


def test_modules_of_pytorch_make_their_buffers_too() -> None:
    plain = built(WithBuffers)
    with torch.device("meta"):
        model = built(WithBuffers)
    assert_equal(started(model, plan_of(model, {"norm": AWAY, "attention": AWAY, "recurrent": AWAY})), plain)


class Initialised(GPT):
    """Initialises all its modules by one method, as many training scripts have it."""

    def __init__(self) -> None:
        super().__init__(width=64)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_a_model_that_initialises_its_modules_is_asked_to(context: Any) -> None:
    with context():
        model = Initialised()
    found = started(model, plan_for(model, (AWAY, RESIDENT)))
    for name, tensor in found.items():
        if "ln" not in name and tensor.ndim > 1:
            spread = 1.0 if name in ("wte.weight", "wpe.weight") else 0.02
            assert tensor.std().item() == pytest.approx(spread, rel=0.1), name
    assert found["h.0.up.bias"].abs().max() == 0
    assert torch.equal(found["ln_f.weight"], torch.ones(64))


class HeadFirst(GPT):
    """The embedding takes the head's weight, which is drawn otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.wte.weight = self.head.weight


def test_a_tied_parameter_begins_as_the_module_that_made_it_has_it() -> None:
    with on_meta():
        model = HeadFirst()
    found = started(model, plan_for(model, (AWAY,)))
    assert model.wte.weight is model.head.weight
    assert found["wte.weight"].abs().max().item() <= 32**-0.5


class Special(nn.Module):
    """Small parameters of its own, one of them twice, and a buffer that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.linspace(0, 1, 8))
        self.other = nn.Module()
        self.other.scale = self.scale
        self.register_buffer("frequencies", torch.arange(8.0), persistent=False)


def test_small_parameters_that_nobody_could_make_again_and_buffers_stay_real() -> None:
    with memplan.on_meta():
        model = Special()
        large = nn.Parameter(torch.empty(SMALL_BYTES // 4 + 1))
        model.large = large
    assert model.linear.weight.is_meta
    assert model.large.is_meta
    assert model.other.scale is model.scale
    del model.large
    assert_equal(started(model, plan_of(model, {"linear": AWAY})), built(Special))
    assert not nn.Linear(2, 2).weight.is_meta  # outside of the context


class Loaded(GPT):
    """Puts trained numbers in the place of some first ones, by two ways to do that."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.full_like(self.head.weight, 2.0, device="cpu"))
        self.h[1].load_state_dict({n: torch.full(p.shape, 3.0) for n, p in self.h[1].named_parameters()}, assign=True)


def test_what_is_loaded_while_a_model_is_built_stays() -> None:
    with on_meta():
        model = Loaded()
    found = started(model, plan_for(model, (AWAY, RESIDENT)))
    assert torch.equal(found["head.weight"], torch.full((61, 32), 2.0))
    assert all((found[f"h.1.{name}"] == 3).all() for name, _ in model.h[1].named_parameters())
    assert found["h.0.up.weight"].std() < 1


def test_a_model_that_was_profiled_on_meta_is_taken_over(tmp_path: Path) -> None:
    plain = built(GPT)
    with on_meta():
        model = built(GPT)
    memplan.profile(model, batches(1)[0])
    assert_equal(started(model, plan_for(model, EVERY_TIER, tmp_path)), plain)


def test_what_is_real_keeps_its_numbers_where_the_rest_is_made() -> None:
    plain = built(GPT)
    with on_meta():
        model = built(GPT)
    model.h[1] = copy.deepcopy(plain.h[1])
    model.h[2].up.bias = nn.Parameter(torch.arange(128.0))
    found = started(model, plan_for(model, (AWAY, RESIDENT)), seed=7)
    assert torch.equal(found["h.2.up.bias"], torch.arange(128.0))
    assert all(torch.equal(found[f"h.1.{name}"], p) for name, p in plain.h[1].named_parameters())
    assert not torch.equal(found["h.0.up.weight"], plain.h[0].up.weight)


class Unmade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril())


class Beside(GPT):
    """Draws some weights once more after everything else."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.h:
            nn.init.normal_(block.down.weight, std=0.001)


class Reaching(GPT):
    """Initialises parameters of its blocks."""

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.normal_(self.h[0].up.weight)


class Filling(GPT):
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            self.h[0].up.weight.data.zero_()


class Raising(GPT):
    def _init_weights(self, module: nn.Module) -> None:
        raise ZeroDivisionError("so it is")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Unmade, ("parameter gain", "Unmade has no reset_parameters()", "memplan.on_meta()")),
        (Computed, ("buffer mask", "Computed", "memplan.on_meta()")),
        (Beside, ("h.0.down.weight was changed 2 times", "changes it 1 times", "_init_weights(module)")),
        (Reaching, ("initialisation of the model (Reaching)", "another unit", "build the model for real")),
        (Filling, ("changes parameters of one unit from outside", "build the model for real")),
        (Raising, ("initialisation of wte (Embedding)", "ZeroDivisionError: so it is")),
    ],
)
def test_what_can_not_be_made_is_refused_in_a_sentence(kind: type[nn.Module], words: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = kind()
    plan = plan_for(model, (AWAY,)) if isinstance(model, GPT) else plan_of(model, {"linear": AWAY})
    with pytest.raises(OffloadError) as refused:
        Engine(model, plan)
    assert all(word in str(refused.value) for word in words), refused.value


def llama(**changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=96, max_position_embeddings=64, **sizes, **changes)
    )


def blocks_of(model: nn.Module, tiers: tuple = AWAY) -> dict[str, tuple]:
    return {f"model.layers.{i}": tiers for i in range(3)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_transformers_models_begin_as_their_own_initialisation_has_it(context: Any, tied: bool) -> None:
    plain = llama(tie_word_embeddings=tied)
    for module in plain.modules():
        module._is_hf_initialized = False
    with context():
        model = llama(tie_word_embeddings=tied)
    plan = plan_of(model, blocks_of(model))
    torch.manual_seed(0)
    plain.initialize_weights()
    found = started(model, plan)
    if tied:  # drawn a second time by the plain one, for the head
        plain.model.embed_tokens.weight.data.copy_(found["model.embed_tokens.weight"])
        assert found["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_equal(found, plain)


def test_gpt2_scales_what_ends_in_the_residual_stream() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=8, n_head=4))
    found = started(model, plan_of(model, {f"transformer.h.{i}": AWAY for i in range(8)}))
    assert found["transformer.h.3.mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert found["transformer.h.3.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
