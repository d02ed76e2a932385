"""What one configuration of the zoo is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from profiler.source import Loss

Build = Callable[[], nn.Module]
Batch = Callable[[], Any]


@dataclass(frozen=True)
class Configuration:
    """A model, a batch and how it is trained."""

    name: str
    architecture: str
    build: Build
    batch: Batch
    """On the CPU: a dict of keyword arguments or a tensor."""
    loss: Loss | None
    """``None`` where the model returns its own."""
    precision: str
    optimizer: str
    clip: bool
    held_out: bool
    """Nobody looks at its error while the profiler is worked on."""


@dataclass(frozen=True)
class Architecture:
    """A family of configurations; all of one architecture are held out, or none."""

    name: str
    held_out: bool = False

    def runs(
        self, size: str, build: Build, batch: Batch, ways: str, loss: Loss | None = None
    ) -> Iterator[Configuration]:
        """One configuration for each of ``ways``, such as "amp/adamw amp-fp16/sgd/clip"."""
        for way in ways.split():
            precision, optimizer, *clip = way.split("/")
            name = "-".join([self.name, size, precision, optimizer, *clip])
            yield Configuration(
                name, self.name, build, batch, loss, precision, optimizer, clip == ["clip"], self.held_out
            )


def tokens(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """Random token numbers."""
    return torch.randint(0, vocabulary, (batch, length))


def text(batch: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """A batch for a language model that computes its own loss."""
    ids = tokens(batch, length, vocabulary)
    return {"input_ids": ids, "labels": ids}


def padded_text(batch: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """The same with rows of different lengths, padded at their ends."""
    lengths = torch.linspace(length // 2, length, batch).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {**text(batch, length, vocabulary), "attention_mask": mask}


def pictures(batch: int, size: int, classes: int = 1000) -> dict[str, torch.Tensor]:
    """A batch for a transformers model that classifies images."""
    return {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.randint(0, classes, (batch,))}
