"""What must be right about model, plan and processes before an engine allocates anything."""

import math
import warnings
from collections import defaultdict
from numbers import Real
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from offload.axes import Axes, axes_of, check_tensor_parallel
from offload.errors import OffloadError
from offload.gradients import hooks_after_accumulation
from offload.plan import Plan
from offload.setup import check_can_run
from offload.shared_memory import check_memory
from offload.state import weight_dtype
from offload.unit import check_model, check_recompute
from offload.update_in_backward import check_early_updates


def checked_axes(
    model: nn.Module,
    plan: Plan,
    mesh: DeviceMesh | None,
    max_norm: float | None,
    weights: str | Path | None,
    *,
    update_in_backward: bool,
) -> Axes | None:
    """Of the processes that train; raises PlanError and OffloadError for what this version can not do."""
    check_can_run(plan)
    check_norm(max_norm)
    check_model(plan, model)
    check_recompute(plan, model)
    check_memory(model)
    check_hooks(model, plan)
    if update_in_backward:
        check_early_updates(plan, max_norm)
    axes = axes_of(plan, model, mesh)
    files = weights is not None, "reading first values from files (weights)"
    check_tensor_parallel(axes, plan, model, (files, (update_in_backward, "update_in_backward")))
    _warn_of_types(model, plan)
    return axes


def check_loss(loss: object, *, stepped: bool) -> None:
    """Raise OffloadError for what has no backward pass: ``stepped`` tells of a step since the last forward pass."""
    if not isinstance(loss, torch.Tensor):
        raise OffloadError(
            f"backward() takes the loss, a tensor, and was given a {type(loss).__name__}; a model of transformers has "
            "one where its batch has labels"
        )
    if not loss.requires_grad:
        raise OffloadError(
            "this loss has no gradient: it was computed under no_grad, or of nothing that is trained; compute it by "
            "engine(...), outside of no_grad"
        )
    if stepped:
        raise OffloadError("step() was called between this loss's forward pass and its backward; call it after both")


def check_hooks(model: nn.Module, plan: Plan) -> None:
    """Raise OffloadError where hooks would be given other gradients than with plain PyTorch."""
    if plan.gradient_accumulation_steps == 1:
        return
    for name, parameter in model.named_parameters():
        if hooks_after_accumulation(parameter):
            raise OffloadError(
                f"parameter {name} has a hook after the accumulation of its gradient, which would be given that "
                f"of one micro-batch, not the sum of {plan.gradient_accumulation_steps}: remove it, or plan one "
                "micro-batch a step"
            )


def check_norm(max_norm: object) -> None:
    """Raise OffloadError for what gradients can not be clipped to."""
    if max_norm is not None and (not isinstance(max_norm, Real) or math.isnan(max_norm) or max_norm < 0):
        raise OffloadError(
            f"max_grad_norm is {max_norm!r}; it must be the largest norm of the gradients, a number of at least 0, or "
            "None, which does not clip"
        )


def _warn_of_types(model: nn.Module, plan: Plan) -> None:
    """Say which of a model's parameters compute in another type than they had beside others that do not."""
    names: dict[torch.dtype, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            names[parameter.dtype].append(name)
    kept = weight_dtype(plan.precision)
    changed = [
        f"{first}{f' and {len(others)} more' if others else ''}, of {_said(dtype)}, become {_said(kept)}"
        for dtype, (first, *others) in names.items()
        if dtype != kept
    ]
    if len(names) > 1 and changed:
        warnings.warn(
            "the model has parameters of several types, and the engine gives all of them that of the plan's precision "
            f"({plan.precision}): {'; '.join(changed)}. Where that is not meant, plan in another precision, or "
            "give all parameters one type before Engine()",
            RuntimeWarning,
            stacklevel=4,
        )


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
