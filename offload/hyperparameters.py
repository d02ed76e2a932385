"""Hyperparameters: what a torch optimizer and the schedulers on it say about each parameter's next update."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.errors import OffloadError
from offload.lion import Lion
from offload.plan import OptimizerKind
from offload.rules import AdagradStep, AdamStep, AdamWStep, LionStep, MomentumStep, SgdStep, UpdateStep
from offload.unit import Field, Unit
from offload.unit_update import Segment

CLASSES: dict[type[torch.optim.Optimizer], OptimizerKind] = {
    torch.optim.AdamW: OptimizerKind.ADAMW,
    torch.optim.Adam: OptimizerKind.ADAM,
    torch.optim.SGD: OptimizerKind.SGD,
    torch.optim.Adagrad: OptimizerKind.ADAGRAD,
    Lion: OptimizerKind.LION,
}
DEFAULTS: dict[OptimizerKind, Callable[..., torch.optim.Optimizer]] = {
    **{kind: cls for cls, kind in CLASSES.items()},
    OptimizerKind.SGD_MOMENTUM: partial(torch.optim.SGD, momentum=0.9),
}
REFUSED = ("amsgrad", "maximize", "differentiable")
ACCUMULATED = "initial_accumulator_value"


def default_optimizer(
    kind: OptimizerKind, parameters: Iterable[nn.Parameter], **settings: float
) -> torch.optim.Optimizer:
    """One of a kind, with its own defaults beside ``settings``; momentum, where there is some, is 0.9."""
    return DEFAULTS[kind]([p for p in parameters if p.requires_grad], **settings)


def kind_of(optimizer: torch.optim.Optimizer) -> OptimizerKind:
    """Of an optimizer that the engine can train with; raises OffloadError for others, and for what it does not do."""
    name, kind = type(optimizer).__name__, CLASSES.get(type(optimizer))
    if kind is None:
        raise OffloadError(
            f"the optimizer is {name}; give the engine AdamW, Adam, SGD or Adagrad of torch.optim, or offload.lion.Lion"
        )
    for group in optimizer.param_groups:
        if refused := [key for key in REFUSED if group.get(key)]:
            raise OffloadError(f"{name} with {refused[0]}=True is not supported; leave it out")
        if kind is OptimizerKind.ADAM and group.get("decoupled_weight_decay"):
            raise OffloadError("Adam with decoupled_weight_decay=True is AdamW; give the engine torch.optim.AdamW")
    if kind is OptimizerKind.SGD and any(group["momentum"] for group in optimizer.param_groups):
        return OptimizerKind.SGD_MOMENTUM
    return kind


class Hyperparameters:
    """Reads an optimizer's parameter groups at every step, and counts each parameter's own steps."""

    def __init__(self, model: nn.Module, kind: OptimizerKind, optimizer: torch.optim.Optimizer | None) -> None:
        """``kind`` is the plan's, and so is an optimizer that is not given. Raises OffloadError for another kind."""
        if optimizer is None:
            optimizer = default_optimizer(kind, model.parameters())
        given = kind_of(optimizer)
        if given is not kind:
            raise OffloadError(
                f"the optimizer is {given}, and the plan counts the state of {kind}; plan with --optimizer {given}, or "
                "give the engine the optimizer of the plan"
            )
        if given is OptimizerKind.ADAGRAD and not any(float(s["step"]) for s in optimizer.state.values()):
            optimizer.state.clear()  # it makes its state ahead of the first step
        if optimizer.state:
            raise OffloadError(
                "the optimizer has state already; give the engine one that has not stepped, or resume from a checkpoint"
            )
        own = set(model.parameters())
        if foreign := sum(p not in own for group in optimizer.param_groups for p in group["params"]):
            raise OffloadError(
                f"the optimizer has {foreign} parameters that are not the model's; the engine would not clip, update "
                "or save them: make them part of the model, or give them an optimizer of their own"
            )
        self.optimizer, self.kind = optimizer, kind
        self.steps: dict[str, int] = {}
        """Updates of each parameter so far, by name: one that got no gradient was not updated."""
        self._names = {p: name for name, p in model.named_parameters()}
        self._group_of = self._groups()

    def check(self) -> None:
        """Raise OffloadError where somebody changed more of the optimizer than numbers of its groups."""
        if self.optimizer.state:
            raise OffloadError(
                "the optimizer was given state after Engine(), which keeps its own: load a checkpoint of the engine "
                "instead of the optimizer's state_dict"
            )
        now = self._groups()
        if now.keys() != self._group_of.keys():
            raise OffloadError(
                "parameters came to the optimizer or left it after Engine(), when it is settled which are trained: "
                "save a checkpoint, and go on from it with a new model and engine"
            )
        self._group_of = now  # some may have gone from one group to another

    def _groups(self) -> dict[nn.Parameter, int]:
        """The number of each parameter's group."""
        return {p: i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}

    def names_of_groups(self) -> list[list[str]]:
        """The parameters of each group."""
        return [[self._names[p] for p in group["params"]] for group in self.optimizer.param_groups]

    def begin_update(self, unit: Unit, present: set[str]) -> tuple[Segment, ...]:
        """How the unit's elements are updated now, and count it; parameters without gradient are left out."""
        segments: list[Segment] = []
        known: dict[tuple[int, int], UpdateStep] = {}
        updated: Field | None = None
        for field in unit.trainable:
            before, updated = updated, None  # the field ahead of this one, where it was updated
            index = self._group_of.get(field.parameter)
            if field.name not in present or index is None or not field.shape.numel():
                continue
            key = index, self.steps.get(field.name, 0) + 1
            self.steps[field.name] = key[1]
            if (how := known.get(key)) is None:
                how = known[key] = self._how(*key)
            updated = field
            # Neighbours are updated in one piece, unless there is a gap between them: its gradients may be anything,
            # and moments in 8 bits share a scale with what is beside them.
            if before is not None and before.stop == field.start and segments[-1].how == how:
                segments[-1] = Segment(segments[-1].start, field.stop, how)
            else:
                segments.append(Segment(field.start, field.stop, how))
        return tuple(segments)

    def _how(self, index: int, step: int) -> UpdateStep:
        group = self.optimizer.param_groups[index]
        if self.kind is OptimizerKind.SGD and group["momentum"]:
            raise OffloadError("SGD was given momentum after the engine was made without; make both anew")
        if self.kind is OptimizerKind.ADAGRAD:  # torch's sums begin with what it was made with, in every group
            group = group | {ACCUMULATED: self.optimizer.defaults[ACCUMULATED]}
        return _READERS[self.kind](group, step)


