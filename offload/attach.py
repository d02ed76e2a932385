"""Taking a model over: its units go into the tiers one by one, and the model's own copy of each goes with it."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from offload import contents
from offload.arena import Arena
from offload.dtensors import local_of
from offload.errors import OffloadError
from offload.initialise import Initialiser
from offload.plan import Plan
from offload.ranks import Ranks
from offload.residency import Footprint, host_bytes_of_unit
from offload.shards import Shards
from offload.state import UnitState, allocate
from offload.store import Store
from offload.unit import Unit
from offload.weight_files import WeightFiles
from offload.weights import send_away

MASTER_BYTES = 4


def host_bytes_of(units: Sequence[Unit]) -> int:
    """Of the model's own parameters in host memory: what becomes free as its units are taken over."""
    return sum(local_of(f.parameter).nbytes for u in units for f in u.fields if f.parameter.device.type == "cpu")


def take_over(
    turns: Iterable[Unit],
    plan: Plan,
    device: torch.device,
    arena: Arena,
    store: Store | None,
    nan: torch.Tensor,
    ranks: Ranks | None,
) -> list[UnitState]:
    """The units' states, in the order of the plan, with the model's numbers in them: those of the first rank."""
    found: dict[str, UnitState] = {}
    for unit in turns:
        state = found[unit.name] = allocate(unit, plan, device, arena, store, ranks)
        whole = contents.from_model(state, plan.optimizer)
        if ranks is not None:
            ranks.from_first(whole.weights)
            _check_copies(unit, whole, ranks)
        send_away(state, nan)
        contents.write(state, whole, plan.state_format, store)
        del whole  # before there is another one
    if not nan.isnan():  # filling one that is away raises nothing
        raise OffloadError(
            "the model's initialisation changes parameters of one unit from outside of it, when they are away already; "
            "let each module initialise its own, or build the model for real"
        )
    return [found[placement.unit] for placement in plan.placements]


def _check_copies(unit: Unit, whole: contents.Contents, ranks: Ranks) -> None:
    """Raise OffloadError where the processes of a tensor axis begin with different copies of a parameter."""
    for field in unit.fields if ranks.divides_tensors else ():
        if field.share is None and not ranks.alike(field.view(whole.weights), roughly=False):
            raise OffloadError(
                f"parameter {field.name} is not divided over the mesh and differs between its processes, which must "
                "have the same copy: build the model with the same seed in each, or make it a DTensor"
            )


def in_turn(
    model: nn.Module,
    units: Sequence[Unit],
    plan: Plan,
    device: torch.device,
    needed: Footprint,
    weights: WeightFiles | None,
) -> Iterator[Unit]:
    """The units, each when the model has its parameters with their first values: its own, those of files, or new ones.

    Units that free host memory come first, those that take more of it last: so beside the one on its way the host never
    holds more than the model before, or all of the tiers after. Those on meta take none before, and are made in the
    model's order. When all have come, nothing of the model is on meta.
    """
    shards = Shards.of(plan)
    by_room = sorted(
        units,
        key=lambda u: host_bytes_of_unit(u.shape, u.placement, plan.state_format, shards) - host_bytes_of([u]),
    )
    workplace = _workplace(units, plan, device, needed)
    made = Initialiser(model, workplace)
    if weights is not None:
        yield from weights.units(by_room)
        for tensor in weights.rest(units):
            made.has_values(tensor)
        made.buffers()
        return
    yield from (unit for unit in by_room if not _on_meta(unit))
    yield from made.units([unit for unit in units if _on_meta(unit)])
    if workplace.type == "cuda":
        torch.cuda.empty_cache()  # pieces of other sizes than those that training asks for


def _on_meta(unit: Unit) -> bool:
    return any(field.parameter.is_meta for field in unit.fields)


def _workplace(units: Sequence[Unit], plan: Plan, device: torch.device, needed: Footprint) -> torch.device:
    """Where units on meta are made: on a GPU that has room for the root and the largest beside all it will hold."""
    if device.type != "cuda":
        return device
    sizes = {unit.name: unit.shape.elements * MASTER_BYTES for unit in units}
    room = min(torch.cuda.mem_get_info(device)[0], plan.budget.gpu_bytes) - needed.gpu_bytes
    return device if sizes.get("", 0) + max(sizes.values()) <= room else torch.device("cpu")
