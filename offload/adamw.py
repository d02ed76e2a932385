"""Hyperparameters: what a torch.optim.AdamW and the schedulers on it say about each parameter's next update."""

import torch
from torch import nn

from offload.errors import OffloadError
from offload.optimizer import AdamWStep
from offload.unit import Field, Unit
from offload.unit_update import Segment


class Hyperparameters:
    """Reads a torch AdamW's parameter groups at every step, and counts each parameter's own steps."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        if type(optimizer) is not torch.optim.AdamW:
            raise OffloadError(
                f"the optimizer is {type(optimizer).__name__}; this version trains with torch.optim.AdamW only"
            )
        for group in optimizer.param_groups:
            if refused := [key for key in ("amsgrad", "maximize", "differentiable") if group.get(key)]:
                raise OffloadError(f"AdamW with {refused[0]}=True is not supported; leave it out")
        if optimizer.state:
            raise OffloadError(
                "the optimizer has state already; give the engine one that has not stepped, or resume from a checkpoint"
            )
        self.optimizer = optimizer
        self.steps: dict[str, int] = {}
        """Updates of each parameter so far, by name: one that got no gradient was not updated."""
        self._group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}

    def begin_update(self, unit: Unit, present: set[str]) -> tuple[Segment, ...]:
        """How the unit's elements are updated now, and count it; parameters without gradient are left out."""
        segments: list[Segment] = []
        updated: Field | None = None
        for field in unit.trainable:
            before, updated = updated, None  # the field ahead of this one, where it was updated
            if field.name not in present or field.parameter not in self._group_of or not field.shape.numel():
                continue
            self.steps[field.name] = self.steps.get(field.name, 0) + 1
            how = self._how(field)
            updated = field
            # Neighbours are updated in one piece; the gap between them is padding, which nobody reads.
            if before is not None and segments[-1].how == how:
                segments[-1] = Segment(segments[-1].start, field.stop, how)
            else:
                segments.append(Segment(field.start, field.stop, how))
        return tuple(segments)

    def _how(self, field: Field) -> AdamWStep:
        group = self.optimizer.param_groups[self._group_of[field.parameter]]
        beta1, beta2 = group["betas"]
        return AdamWStep(
            learning_rate=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            step=self.steps[field.name],
        )