Reader = Callable[[dict[str, Any], int], UpdateStep]
"""From a parameter group and the number of the step."""


def _numbers(group: dict[str, Any], *names: str) -> list[float]:
    """Some may be tensors."""
    return [float(group[name]) for name in names]


def _adam(step_of: type[AdamWStep]) -> Reader:
    def read(group: dict[str, Any], step: int) -> UpdateStep:
        beta1, beta2 = map(float, group["betas"])
        rate, eps, decay = _numbers(group, "lr", "eps", "weight_decay")
        return step_of(rate, beta1, beta2, eps, decay, step)

    return read


def _lion(group: dict[str, Any], _: int) -> UpdateStep:
    rate, decay = _numbers(group, "lr", "weight_decay")
    beta1, beta2 = map(float, group["betas"])
    return LionStep(rate, beta1, beta2, decay)


def _sgd(group: dict[str, Any], _: int) -> UpdateStep:
    return SgdStep(*_numbers(group, "lr", "weight_decay"))


def _momentum(group: dict[str, Any], step: int) -> UpdateStep:
    rate, momentum, dampening, decay = _numbers(group, "lr", "momentum", "dampening", "weight_decay")
    return MomentumStep(rate, momentum, dampening, bool(group["nesterov"]), decay, step)


def _adagrad(group: dict[str, Any], step: int) -> UpdateStep:
    rate, rate_decay, eps, decay = _numbers(group, "lr", "lr_decay", "eps", "weight_decay")
    return AdagradStep(rate, rate_decay, eps, float(group[ACCUMULATED]), decay, step)


_READERS: dict[OptimizerKind, Reader] = {
    OptimizerKind.ADAMW: _adam(AdamWStep),
    OptimizerKind.ADAM: _adam(AdamStep),
    OptimizerKind.LION: _lion,
    OptimizerKind.SGD: _sgd,
    OptimizerKind.SGD_MOMENTUM: _momentum,
    OptimizerKind.ADAGRAD: _adagrad,
}
