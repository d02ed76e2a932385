"""The checkpoints of a run: when one is due, what is told of it, which one a resumed run goes on from, and how."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload import checkpoint
from offload.checkpoint import Checkpoint
from offload.engine import Engine
from offload.errors import CheckpointError
from offload.events import EventLog
from offload.hyperparameters import default_optimizer
from offload.plan import Plan
from offload.saver import Saving


class RunCheckpoints:
    """Saves beside the training every so many steps, and at the end. One that fails is a warning, but for the last."""

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        every: int | None,
        keep: int,
        events: EventLog,
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._directory, self._every, self._keep = engine, directory, every, keep
        self._events, self._say = events, say
        self._saving: Saving | None = None
        self._begun_at = engine.global_step

    def after_step(self, client_state: dict[str, Any]) -> None:
        """Begin a checkpoint where one is due, and none is being written; tell of one that has ended."""
        step, saving = self._engine.global_step, self._saving
        due = self._every is not None and step // self._every > self._begun_at // self._every
        # Several ranks begin in the same step, so none may go by when it saw the one before end.
        if saving is not None and (saving.done or (due and self._engine.plan.gpus > 1)):
            saving.settle()
            self._tell(saving)
            self._saving = None
        if due and self._saving is None:
            self._begin(client_state)

    def finish(self, client_state: dict[str, Any]) -> Path:
        """The path of a checkpoint of where the run is now; raises CheckpointError."""
        if (before := self._saving) is not None:
            before.settle()
            self._tell(before)
            if before.step == self._engine.global_step and before.error is None:
                return before.path
        saving = self._begin(client_state)
        path = saving.wait()
        self._tell(saving)
        return path

    def _begin(self, client_state: dict[str, Any]) -> Saving:
        self._begun_at = self._engine.global_step
        self._saving = self._engine.save_checkpoint(self._directory, client_state=client_state, keep=self._keep)
        return self._saving

    def _tell(self, saving: Saving) -> None:
        if (error := saving.error) is not None:
            self._events.write("warning", step=saving.step, message=str(error))
            self._say(f"warning: {error}")
        else:
            written = {"seconds": saving.seconds, "bytes": saving.size_bytes}
            self._events.write("checkpoint", step=saving.step, path=str(saving.path), **written)


def to_resume(directory: Path, micro_batch_size: int) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each newer one that is damaged.

    Raises CheckpointError where there is none, or its data can not go on with this micro-batch.
    """
    found, damaged = checkpoint.newest_whole(directory)
    warnings = [f"{sentence}; going on from {found.path.name}, the one before" for sentence in damaged]
    if (position := _position(found)) is None:
        warnings.append(f"{found.path} does not say where its data was, so that begins at its first batch")
    elif position["micro_batch_size"] != micro_batch_size:
        raise CheckpointError(
            f"{found.path} was trained in micro-batches of {position['micro_batch_size']}, the plan has "
            f"{micro_batch_size}: the data could not go on where it was; keep the micro-batch"
        )
    return found, warnings


def batches_drawn(found: Checkpoint) -> int:
    """Micro-batches that the run had drawn from its data, for all processes."""
    position = _position(found)
    return position["batches"] if position is not None else 0


def _position(found: Checkpoint) -> dict[str, Any] | None:
    """As ``memplan train`` keeps it; None in a checkpoint of somebody's own loop, or one that was imported."""
    kept = found.training["client_state"]
    return kept if isinstance(kept, dict) and kept.keys() == {"batches", "micro_batch_size"} else None


def optimizer_of(plan: Plan, model: nn.Module, learning_rate: float, found: Checkpoint | None) -> torch.optim.Optimizer:
    """The plan's, with the parameter groups of the checkpoint that the run goes on from, or one group."""
    parameters = dict(model.named_parameters())
    groups = found.training.get("group_parameters") if found is not None else None
    first, *others = [[parameters[name] for name in group if name in parameters] for group in groups or [parameters]]
    optimizer = default_optimizer(plan.optimizer, first, lr=learning_rate)
    for group in others:
        optimizer.add_param_group({"params": [p for p in group if p.requires_grad]})
    return optimizer
