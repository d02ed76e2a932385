"""Parameters that share memory with others are refused; those that merely lie beside each other train."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.errors import OffloadError
from offload.shared_memory import check_memory
from tests.models import TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, plan_for
from tests.test_engine_odd_models import assert_trains_as_plain, plan_of, vectors

AWAY = (H, H, H)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x))).square().mean()


def of_anothers_data(model: Two) -> None:
    model.b.weight = nn.Parameter(model.a.weight.data)


def transposed(model: Two) -> None:
    model.b.weight = nn.Parameter(model.a.weight.data.t())


def a_row(model: Two) -> None:
    model.b.bias = nn.Parameter(model.a.weight.data[7])


def a_column(model: Two) -> None:
    model.b.bias = nn.Parameter(model.a.weight.data[:, 3])


def frozen(model: Two) -> None:
    model.b.weight = nn.Parameter(model.a.weight.data, requires_grad=False)


def bits_of_it(model: Two) -> None:
    model.b.weight = nn.Parameter(model.a.weight.data.view(torch.int32), requires_grad=False)


def a_buffer(model: Two) -> None:
    model.b.register_buffer("weight_before", model.a.weight.detach())


def an_attribute(model: Two) -> None:
    model.b.before = model.a.weight.detach()[2:4]


SHARED: dict[Callable[[Two], None], tuple[str, str]] = {
    of_anothers_data: ("parameter a.weight", "parameter b.weight"),
    transposed: ("parameter a.weight", "parameter b.weight"),
    a_row: ("parameter a.weight", "parameter b.bias"),
    a_column: ("parameter a.weight", "parameter b.bias"),
    frozen: ("parameter a.weight", "parameter b.weight"),
    bits_of_it: ("parameter a.weight", "parameter b.weight"),
    a_buffer: ("parameter a.weight", "buffer b.weight_before"),
    an_attribute: ("parameter a.weight", "attribute b.before"),
}


@pytest.mark.parametrize("share", SHARED)
@pytest.mark.parametrize("tiers", [AWAY, RESIDENT])
def test_a_parameter_with_bytes_of_another_tensor_is_refused_with_both_names(
    share: Callable[[Two], None], tiers: tuple
) -> None:
    model = Two()
    share(model)
    one, other = SHARED[share]
    with pytest.raises(OffloadError, match=rf"^{one} and {other} share memory.*: (make them one|read) .*\.clone\(\)$"):
        Engine(model, plan_of(model, {"a": tiers, "b": tiers}))


def test_a_refused_model_trains_when_the_parameter_got_numbers_of_its_own() -> None:
    model = Two()
    of_anothers_data(model)
    with pytest.raises(OffloadError):
        Engine(model, plan_of(model, {"a": AWAY, "b": AWAY}))
    model.b.weight = nn.Parameter(model.b.weight.data.clone())
    assert_trains_as_plain(model, plan_of(model, {"a": AWAY, "b": AWAY}), vectors())


def in_one_piece(model: Two) -> None:
    """As cuDNN has the weights of a recurrent layer."""
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)


def columns_of_one_matrix(model: Two) -> None:
    left, right = torch.cat([model.a.weight.data, model.b.weight.data], dim=1).chunk(2, dim=1)
    model.a.weight, model.b.weight = nn.Parameter(left), nn.Parameter(right)


def one_parameter_twice(model: Two) -> None:
    model.b.weight = model.a.weight


def one_parameter_as_a_buffer(model: Two) -> None:
    model.b.register_buffer("same", model.a.weight)


def an_attribute_of_a_buffer(model: Two) -> None:
    model.register_buffer("one", torch.ones(4))
    model.other = model.one[1:]


def buffers_of_each_other(model: Two) -> None:
    model.register_buffer("one", torch.ones(4))
    model.register_buffer("other", model.one[1:])


NOT_SHARED = [
    in_one_piece,
    columns_of_one_matrix,
    one_parameter_twice,
    one_parameter_as_a_buffer,
    an_attribute_of_a_buffer,
    buffers_of_each_other,
]


@pytest.mark.parametrize("lay", NOT_SHARED)
@pytest.mark.parametrize("tiers", [AWAY, RESIDENT, (G, H, H)])
def test_parameters_that_share_no_byte_with_others_train_as_with_plain_pytorch(
    lay: Callable[[Two], None], tiers: tuple
) -> None:
    torch.manual_seed(0)
    model = Two()
    lay(model)
    units = {} if lay is one_parameter_twice else {"a": tiers, "b": tiers}
    assert_trains_as_plain(model, plan_of(model, units), vectors())


def test_models_on_meta_have_no_addresses_to_compare() -> None:
    with torch.device("meta"):
        model = Two()
        of_anothers_data(model)
    check_memory(model)


def test_a_model_whose_numbers_went_with_a_closed_engine_shares_nothing(tmp_path) -> None:
    model = TiedGPT()
    plan = plan_for(model, EVERY_TIER, tmp_path)
    with Engine(model, plan) as engine:
        numbers = engine.state_dict()
    with Engine(model, plan) as engine:
        engine.load_state_dict(numbers)
        engine.backward(engine(batches(1)[0]))
        engine.step()
