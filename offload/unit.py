"""Unit: the parameters that move together, and their place in one flat buffer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from offload.dtensors import Share, local_of, share_of
from offload.errors import OffloadError, PlanError
from offload.plan import Placement, Plan
from offload.residency import UnitShape, aligned
from offload.shards import ALIGN_ELEMENTS, ALONE, Shards


@dataclass(frozen=True, eq=False)
class Field:
    """One parameter's span in its unit's flat buffer."""

    name: str
    parameter: nn.Parameter
    start: int
    shape: torch.Size
    """Of what this process has of it."""
    trainable: bool
    share: Share | None = None
    """How a tensor axis divides it; None where this process has all of it."""
    counted: bool = True
    """Whether this process counts its gradient in the norm: [Note: the norm over a tensor axis] in
    ``offload.ranks``."""

    @property
    def whole_shape(self) -> torch.Size:
        """Of all of it."""
        return self.shape if self.share is None else self.share.whole

    @property
    def stop(self) -> int:
        """The element behind its last."""
        return self.start + self.shape.numel()

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """This parameter in a flat buffer of its unit, in its own shape."""
        return flat[self.start : self.stop].view(self.shape)


@dataclass(frozen=True, eq=False)
class Unit:
    """A module whose parameters move together; the root unit "" owns what no other unit does."""

    placement: Placement
    module: nn.Module
    fields: tuple[Field, ...]
    """Trainable ones first."""
    shape: UnitShape

    @property
    def name(self) -> str:
        """The dotted path of its module."""
        return self.placement.unit

    @property
    def trainable(self) -> Iterator[Field]:
        """The fields that are trained."""
        return (f for f in self.fields if f.trainable)


def check_model(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError, naming what differs, when the plan was made for another model."""
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    planned = plan.parameter_shapes
    for name in planned.keys() | found.keys():
        if planned.get(name) != found.get(name):
            first = min(n for n in planned.keys() | found.keys() if planned.get(n) != found.get(n))
            there, here = planned.get(first), found.get(first)
            raise PlanError(
                f"this plan is for another model: it has {len(planned)} parameters, the model {len(found)}; "
                f"{first} is {list(there) if there else 'not'} in the plan and "
                f"{list(here) if here else 'not'} in the model. Make a plan for this model."
            )


def check_recompute(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError where the plan recomputes what the model does not have."""
    modules = dict(model.named_modules())
    if missing := [path for path in plan.recompute if path not in modules]:
        raise PlanError(f"the plan recomputes {missing[0]!r}, but the model has no module of that name")


def check_trainable(units: Iterable[Unit]) -> None:
    """Raise OffloadError where a parameter was frozen or unfrozen since the units were made."""
    for unit in units:
        for field in unit.fields:
            if field.parameter.requires_grad != field.trainable:
                change = "frozen" if field.trainable else "unfrozen"
                raise OffloadError(f"parameter {field.name} was {change} during training; do so before Engine()")


def partition(
    model: nn.Module, placements: Sequence[Placement], shards: Shards = ALONE, tensor_position: int = 0
) -> tuple[Unit, ...]:
    """One Unit a placement, in the same order; of DTensors it has the part of this ``tensor_position``.

    A parameter belongs to the unit whose path begins its name; one that several units share, or none has, belongs
    to the root unit. Only floating-point parameters with elements are owned: others stay where the model has them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if missing := [p.unit for p in placements if p.unit not in modules]:
        raise PlanError(f"the plan places {missing[0]!r}, but the model has no module of that name")
    paths = [p.unit for p in placements if p.unit]
    for path in (p for p in paths if getattr(modules[p].forward, "__func__", None) is nn.Module.forward):
        raise PlanError(
            f"the plan places {path!r}, a {type(modules[path]).__name__}, which nobody calls, so nothing tells when "
            "its weights are needed: place the modules in it, or leave them to the root unit; memplan plan does so"
        )
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_complex() and parameter.requires_grad:
            raise PlanError(f"parameter {name} is complex; this version trains real parameters only")
        if parameter.is_floating_point() and parameter.numel():
            names.setdefault(parameter, []).append(name)
    owned: dict[str, list[tuple[str, nn.Parameter]]] = {p.unit: [] for p in placements}
    for parameter, aliases in names.items():
        owners = {next((u for u in paths if name.startswith(u + ".")), "") for name in aliases}
        owner = owners.pop() if len(owners) == 1 else ""
        if owner not in owned:
            raise PlanError(f"parameter {aliases[0]} belongs to the root unit, which the plan does not place")
        owned[owner].append((aliases[0], parameter))
    return tuple(_unit(p, modules[p.unit], owned[p.unit], shards, tensor_position) for p in placements)


def _unit(
    placement: Placement,
    module: nn.Module,
    owned: list[tuple[str, nn.Parameter]],
    shards: Shards,
    tensor_position: int,
) -> Unit:
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for _, parameter in owned:
        sizes[parameter.requires_grad].append(local_of(parameter).numel())
    shape = UnitShape.of(placement.unit, sizes[True], sizes[False]).padded(shards)
    fields = []
    next_start = {True: 0, False: shape.trainable_elements}
    for name, parameter in sorted(owned, key=lambda item: not item[1].requires_grad):
        trainable, share, here = parameter.requires_grad, share_of(parameter), local_of(parameter).shape
        counted = share is not None or tensor_position == 0
        fields.append(Field(name, parameter, next_start[trainable], here, trainable, share, counted))
        next_start[trainable] += aligned(here.numel(), ALIGN_ELEMENTS)
    return Unit(placement, module, tuple(fields), shape)
