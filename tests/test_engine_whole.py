"""Whole tensors while they are away: read, written, saved and loaded, wherever they live."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload import contents
from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Precision
from offload.store import Store
from tests.models import GPT, FrozenGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, plan_for

PLACEMENTS = [(p,) for p in EVERY_TIER]


def trained(model: nn.Module, tmp_path: Path, placements: tuple, precision: Precision = Precision.FP32) -> Engine:
    """An engine after two steps, the second of which may still be under way."""
    engine = Engine(
        model, plan_for(model, placements, tmp_path, precision), torch.optim.AdamW(model.parameters(), lr=1e-2)
    )
    for tokens in batches(2):
        step(engine, tokens)
    return engine


def step(engine: Engine, tokens: torch.Tensor) -> float:
    loss = engine(tokens)
    engine.backward(loss)
    engine.step()
    return loss.item()


def model_of(kind: type[nn.Module] = GPT) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """Masters and moments of all parameters, by kind and name."""
    engine.finish()
    return {
        f"{what}/{name}": tensor.clone()
        for state in engine.states
        for name, parts in contents.named(state, contents.read(state, engine.plan.state_format, engine.store))
        for what, tensor in parts.items()
    }


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name].view(torch.int32), after[name].view(torch.int32))}


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("placements", PLACEMENTS)
def test_gathered_parameters_are_whole_and_looking_writes_nothing(
    placements: tuple, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(FrozenGPT)
    with trained(model, tmp_path, placements, precision) as engine:
        before, expected = everything(engine), engine.state_dict()
        monkeypatch.setattr(contents, "write", lambda *_: pytest.fail("looking wrote"))
        monkeypatch.setattr(Store, "write", lambda *_: pytest.fail("looking wrote"))
        with engine.gathered(model) as parameters:
            for name, parameter in model.named_parameters():
                assert parameters[name] is parameter
                torch.testing.assert_close(parameter.detach().float(), expected[name], rtol=2**-8, atol=0)
                if precision.weight_bytes == 4:
                    assert torch.equal(parameter.detach(), expected[name])
        monkeypatch.undo()
        assert differing(before, everything(engine)) == set()


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("placements", PLACEMENTS)
def test_what_is_written_is_trained_on_and_the_rest_keeps_every_bit(
    placements: tuple, precision: Precision, tmp_path: Path
) -> None:
    model = model_of()
    with trained(model, tmp_path, placements, precision) as engine:
        before = everything(engine)
        with engine.gathered("h.1.up.weight"):
            model.h[1].up.weight[3].mul_(2)
            written = model.h[1].up.weight.detach().float()
        after = everything(engine)
        assert differing(before, after) == {"weight/h.1.up.weight"}
        weight, old = after["weight/h.1.up.weight"], before["weight/h.1.up.weight"]
        assert torch.equal(weight[3], written[3])
        rest = [i for i in range(len(weight)) if i != 3]
        assert torch.equal(weight[rest], old[rest])
        again = model_of()
        with trained(again, tmp_path, (RESIDENT,), precision) as reference:
            reference.load_state_dict({n.removeprefix("weight/"): t for n, t in after.items() if "weight/" in n})
            for tokens in batches(3, seed=5):
                assert step(engine, tokens) == pytest.approx(step(reference, tokens), rel=1e-5)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.fill_(0.5),
        lambda weight: weight.data.fill_(0.5),
        lambda weight: nn.init.constant_(weight, 0.5),
        lambda weight: setattr(weight, "data", torch.full_like(weight, 0.5)),
    ],
)
@pytest.mark.parametrize("placements", PLACEMENTS)
def test_every_way_of_writing_is_seen(write: Callable, placements: tuple, tmp_path: Path) -> None:
    model = model_of()
    with trained(model, tmp_path, placements) as engine:
        with engine.gathered(model.h[2].down):
            write(model.h[2].down.weight)
        assert torch.equal(engine.state_dict()["h.2.down.weight"], torch.full((32, 128), 0.5))
        step(engine, batches(1)[0])


def test_in_bf16_assigned_fp32_data_becomes_the_master_exactly(tmp_path: Path) -> None:
    model = model_of()
    exact = torch.randn(32, 128)
    with trained(model, tmp_path, EVERY_TIER, Precision.BF16) as engine:
        with engine.gathered(model.h[2].down):
            model.h[2].down.weight.data = exact
        assert torch.equal(engine.state_dict()["h.2.down.weight"], exact)
        with engine.gathered(model.h[2].down) as parameters:
            assert {p.dtype for p in parameters.values()} == {torch.bfloat16}


def test_a_module_can_compute_with_what_was_written_to_it(tmp_path: Path) -> None:
    model = model_of()
    x = torch.randn(2, 32)
    with trained(model, tmp_path, EVERY_TIER) as engine, engine.gathered(model.h):
        for block in model.h:
            block.down.weight.zero_()
            block.down.bias.fill_(1)
            assert torch.equal(block.down(torch.randn(2, 128)), torch.ones(2, 32))
            y = block(x[None])
            assert y.isfinite().all()
            assert block.down.weight.count_nonzero() == 0


def test_what_was_written_before_an_error_is_kept(tmp_path: Path) -> None:
    model = model_of()
    with trained(model, tmp_path, EVERY_TIER) as engine:
        with pytest.raises(KeyError), engine.gathered(model.h):
            model.h[0].up.bias.fill_(3)
            raise KeyError
        assert torch.equal(engine.state_dict()["h.0.up.bias"], torch.full((128,), 3.0))


def test_parameters_are_chosen_by_name_by_module_by_themselves_and_in_lists(tmp_path: Path) -> None:
    model = model_of(TiedGPT)
    with Engine(model, plan_for(model, EVERY_TIER, tmp_path)) as engine:
        for chosen, names in (
            (("ln_f",), {"ln_f.weight", "ln_f.bias"}),
            ((model.ln_f, "wpe.weight"), {"ln_f.weight", "ln_f.bias", "wpe.weight"}),
            (([model.h[0].up, model.h[1].up.bias],), {"h.0.up.weight", "h.0.up.bias", "h.1.up.bias"}),
            ((model.parameters(),), {name for name, _ in model.named_parameters()}),
            (("head.weight",), {"wte.weight"}),
        ):
            with engine.gathered(*chosen) as parameters:
                assert set(parameters) == names
                assert all(p.isfinite().all() for p in parameters.values())


@pytest.mark.parametrize(
    ("chosen", "said"),
    [("h.9", "no module of the name 'h.9'"), (nn.Linear(2, 2), "not a part"), (7, "not a int")],
)
def test_what_is_no_part_of_the_model_is_refused(chosen: Any, said: str, tmp_path: Path) -> None:
    model = model_of()
    with Engine(model, plan_for(model, EVERY_TIER, tmp_path)) as engine:
        with pytest.raises(OffloadError, match=said), engine.gathered(chosen):
            pass
        step(engine, batches(1)[0])


@pytest.mark.parametrize("what", ["step", "state_dict", "gathered"])
def test_what_would_miss_gathered_changes_is_refused_inside(what: str, tmp_path: Path) -> None:
    model = model_of()
    with Engine(model, plan_for(model, EVERY_TIER, tmp_path)) as engine:
        engine.backward(engine(batches(1)[0]))
        with engine.gathered("h.0"):
            with pytest.raises(OffloadError, match="leave `with engine"):
                if what == "gathered":
                    with engine.gathered("h.1"):
                        pass
                else:
                    getattr(engine, what)()
            model.h[0].up.weight.zero_()
        engine.step()


def test_another_shape_inside_is_refused_and_everything_goes_on(tmp_path: Path) -> None:
    model = model_of()
    with trained(model, tmp_path, EVERY_TIER) as engine:
        before = engine.state_dict()
        with (
            pytest.raises(OffloadError, match=r"h\.0\.up\.bias became one of shape \[5\]"),
            engine.gathered("h.0", "h.1"),
        ):
            model.h[0].up.bias.data = torch.zeros(5)
            model.h[1].up.bias.zero_()
        after = engine.state_dict()
        assert differing(before, after) == {"h.1.up.bias"}
        step(engine, batches(1)[0])


@pytest.mark.parametrize("kind", [GPT, TiedGPT, FrozenGPT])
@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER])
def test_a_state_dict_goes_into_a_plain_model_and_back(
    kind: type[nn.Module], placements: tuple, tmp_path: Path
) -> None:
    model, plain, other = model_of(kind), kind(), kind()
    for m in (model, plain, other):
        m.register_buffer("kept", torch.randn(3))
        m.register_buffer("passing", torch.randn(3), persistent=False)
    with trained(model, tmp_path, placements) as engine:
        whole = engine.state_dict()
        assert list(whole) == list(plain.state_dict())
        plain.load_state_dict(whole)
        other.load_state_dict({n: torch.randn_like(t) for n, t in whole.items()})
        moments = {n: t for n, t in everything(engine).items() if "exp_avg" in n}
        assert engine.load_state_dict(other.state_dict()) == ([], [])
        found = engine.state_dict()
        assert all(torch.equal(found[n], t) for n, t in other.state_dict().items())
        assert all(torch.equal(t, everything(engine)[n]) for n, t in moments.items())
        engine.load_state_dict(plain.state_dict())
        tokens = batches(1, seed=3)[0]
        with torch.no_grad():
            assert engine(tokens).item() == pytest.approx(plain(tokens).item(), rel=1e-6)


class Counting(nn.Module):
    """Keeps extra state, as torch's quantized and some other modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


