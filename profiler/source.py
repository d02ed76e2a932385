"""The contract with a person's own model.py: where its model, batch and loss are found."""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from profiler.blame import explained
from profiler.errors import SourceError

Loss = Callable[[Any, Any], torch.Tensor]
"""``loss(outputs, batch)``: the scalar to train on."""

BUILD_LINES = """\
    def build_model():
        model = {name}(...)
        return model"""
LAZY_LINES = """\
    def build_model():
        model = MyModel()
        model(example_batch(1))
        return model"""
BATCH_LINES = """\
    def example_batch(batch_size):
        tokens = torch.randint(0, 1000, (batch_size, 128))
        return {"input_ids": tokens, "labels": tokens}"""
LOSS_LINES = """\
    def loss(outputs, batch):
        logits = outputs
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())"""


@dataclass(frozen=True)
class ModelSource:
    """A model file that was run. ``load_source`` makes it; every method raises SourceError for the file's faults."""

    path: Path
    name: str
    module: ModuleType

    def build(self) -> nn.Module:
        """The model: from ``build_model()``, ``model``, or the one class that constructs without arguments."""
        builder = self._builder()
        with explained(f"{builder.__name__}() of {self.path.name} raises", self.path):
            model = builder()
        if not isinstance(model, nn.Module):
            raise SourceError(
                f"build_model() of {self.path.name} returned {_a(model)}; it must return the model:\n"
                + BUILD_LINES.format(name="MyModel")
            )
        if any(nn.parameter.is_lazy(p) for p in model.parameters()):
            raise SourceError(
                f"the model of {self.path.name} has lazy modules, without shapes so far; run a batch through it:\n"
                + LAZY_LINES
            )
        return model

    def build_abstract(self) -> nn.Module:
        """The model on the meta device, without memory for its parameters; the real one where that fails."""
        try:
            with torch.device("meta"):
                return self.build()
        except SourceError:
            return self.build()

    def example_batch(self, batch_size: int) -> Any:
        """One batch: a dict of keyword arguments, a tuple of arguments, or a tensor."""
        make = getattr(self.module, "example_batch", None)
        if not callable(make):
            raise SourceError(f"{self.path.name} has no example batch: add example_batch(batch_size)\n{BATCH_LINES}")
        with explained(f"example_batch({batch_size}) of {self.path.name} raises", self.path):
            batch = make(batch_size)
        check_batch(batch, f"example_batch({batch_size}) of {self.path.name}")
        return batch

    @property
    def has_train_batches(self) -> bool:
        """Whether the file has data of its own."""
        return callable(getattr(self.module, "train_batches", None))

    def train_batches(self, batch_size: int) -> Iterator[Any]:
        """The file's ``train_batches(batch_size)``, or the example batch over and over."""
        if not self.has_train_batches:
            batch = self.example_batch(batch_size)
            while True:
                yield batch
        with explained(f"train_batches({batch_size}) of {self.path.name} raises", self.path):
            batches = iter(self.module.train_batches(batch_size))
        while True:
            with explained(f"train_batches({batch_size}) of {self.path.name} raises", self.path):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            check_batch(batch, f"train_batches({batch_size}) of {self.path.name}")
            yield batch

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """The scalar to train on: the file's ``loss(outputs, batch)``, or what the model returns."""
        own = getattr(self.module, "loss", None)
        if not callable(own):
            return default_loss(outputs, self.path.name)
        with explained(f"loss(outputs, batch) of {self.path.name} raises", self.path):
            value = own(outputs, batch)
        return check_loss(value, f"loss(outputs, batch) of {self.path.name} returned")

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Run the model on a batch; returns the loss."""
        return loss_of(model, batch, self.loss, self.path)

    def _builder(self) -> Callable[[], Any]:
        build = getattr(self.module, "build_model", None)
        if callable(build):
            return build
        model = getattr(self.module, "model", None)
        if isinstance(model, nn.Module):

            def module_level() -> nn.Module:
                return model

            return module_level
        own = [c for c in vars(self.module).values() if _is_model_class(c) and c.__module__ == self.module.__name__]
        ready = [c for c in dict.fromkeys(own) if _constructs_without_arguments(c)]
        if len(ready) == 1:
            return ready[0]
        found = f"several that could be meant ({', '.join(c.__name__ for c in ready)})" if ready else "none"
        lines = BUILD_LINES.format(name=(ready or own or [nn.Module])[-1].__name__ if ready or own else "MyModel")
        raise SourceError(f"{self.path.name} must say which model to use, and has {found}: add build_model()\n{lines}")


def load_source(path: Path | str) -> ModelSource:
    """Run a model file as a script would be, its folder on ``sys.path``; code under a main guard does not run.

    Raises SourceError when the file is missing, is not Python, or raises.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise SourceError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if path.suffix != ".py":
        raise SourceError(f"{path.name} is not a Python file; name the .py file that defines the model")
    # A name of its own, under which pickle and dataclasses find the file's classes.
    name = f"_model_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    folder = str(path.parent)
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    arguments, sys.argv = sys.argv, [str(path)]
    sys.modules[name] = module
    try:
        with explained(f"{path.name} raises when it is run", path):
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.argv = arguments
    return ModelSource(path, path.stem, module)


def call_model(model: Callable[..., Any], batch: Any) -> Any:
    """Call the model: a dict as keyword arguments, a tuple as arguments, a tensor as the only one."""
    if isinstance(batch, dict):
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


def default_loss(outputs: Any, where: str = "the model file") -> torch.Tensor:
    """The model's output where it is a scalar, or else its ``loss``."""
    value = outputs
    if isinstance(outputs, dict):
        value = outputs.get("loss")
    elif not isinstance(outputs, torch.Tensor):
        value = getattr(outputs, "loss", None)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return check_loss(value, "the model returned")
    raise SourceError(
        f"the model returns {_a(outputs)}, which is no loss: add loss(outputs, batch) to {where}\n{LOSS_LINES}"
    )


def check_loss(value: Any, what: str) -> torch.Tensor:
    """The value, if backward can start from it."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise SourceError(f"{what} {_a(value)}; the loss must be a tensor with one element:\n{LOSS_LINES}")
    if torch.is_grad_enabled() and not value.requires_grad:
        raise SourceError(f"{what} a loss that no trainable parameter leads to; nothing could be trained")
    return value


def check_batch(batch: Any, what: str) -> None:
    """Raise SourceError unless it is a dict with string keys, a tuple or a tensor."""
    if isinstance(batch, torch.Tensor | tuple) or (isinstance(batch, dict) and all(isinstance(k, str) for k in batch)):
        return
    raise SourceError(
        f"{what} is {_a(batch)}; it must be a dict of keyword arguments, a tuple of arguments or a tensor:\n"
        + BATCH_LINES
    )


def _is_model_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _constructs_without_arguments(cls: type) -> bool:
    try:
        inspect.signature(cls).bind()
    except (TypeError, ValueError):
        return False
    return True


def _a(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
