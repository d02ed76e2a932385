"""What must be right about model, plan and processes before an engine allocates anything."""

from pathlib import Path

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from offload.axes import Axes, axes_of, check_tensor_parallel
from offload.plan import Plan
from offload.setup import check_can_run
from offload.shared_memory import check_memory
from offload.unit import check_model, check_recompute
from offload.update_in_backward import check_early_updates


def checked_axes(
    model: nn.Module,
    plan: Plan,
    mesh: DeviceMesh | None,
    max_norm: float | None,
    weights: Path | None,
    *,
    update_in_backward: bool,
) -> Axes | None:
    """Of the processes that train; raises PlanError and OffloadError for what this version can not do."""
    check_can_run(plan)
    check_model(plan, model)
    check_recompute(plan, model)
    check_memory(model)
    if update_in_backward:
        check_early_updates(plan, max_norm)
    axes = axes_of(plan, model, mesh)
    files = weights is not None, "reading first values from files (weights)"
    check_tensor_parallel(axes, plan, model, (files, (update_in_backward, "update_in_backward")))
    return axes