def test_extra_state_is_saved_and_loaded(tmp_path: Path) -> None:
    model = model_of()
    model.counting = Counting()
    with Engine(model, plan_for(model, EVERY_TIER, tmp_path)) as engine:
        model.counting.count = 5
        whole = engine.state_dict()
        model.counting.count = 6
        engine.load_state_dict(whole)
        assert model.counting.count == 5


@pytest.mark.parametrize(
    ("change", "strict", "said"),
    [
        (lambda d: d.pop("ln_f.bias"), True, "it has no ln_f.bias"),
        (lambda d: d.update(more=torch.zeros(1)), True, "the model has no more"),
        (lambda d: d.update({"ln_f.bias": torch.zeros(3)}), False, r"ln_f.bias is \[3\] there and \[32\] in the model"),
        (lambda d: d.update({"ln_f.bias": [1, 2]}), False, "ln_f.bias is a list, not a tensor"),
    ],
)
def test_a_state_dict_of_another_model_is_refused_and_nothing_changes(
    change: Callable, strict: bool, said: str, tmp_path: Path
) -> None:
    model = model_of()
    with trained(model, tmp_path, EVERY_TIER) as engine:
        before = engine.state_dict()
        other = {n: torch.zeros_like(t) for n, t in before.items()}
        change(other)
        with pytest.raises(OffloadError, match=said):
            engine.load_state_dict(other, strict=strict)
        assert differing(before, engine.state_dict()) == set()


