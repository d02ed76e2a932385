"""From a model to its ModelProfile."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from profiler.calibration import Calibration
from profiler.contract import Loss, ModelSource, checked_batch, forward_with, plain_model
from profiler.errors import ProfilerError
from profiler.optimizers import check_optimizer
from profiler.profile import ModelProfile
from profiler.study import Batches, Chunked, Study, smaller_sizes
from profiler.timed import find_target
from profiler.trees import tensors_in


def profile_source(
    source: ModelSource,
    batch_size: int,
    precision: str = "fp32",
    optimizer: str = "adamw",
    clip: bool = False,
    device: str | None = None,
    calibration: Calibration | Path | None = None,
    chunked: Chunked | None = None,
) -> ModelProfile:
    """Profile a model file with ``example_batch(batch_size)``; parameters are not materialised where that works.

    ``device`` is the name of one whose times to predict (``profiler.device``), ``calibration`` its rates or a file.
    ``chunked`` gives what to call for a loss in chunks; with it there are activation points for that too.
    Raises SourceError when the file's model, batch and loss do not fit together, ProfilerError for other input.
    """
    check_optimizer(optimizer)
    target = find_target(device, calibration)
    if batch_size < 1:
        raise ProfilerError(f"batch_size is {batch_size}; it must be at least 1")
    study = Study.of(
        source.build_abstract(),
        forward=source.forward,
        precision=precision,
        optimizer=optimizer,
        clip=clip,
        target=target,
        name=source.name,
        where=source.path.name,
        assumptions=lambda: source.assumptions,
        chunked=chunked,
    )
    sizes = (batch_size, *smaller_sizes(batch_size))
    return study.profile({size: partial(source.example_batch, size) for size in sizes}, batch_size)


def profile_model(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    precision: str = "fp32",
    optimizer: str = "adamw",
    clip: bool = False,
    device: str | None = None,
    calibration: Calibration | Path | str | None = None,
    name: str | None = None,
    batch_size: int | None = None,
    chunked: Chunked | None = None,
) -> ModelProfile:
    """Profile a module in memory on a batch: a dict of keyword arguments, a tuple of arguments or a tensor.

    ``loss(outputs, batch)`` gives the scalar to train on; without it the output, or its ``loss``, is taken.
    ``batch_size`` defaults to the first dimension of the batch's first tensor. Model and batch are left as they were.
    ``device`` is the name of one whose times to predict (``profiler.device``), ``calibration`` its rates or a file.
    ``chunked`` gives what to call for a loss in chunks; with it there are activation points for that too.
    """
    check_optimizer(optimizer)
    target = find_target(device, calibration)
    model, batch = plain_model(model), checked_batch(batch, "the batch")
    if batch_size is None:
        batch_size = next((len(t) for t in tensors_in(batch) if t.dim()), 1)
    batches: Batches = {batch_size: lambda: batch}
    if all(t.dim() and len(t) == batch_size for t in tensors_in(batch)):
        batches |= {size: partial(_first, batch, size) for size in smaller_sizes(batch_size)}
    study = Study.of(
        model,
        forward=forward_with(loss),
        precision=precision,
        optimizer=optimizer,
        clip=clip,
        target=target,
        name=name or type(model).__name__,
        where="the model",
        chunked=chunked,
    )
    return study.profile(batches, batch_size)


def _first(batch: Any, size: int) -> Any:
    """So many samples of a batch."""
    return tree_map_only(torch.Tensor, lambda t: t[:size], batch)
