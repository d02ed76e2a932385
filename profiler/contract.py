"""What every source of a model offers, whether a Python file or a configuration: a model, a batch and a loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_leaves_with_path
from torch.utils.data import DataLoader, Dataset

from profiler.abstract import built_without_memory
from profiler.blame import explained
from profiler.errors import SourceError

Loss = Callable[[Any, Any], torch.Tensor]
"""``loss(outputs, batch)``: the scalar to train on."""

LAZY_LINES = """\
    def build_model():
        model = MyModel()
        model(example_batch(1))
        return model"""
BATCH_LINES = """\
    def example_batch(batch_size):
        tokens = torch.randint(0, 1000, (batch_size, 128))
        return {"input_ids": tokens, "labels": tokens}"""
LOADER_LINES = """\
    def example_batch(batch_size):
        return next(iter(torch.utils.data.DataLoader(my_dataset, batch_size)))"""
LOSS_LINES = """\
    def loss(outputs, batch):
        logits = outputs
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())"""


class ModelSource(ABC):
    """Where a model comes from. ``load_source`` makes one; every method raises SourceError for the person's faults."""

    path: Path
    name: str
    folder: Path | None = None
    """The folder that was named, in whose files the model's weights may be."""

    @property
    def without_weights(self) -> str | None:
        """Why a person who may expect trained weights gets random ones, unless they are in the folder."""
        return None

    @abstractmethod
    def build(self) -> nn.Module:
        """The real model, on the CPU."""

    @abstractmethod
    def example_batch(self, batch_size: int) -> Any:
        """One batch: a mapping of keyword arguments, a tuple of arguments, or a tensor."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """The scalar to train on."""

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What was chosen where the source leaves it open, one sentence each."""
        return ()

    @property
    def has_train_batches(self) -> bool:
        """Whether the source has data of its own."""
        return False

    def train_batches(self, batch_size: int) -> Iterator[Any]:
        """Batches to train on: where there is no data, the example batch over and over."""
        batch = self.example_batch(batch_size)
        while True:
            yield batch

    def build_abstract(self) -> nn.Module:
        """The model without memory for its large tensors; the real one where that fails and it is small enough."""
        return built_without_memory(self.build, self.path.name)

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Run the model on a batch; returns the loss."""
        return loss_of(model, batch, self.loss, self.path)


def call_model(model: Callable[..., Any], batch: Any) -> Any:
    """Call the model: a mapping as keyword arguments, a tuple as arguments, a tensor as the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


def loss_of(model: nn.Module, batch: Any, loss: Loss, path: Path | None = None) -> torch.Tensor:
    """Run the model on a batch and take the loss, the faults of either explained."""
    where = f" of {path.name}" if path else ""
    with explained(f"the forward pass{where} fails on the example batch", path):
        outputs = call_model(model, batch)
    with explained(f"loss(outputs, batch){where} raises", path):
        return check_loss(loss(outputs, batch), f"loss(outputs, batch){where} returned")


def forward_with(loss: Loss | None) -> Callable[[nn.Module, Any], torch.Tensor]:
    """What runs a model on a batch and takes this loss, or without one the model's own."""
    return partial(loss_of, loss=loss or (lambda outputs, _: default_loss(outputs)))


def default_loss(outputs: Any, where: str = "the model file") -> torch.Tensor:
    """The model's output where it is a scalar, else its ``loss``, else the one scalar of a tuple or list."""
    value = _scalar_of(outputs)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return check_loss(value, "the model returned")
    raise SourceError(
        f"the model returns {described(outputs)}, which is no loss: add loss(outputs, batch) to {where}\n{LOSS_LINES}"
    )


def _scalar_of(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if hasattr(outputs, "loss") or not isinstance(outputs, tuple | list):
        return getattr(outputs, "loss", None)
    scalars = [t for t in outputs if isinstance(t, torch.Tensor) and t.dim() == 0 and t.is_floating_point()]
    return scalars[0] if len(scalars) == 1 else None


def check_loss(value: Any, what: str) -> torch.Tensor:
    """The value, if backward can start from it."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise SourceError(f"{what} {described(value)}; the loss must be a tensor with one element:\n{LOSS_LINES}")
    if torch.is_grad_enabled() and not value.requires_grad:
        raise SourceError(
            f"{what} a loss that no trainable parameter leads to; nothing could be trained (look for no_grad(), "
            "inference_mode() or detach() on the way, and for weights that are all frozen or quantised)"
        )
    return value


def checked_batch(batch: Any, what: str) -> Any:
    """The batch, a mapping as a plain dict; raises SourceError if it is none, or holds what is no tensor but should be.

    It must be a mapping with string keys, a tuple or a tensor.
    """
    if isinstance(batch, Mapping) and all(isinstance(k, str) for k in batch):
        batch = dict(batch)
    elif not isinstance(batch, torch.Tensor | tuple):
        raise SourceError(f"{what} is {described(batch)}; {_instead_of(batch)}")
    for path, leaf in tree_leaves_with_path(batch):
        if type(leaf).__module__ == "numpy":
            raise SourceError(
                f"{what} has a numpy {type(leaf).__name__} at {keystr(path)}; a model is trained on tensors: "
                "wrap it in torch.as_tensor(...)"
            )
    return batch


def plain_model(model: nn.Module) -> nn.Module:
    """The model without what torch.compile or DistributedDataParallel wrapped around it.

    Raises SourceError if its parameters have no shapes, or are no longer its own.
    """
    for parameter in model.parameters():
        if nn.parameter.is_lazy(parameter):
            raise SourceError(
                f"the model has lazy modules, without shapes so far; run a batch through it:\n{LAZY_LINES}"
            )
        if hasattr(parameter, "placements"):
            raise SourceError("the model is sharded already (FSDP, DTensor); profile it before it is")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _instead_of(batch: Any) -> str:
    form = "it must be a dict of keyword arguments, a tuple of arguments or a tensor:\n"
    if isinstance(batch, Dataset | DataLoader | Iterator) or (
        isinstance(batch, type) and issubclass(batch, Dataset | DataLoader)
    ):
        return f"it must give one batch of it, {form.removeprefix('it must be ')}{LOADER_LINES}"
    if isinstance(batch, list):
        return f"{form.removesuffix(':' + chr(10))}; return tuple(batch) if its members are the model's arguments"
    return form + BATCH_LINES


def described(value: Any) -> str:
    """What a value is, with an article."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None:
        return "None"
    name = f"class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
