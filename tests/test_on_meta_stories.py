"""What ``__init__`` does to parameters on meta is the same as in a model that was built whole, or refused by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offload.errors import OffloadError
from offload.on_meta import on_meta
from tests.test_engine_odd_models import plan_of
from tests.test_engine_on_meta import AWAY, assert_equal, built, started

LOADED = torch.arange(600.0 * 600).view(600, 600)


def doing(act: Callable[[Any], object]) -> Callable[[], nn.Module]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            act(self)

    return Model


def on_meta_and_whole(kind: Callable[[], nn.Module], unit: str = "a") -> tuple[dict[str, torch.Tensor], nn.Module]:
    whole = built(kind)
    with on_meta():
        model = built(kind)
    return started(model, plan_of(model, {unit: AWAY})), whole


@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.b.weight.data.zero_(),
        lambda m: m.b.weight.data.mul_(0.1),
        lambda m: m.b.weight.data.copy_(m.a.weight.data),
        lambda m: m.b.weight.data.__setitem__(0, 0.0),
        lambda m: m.b.weight.detach()[1:].fill_(2.0),
        lambda m: m.apply(lambda c: c.weight.data.normal_(0.0, 0.02) if c is m.b else None),
        lambda m: setattr(m.b, "weight", nn.Parameter(m.b.weight * 0.01)),
        lambda m: setattr(m.b, "weight", nn.Parameter(m.a.weight)),
        lambda m: nn.init.orthogonal_(m.b.weight),
        lambda m: copy.deepcopy(m.a).load_state_dict(m.b.state_dict()) and m.b.weight.data.uniform_(-1, 1),
    ],
)
def test_what_would_be_lost_is_refused_by_name(act: Any) -> None:
    with pytest.raises(OffloadError, match=r"b\.weight .*build the model for real"):
        on_meta_and_whole(doing(act))


@pytest.mark.parametrize(
    "act",
    [
        lambda m: setattr(m, "table", nn.Embedding.from_pretrained(torch.ones(10, 8))),
        lambda m: setattr(m, "table", nn.Embedding.from_pretrained(LOADED.clone(), freeze=False)),
        lambda m: setattr(m, "target", copy.deepcopy(m.a)),
        lambda m: setattr(m, "target", copy.deepcopy(nn.Sequential(m.a, m.b))),
        lambda m: setattr(m, "norm", nn.BatchNorm1d(4)) or m.norm.running_mean.fill_(3.0),
        lambda m: setattr(
            m, "layers", nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
        ),
    ],
)
def test_what_is_loaded_and_what_is_copied_begins_as_in_a_whole_model(act: Any) -> None:
    assert_equal(*on_meta_and_whole(doing(act)))


class Copies(nn.Module):
    """Blocks that are copies, of which only the weights are drawn again, and a copy of all that."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in [nn.Linear(8, 8)] * 3)
        self.apply(self._init_weights)
        self.target = copy.deepcopy(self.layers)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, 0.02)


def test_copies_that_are_drawn_again_differ_where_they_are_and_only_there() -> None:
    found, _ = on_meta_and_whole(Copies, "layers.0")
    for i in range(3):
        for name in ("weight", "bias"):
            assert torch.equal(found[f"layers.{i}.{name}"], found[f"target.{i}.{name}"])
    assert torch.equal(found["layers.0.bias"], found["layers.1.bias"])
    assert not torch.equal(found["layers.0.weight"], found["layers.1.weight"])
    assert found["layers.1.weight"].std() < 0.04
