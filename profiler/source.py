"""The contract with a person's own model.py: where its model, batch and loss are found."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from profiler.abstract import WithoutCuda, memory_guarded
from profiler.blame import explained
from profiler.contract import (
    BATCH_LINES,
    ModelSource,
    check_loss,
    checked_batch,
    default_loss,
    described,
    plain_model,
)
from profiler.errors import SourceError
from profiler.huggingface import CONFIG_NAME, HuggingFaceSource

BUILD_LINES = """\
    def build_model():
        model = {name}(...)
        return model"""
SEQUENCE_LINES = """\
    def example_batch(batch_size, seq_len=128):
        tokens = torch.randint(0, 1000, (batch_size, seq_len))
        return {"input_ids": tokens, "labels": tokens}"""
SEQUENCE_NAMES = ("seq_len", "sequence_length")
"""What example_batch and train_batches may call a second parameter, for the length of sequences."""


@dataclass(frozen=True)
class ModelFile(ModelSource):
    """A Python file that was run."""

    path: Path
    name: str
    module: ModuleType
    sequence_length: int | None = None
    """What the batches are to have, None for what the file chooses."""

    def build(self) -> nn.Module:
        """The model: from ``build_model()``, ``model``, or the one class that constructs without arguments."""
        builder = self._builder()
        with explained(f"{builder.__name__}() of {self.path.name} raises", self.path):
            model = builder()
        if not isinstance(model, nn.Module):
            raise SourceError(
                f"build_model() of {self.path.name} returned {described(model)}; it must return the model:\n"
                + BUILD_LINES.format(name="MyModel")
            )
        return plain_model(model)

    def example_batch(self, batch_size: int) -> Any:
        """What the file's ``example_batch(batch_size)`` returns."""
        make = getattr(self.module, "example_batch", None)
        if not callable(make):
            raise SourceError(f"{self.path.name} has no example batch: add example_batch(batch_size)\n{BATCH_LINES}")
        what = f"example_batch({batch_size}) of {self.path.name}"
        with explained(f"{what} raises", self.path), nullcontext() if torch.cuda.is_available() else WithoutCuda():
            batch = make(batch_size, **self._sequence_argument(make))
        return checked_batch(batch, what)

    @property
    def has_train_batches(self) -> bool:
        """Whether the file has ``train_batches``."""
        return callable(getattr(self.module, "train_batches", None))

    def train_batches(self, batch_size: int) -> Iterator[Any]:
        """The file's ``train_batches(batch_size)``, or the example batch over and over."""
        if not self.has_train_batches:
            yield from super().train_batches(batch_size)
        what = f"train_batches({batch_size}) of {self.path.name}"
        make = self.module.train_batches
        with explained(f"{what} raises", self.path):
            batches = iter(make(batch_size, **self._sequence_argument(make)))
        while True:
            with explained(f"{what} raises", self.path):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield checked_batch(batch, what)

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """The scalar to train on: the file's ``loss(outputs, batch)``, or what the model returns."""
        own = getattr(self.module, "loss", None)
        if not callable(own):
            return default_loss(outputs, self.path.name)
        with explained(f"loss(outputs, batch) of {self.path.name} raises", self.path):
            value = own(outputs, batch)
        return check_loss(value, f"loss(outputs, batch) of {self.path.name} returned")

    def _sequence_argument(self, make: Callable[..., Any]) -> dict[str, int]:
        if self.sequence_length is None:
            return {}
        for name in SEQUENCE_NAMES:
            if name in inspect.signature(make).parameters:
                return {name: self.sequence_length}
        raise SourceError(
            f"{make.__name__}(batch_size) of {self.path.name} takes no sequence length, so that --seq "
            f"{self.sequence_length} can not reach it: add a parameter seq_len\n{SEQUENCE_LINES}"
        )

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


def load_source(path: Path | str, sequence_length: int | None = None) -> ModelSource:
    """The source of a model: a Python file, a Hugging Face config.json, or a directory that holds one.

    ``sequence_length`` is what the batches are to have, None for what the source chooses. Raises SourceError when the
    file is missing, is neither, or raises.
    """
    path = Path(path).resolve()
    folder = path if path.is_dir() else None
    if folder and (folder / CONFIG_NAME).is_file():
        path /= CONFIG_NAME
    if not path.exists():
        raise SourceError(f"{path} does not exist")
    if path.is_dir():
        raise SourceError(f"{path} is a folder without {CONFIG_NAME}; name the .py file that defines the model")
    if path.suffix == ".json":
        return HuggingFaceSource.load(path, sequence_length, folder)
    if path.suffix != ".py":
        raise SourceError(
            f"{path.name} is neither a Python file nor a Hugging Face {CONFIG_NAME}; "
            "name the .py file that defines the model"
        )
    return _run(path, sequence_length)


def _run(path: Path, sequence_length: int | None) -> ModelFile:
    """Run a model file as a script would be, its folder on ``sys.path``; code under a main guard does not run."""
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
        with memory_guarded(path.name), explained(f"{path.name} raises when it is run", path):
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.argv = arguments
    return ModelFile(path, path.stem, module, sequence_length)


def _is_model_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _constructs_without_arguments(cls: type) -> bool:
    try:
        inspect.signature(cls).bind()
    except (TypeError, ValueError):
        return False
    return True