def test_a_partial_state_dict_is_loaded_where_that_is_wanted(tmp_path: Path) -> None:
    model = model_of()
    with trained(model, tmp_path, EVERY_TIER, Precision.BF16) as engine:
        before = engine.state_dict()
        exact = torch.randn(128)
        found = engine.load_state_dict({"h.0.up.bias": exact, "more": torch.zeros(1)}, strict=False)
        assert found.unexpected_keys == ["more"]
        assert set(found.missing_keys) == before.keys() - {"h.0.up.bias"}
        after = engine.state_dict()
        assert differing(before, after) == {"h.0.up.bias"}
        assert torch.equal(after["h.0.up.bias"], exact)


@pytest.mark.gpu
@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER])
def test_parameters_are_gathered_and_written_on_a_gpu(placements: tuple, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = model_of()
    plan = plan_for(model, placements, tmp_path, Precision.BF16, device="cuda")
    with Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        for tokens in batches(2):
            step(engine, tokens)
        before = everything(engine)
        with engine.gathered(model) as parameters:
            assert all(p.is_cuda and p.isfinite().all() for p in parameters.values())
        assert differing(before, everything(engine)) == set()
        with engine.gathered("h.1"):
            model.h[1].up.bias.fill_(0.5)
        assert differing(before, everything(engine)) == {"weight/h.1.up.bias"}
        with torch.no_grad():
            assert model(batches(1)[0].cuda()).isfinite()
        step(engine, batches(1)[0])
