"""The library's two verbs that are more than a name: plan a profile, initialize an engine."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, Dataset

from memplan.audit import audit, check_plan
from memplan.errors import PlanningError
from memplan.machine import Machine, detect
from memplan.quick_rates import rates_of
from memplan.rates import Rates
from memplan.search import plan as search_plan
from memplan.search import precision_of
from memplan.units import units_of
from offload.chunked_loss import in_chunks
from offload.engine import Engine
from offload.plan import MomentFormat, OptimizerKind, Plan, Precision, Target
from profiler.contract import ModelSource
from profiler.device import find_device
from profiler.errors import ProfilerError
from profiler.profile import ModelProfile
from profiler.run import profile_model, profile_source


@wraps(profile_model)
def profile(*args: Any, **kwargs: Any) -> ModelProfile:
    """As the profiler's, with the loss in chunks too, where the engine can compute it so."""
    return profile_model(*args, **{"chunked": in_chunks, **kwargs})


def plan(
    profile: ModelProfile,
    machine: Machine | None = None,
    batch_size: int | None = None,
    rates: Rates | None = None,
    target: Target = Target.MEMPLAN,
    optimizer: OptimizerKind | None = None,
    moments: MomentFormat | str | None = None,
) -> Plan:
    """The fastest plan that is sure to fit ``machine``, by default this one.

    ``batch_size`` is the samples of one optimizer step, by default those of the profile on every GPU; the precision is
    the profile's. ``rates`` are by default those of the machine's calibration, or measured in about two seconds where
    it is here. ``target`` is the engine that will train, ``optimizer`` what with: by default what the profile was made
    with, or AdamW. ``moments`` is how its moments are stored: "bf16" and "8bit" take less than "fp32", and change the
    numbers. Raises NothingFits, and PlanningError for a precision that the engine does not train in.
    """
    if moments is not None and moments not in {*MomentFormat}:
        raise PlanningError(f"moments are stored in one of {', '.join(MomentFormat)}, not in {moments!r}")
    machine = machine or detect()
    precision = precision_of(profile)
    size = profile.batch_size * machine.gpus if batch_size is None else batch_size
    rates = rates or rates_of(machine, precision)
    found = search_plan(
        profile,
        machine,
        rates,
        batch_size=size,
        precision=precision,
        target=target,
        optimizer=optimizer,
        moments=MomentFormat(moments) if moments is not None else None,
    )
    problems = audit(found, units_of(profile))
    assert not problems, problems
    return found


def profile_for(
    source: ModelSource, machine: Machine, rates: Rates, batch_size: int, precision: Precision
) -> ModelProfile:
    """The profile of a model file that a plan for this machine needs: of one GPU's part of the batch, with its times.

    ``batch_size`` is the samples of one optimizer step over all GPUs.
    """
    name = machine.gpu_name if machine.device == "cuda" else None
    try:
        device = find_device(name).name if name else None
    except ProfilerError:  # a GPU that nobody described: seconds come from FLOPs
        device = None
    size = max(1, batch_size // machine.gpus)
    return profile_source(
        source,
        size,
        precision.value,
        device=device,
        calibration=rates.kernels if device is not None else None,
        chunked=in_chunks,
    )


def initialize(
    model: nn.Module,
    plan: Plan | str | Path,
    optimizer: torch.optim.Optimizer | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any | Callable[[torch.optim.Optimizer], Any] | None = None,
    max_grad_norm: float | None = None,
    weights: str | Path | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    *,
    update_in_backward: bool = False,
    mesh: DeviceMesh | None = None,
) -> tuple[Engine, torch.optim.Optimizer, DataLoader[Any] | None, Any]:
    """(engine, optimizer, dataloader, lr_scheduler) for training ``model`` by ``plan``, a Plan or a path to one.

    ``weights`` is a safetensors file, or a folder with one or with shards, to start from. Parameters on meta
    (``on_meta``) become real unit by unit: read from there, or else by the model's own initialisation.
    ``optimizer`` is one of torch's, or ``offload.lion.Lion``, over the model's parameters, of the kind that the plan
    names; by default one with its own defaults.
    ``lr_scheduler`` is any torch scheduler on it, or a function that makes one of it; ``engine.step`` steps it. The
    dataloader, made where ``training_data`` is given, yields shuffled micro-batches of the plan's size.
    ``grad_scaler`` has the rules of fp16's loss scale, by default torch's; ``update_in_backward`` is described at
    ``Engine``. For a model that ``parallelize_module`` divided, ``mesh`` is the 2-D mesh that its axis belongs to; the
    plan's ``gpus`` are the ranks of the other axis, that of the data. Raises PlanError for a plan that does not add up.
    """
    if not isinstance(plan, Plan):
        plan = Plan.load(Path(plan))
    check_plan(plan, model)
    engine = Engine(
        model,
        plan,
        optimizer,
        max_grad_norm=max_grad_norm,
        weights=weights,
        grad_scaler=grad_scaler,
        update_in_backward=update_in_backward,
        mesh=mesh,
    )
    if callable(lr_scheduler):
        lr_scheduler = lr_scheduler(engine.optimizer)
    if lr_scheduler is not None:
        engine.step_scheduler(lr_scheduler)
    loader = None
    if training_data is not None:
        loader = DataLoader(training_data, batch_size=plan.micro_batch_size, shuffle=True, drop_last=True)
    return engine, engine.optimizer, loader, lr_scheduler
