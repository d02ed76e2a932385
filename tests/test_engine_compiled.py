"""torch.compile on units: they stay compiled, in one graph, and train as without the engine."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.engine import Engine
from offload.errors import PlanError
from tests.loops import losses_of
from tests.models import GPT, batches
from tests.plans import EVERY_TIER, RESIDENT, H, N, plan_for
from tests.test_engine_kinds_of_models import optimizer_of, train_plainly

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own, which it keeps quiet
STEPS = 6
PLACEMENTS = [(RESIDENT,), ((H, H, H),), ((N, H, N),), EVERY_TIER]
BLOCKS = ("h.0", "h.1", "h.2", "h.3")


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(model: GPT, in_place: bool) -> None:
    """Every block; a graph that breaks raises."""
    for i, block in enumerate(model.h):
        if in_place:
            block.compile(backend="aot_eager", fullgraph=True)
        else:
            model.h[i] = torch.compile(block, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    ("placements", "in_place", "recompute"),
    [
        *((placements, True, ()) for placements in PLACEMENTS),
        ((RESIDENT,), True, BLOCKS),
        (EVERY_TIER, True, BLOCKS),
        (EVERY_TIER, False, ()),
        (EVERY_TIER, False, BLOCKS),
    ],
)
def test_compiled_units_train_as_without_the_engine(
    placements: tuple, in_place: bool, recompute: tuple, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    compiled(model, in_place)
    data = batches(STEPS)
    with Engine(model, plan_for(model, placements, tmp_path, recompute=recompute), optimizer_of(model)) as engine:
        found = losses_of(engine, data)
        assert engine.overflow_count == 0
        with torch.no_grad():
            evaluated = model(data[0]).item()
        whole = engine.state_dict()
    # One for all blocks of a kind, and one without gradients: neither hooks nor moving weights make others.
    assert graphs() == 2
    assert found == train_plainly(plain, data)
    with torch.no_grad():
        assert evaluated == plain(data[0]).item()
    whole = {name.replace("._orig_mod", ""): tensor for name, tensor in whole.items()}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(whole[name], tensor), name


def test_the_first_pass_is_still_watched_and_keeps_the_units_compiled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    compiled(model, in_place=True)
    with Engine(model, plan_for(model, EVERY_TIER, tmp_path), optimizer_of(model)) as engine:
        losses_of(engine, batches(1))
        assert graphs() == 0
        losses_of(engine, batches(1))
        assert graphs() == 1


def test_after_the_engine_is_closed_a_compiled_module_is_called_as_before() -> None:
    torch.manual_seed(0)
    model = GPT()
    compiled(model, in_place=True)
    plan = plan_for(model, (RESIDENT,))
    for _ in range(2):
        with Engine(model, plan, optimizer_of(model)) as engine:
            losses_of(engine, batches(2))
    again = GPT()
    again.load_state_dict(model.state_dict())
    x = batches(1)[0]
    assert model(x).item() == again(x).item()


@pytest.mark.parametrize("whole", ["", "h"])
def test_a_compiled_module_with_units_inside_is_refused(whole: str) -> None:
    model = GPT()
    plan = plan_for(model, (RESIDENT,))
    model.get_submodule(whole).compile(backend="aot_eager")
    with pytest.raises(PlanError, match=r"compiled as a whole .* such as (wte|h\.0); compile those instead"):
        Engine(model, plan)
