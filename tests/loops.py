"""The loop that people write around an engine, for tests that look at what comes of it."""

from collections.abc import Iterable

import torch

from offload.engine import Engine


def losses_of(engine: Engine, data: Iterable[torch.Tensor]) -> list[float]:
    """The loss of each of these batches, with a step behind every one."""
    losses = []
    for tokens in data:
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
