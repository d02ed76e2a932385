"""Taking a model over: its units go into the tiers one by one, and the model's own copy of each goes with it."""

from collections.abc import Sequence

import torch

from offload import contents
from offload.arena import Arena
from offload.plan import Plan, Tier
from offload.state import UnitState, allocate
from offload.store import Store
from offload.unit import Unit
from offload.weights import send_away


def host_bytes_of(units: Sequence[Unit]) -> int:
    """Of the model's own parameters in host memory: what becomes free as its units are taken over."""
    return sum(f.parameter.nbytes for u in units for f in u.fields if f.parameter.device.type == "cpu")


def take_over(
    units: Sequence[Unit], plan: Plan, device: torch.device, arena: Arena, store: Store | None, nan: torch.Tensor
) -> list[UnitState]:
    """The units' states, in their order, with the model's numbers in them.

    Units that leave host memory come first, those that take more of it last: so the host never holds more than the
    model before, or all of the tiers after.
    """
    found: dict[str, UnitState] = {}
    for unit in sorted(units, key=lambda u: u.placement.optimizer is Tier.HOST):
        state = found[unit.name] = allocate(unit, plan, device, arena, store)
        contents.write(state, contents.from_model(state, plan.optimizer), plan.state_format, store)
        send_away(state, nan)
    return [found[unit.name] for unit in units]
