"""Saving while training goes on: a lane copies the units piece by piece, another writes what is copied.

The order is kept by promises: copying begins when the last update has reached its tiers, and the next update of a unit
waits for ``copied``. [Note: what a checkpoint costs] in ``offload/snapshot.py``.
"""

import os
import queue
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offload import checkpoint
from offload.buffers import BUFFER, fingerprint
from offload.errors import CheckpointError
from offload.plain import plain
from offload.randomness import random_states
from offload.ranks import Ranks
from offload.snapshot import Abandoned, CopiedPiece, Piece, Staging, pieces_of, staging_bytes
from offload.streams import Done, Lane
from offload.tensor_file import Entry, TensorFile

if TYPE_CHECKING:
    from offload.engine import Engine


class Saving:
    """A checkpoint on its way. ``path`` is where it will be; until it is there, what was there before is."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step
        self.size_bytes = 0
        """Of its files, when it is on the disk."""
        self.staging_bytes = 0
        """Host memory that its copies may take at a time."""
        self.seconds: float | None = None
        """What it took, when it has ended."""
        self.copied_seconds: float | None = None
        """What it took until training could not wait for it any more."""
        self._began = time.perf_counter()
        self._ended: Done | None = None
        self._asked = False

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended is None or self._ended.settled

    @property
    def error(self) -> CheckpointError | None:
        """Why there is no checkpoint; None where there is one, or may still be one."""
        if not self.done:
            return None
        try:
            self.wait()
        except CheckpointError as error:
            return error
        return None

    def wait(self) -> Path:
        """Its path, when it is on the disk; raises CheckpointError where that failed."""
        self._asked = True
        if self._ended is not None:
            self._ended.synchronize()
        return self.path

    def settle(self) -> None:
        """Wait until it has ended, well or not."""
        if self._ended is not None:
            self._ended.settle()

    def warn(self) -> None:
        """Tell of an error that nobody asked for."""
        if not self._asked and (error := self.error) is not None:
            warnings.warn(str(error), RuntimeWarning, stacklevel=3)

    def _now(self) -> float:
        return time.perf_counter() - self._began


class Saver:
    """Makes the checkpoints of an engine, one at a time; ``ranks`` make them together, each a file of its own part."""

    def __init__(self, copying: Lane, writing: Lane, ranks: Ranks | None) -> None:
        self._copying, self._writing, self._ranks = copying, writing, ranks
        self._copied: dict[str, Done] = {}
        self._staging: Staging | None = None
        self._last: Saving | None = None

    def copied(self, name: str) -> Done | None:
        """When the unit may be changed, as far as a checkpoint is concerned; None at once."""
        done = self._copied.get(name)
        return None if done is None or done.settled else done

    def settle(self) -> None:
        """Wait until any unit may be changed."""
        for done in self._copied.values():
            done.synchronize()

    def abandon(self) -> None:
        """End the saving under way without a checkpoint; nobody needs to be warned of that."""
        if self._staging is not None and self._last is not None:
            self._staging.abandon()
            self._last._asked = True

    def close(self) -> None:
        """Wait for the saving under way."""
        if self._last is not None:
            self._last.settle()
            self._last.warn()
        self._copied, self._staging = {}, None

    def save(
        self,
        engine: "Engine",
        directory: Path,
        tag: str | None,
        client_state: Any,
        keep: int | None,
        after: Sequence[Done],
    ) -> Saving:
        """See ``Engine.save_checkpoint``; ``after`` is when the last update has reached its tiers."""
        self.close()
        tag = checkpoint.check_tag(tag if tag is not None else checkpoint.step_tag(engine.global_step))
        saving = self._last = Saving(directory / tag, engine.global_step)
        pieces = {
            s.unit.name: pieces_of(s, engine.plan.state_format, engine.plan.buckets.update_elements)
            for s in engine.states
        }
        every = [piece for unit in pieces.values() for piece in unit]
        spare = engine.plan.budget.host_bytes - engine.arena.capacity_bytes
        staging = self._staging = Staging(staging_bytes(every, max(0, spare)))
        saving.staging_bytes = staging.capacity_bytes
        small = _Small(engine, client_state)
        if self._ranks is not None and self._ranks.divides_tensors:
            small.facts["tensor_parallel"] = self._ranks.tensor_parts
        self._copied = {name: Done() for name in pieces}
        items: queue.SimpleQueue[CopiedPiece | BaseException] = queue.SimpleQueue()
        copied, store, ranks = self._copied, engine.store, self._ranks

        def copy() -> None:
            try:
                for done in after:
                    done.synchronize()
                for name, unit in pieces.items():
                    for piece in unit:
                        items.put(CopiedPiece(piece, staging.take(piece.size_bytes), store))
                    copied[name].finish(None)
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the checkpoint
                items.put(error)
            finally:
                for done in copied.values():
                    if not done.settled:
                        done.finish(None)
                saving.copied_seconds = saving._now()

        def write() -> None:
            try:
                _write(saving, directory, tag, ranks, _Parts(small, every, items, staging))
                if keep is not None and (ranks is None or ranks.number == 0):
                    with suppress(OSError):  # the next one tries again
                        checkpoint.prune(directory, keep)
            except BaseException as error:
                raise _explained(error, saving) from error
            finally:
                staging.abandon()
                saving.seconds = saving._now()

        self._copying.submit(copy)
        saving._ended = self._writing.submit(write)
        return saving


class _Small:
    """What is copied at once: buffers, random states, and all that is no tensor."""

    def __init__(self, engine: "Engine", client_state: Any) -> None:
        model, owned = engine.model, {id(f.parameter) for s in engine.states for f in s.unit.fields}
        # Clones: buffers may share memory with each other.
        self.rest = {f"{BUFFER}{n}": b.detach().cpu().clone() for n, b in model.named_buffers()}
        self.rest |= {f"parameter/{n}": p.detach().cpu() for n, p in model.named_parameters() if id(p) not in owned}
        self.random = {f"random/{name}": state for name, state in random_states(engine.device).items()}
        self.facts = {"step": engine.global_step, "precision": engine.plan.precision, "world_size": engine.plan.gpus}
        scheduler = engine.lr_scheduler
        self.training = {
            "parameters": _parameters(engine),
            "buffers": sorted(model.state_dict(keep_vars=True).keys() & dict(model.named_buffers()).keys()),
            "optimizer": engine.plan.optimizer,
            "moments": engine.plan.moments,
            "parameter_steps": dict(engine.hyperparameters.steps),
            "loss_scale": engine.loss_scale.state_dict() if engine.loss_scale is not None else None,
            "groups": [plain({k: v for k, v in g.items() if k != "params"}) for g in engine.optimizer.param_groups],
            "group_parameters": engine.hyperparameters.names_of_groups(),
            "scheduler": plain(scheduler.state_dict()) if scheduler is not None else None,
            "client_state": plain(client_state),
        }
        self.text = checkpoint.as_json(self.training)

    def buffers(self) -> dict[str, torch.Tensor]:
        """What of the rest a rank has for itself."""
        return {key: tensor for key, tensor in self.rest.items() if key.startswith(BUFFER)}


def _parameters(engine: "Engine") -> dict[str, dict[str, Any]]:
    """The parameters that units own, in the model's order, with the other names of those that are shared."""
    fields = {id(f.parameter): f for s in engine.states for f in s.unit.fields}
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in engine.model.named_parameters(remove_duplicate=False):
        if (field := fields.get(id(parameter))) is None:
            continue
        shape = list(field.whole_shape)
        facts = found.setdefault(field.name, {"shape": shape, "trainable": field.trainable, "aliases": []})
        if field.share is not None:
            facts["divided_dim"] = field.share.dim
        if name != field.name:
            facts["aliases"].append(name)
    return found


@dataclass(frozen=True)
class _Parts:
    """What the files of this rank are made of: the pieces come as they are copied."""

    small: _Small
    pieces: Sequence[Piece]
    copied: "queue.SimpleQueue[CopiedPiece | BaseException]"
    staging: Staging


Written = dict[str, dict[str, int]]
"""Files by name: their bytes and their crc32c."""


def _write(saving: Saving, directory: Path, tag: str, ranks: Ranks | None, parts: _Parts) -> None:
    """Write all files aside, then make them a checkpoint."""
    rank, partial = ranks.number if ranks is not None else 0, checkpoint.partial_of(directory, tag)
    places = ranks.places if ranks is not None else [(0, None)]
    names = [checkpoint.rank_file(*place) for place in places]
    buffers = [checkpoint.buffer_file(*place) for place in places]
    common: Written = {}

    def begin() -> tuple[int, int]:
        if rank == 0:
            checkpoint.begin(directory, tag)
        return 0, 0

    def write() -> tuple[int, int]:
        if rank == 0:
            common.update(_write_common(partial, parts.small))
        return _write_own(partial / names[rank], parts)

    def write_buffers() -> tuple[int, int]:
        return _write_buffers(partial / buffers[rank], parts.small) if apart[rank] else (0, 0)

    def publish() -> tuple[int, int]:
        if rank == 0:
            checkpoint.publish(partial, tag, parts.small.facts, files)
        return 0, 0

    try:
        _in_step(ranks, begin)
        own = [{"bytes": size, "crc32c": crc} for size, crc in _in_step(ranks, write)]
        apart = _apart(ranks, parts.small)
        if any(apart):
            own += [{"bytes": size, "crc32c": crc} for size, crc in _in_step(ranks, write_buffers)]
            names += buffers
        files = common | {name: facts for name, facts in zip(names, own, strict=True) if facts["bytes"]}
        _in_step(ranks, publish)
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    saving.size_bytes = sum(facts["bytes"] for facts in files.values())


def _in_step(ranks: Ranks | None, work: Callable[[], tuple[int, int]]) -> list[list[int]]:
    """Do it on every rank; what each says of it. Raises on all of them where it fails on one."""
    failed: BaseException | None = None
    said = (0, 0)
    try:
        said = work()
    except BaseException as error:  # noqa: BLE001 - raised below, when the others know
        failed = error
        said = getattr(error, "errno", None) or 0, 0
    told = ranks.tell_all([failed is None, *said]) if ranks is not None else [[failed is None, *said]]
    if failed is not None:
        raise failed
    if others := [(rank, number) for rank, (fine, number, _) in enumerate(told) if not fine]:
        rank, number = others[0]
        raise CheckpointError(f"rank {rank} could not write its part" + (f": {os.strerror(number)}" if number else ""))
    return [numbers for _, *numbers in told]


def _write_common(partial: Path, small: _Small) -> Written:
    """What is the same for all ranks."""
    files = {checkpoint.TRAINING: checkpoint.write_durably(partial / checkpoint.TRAINING, small.text)}
    with TensorFile(partial / checkpoint.REST, _entries(small.rest)) as rest:
        _write_all(rest, small.rest)
    return files | {checkpoint.REST: {"bytes": rest.size_bytes, "crc32c": rest.crc32c}}


def _write_own(path: Path, parts: _Parts) -> tuple[int, int]:
    """The file of this rank; gives its size and checksum."""
    random = parts.small.random
    entries = [*_entries(random), *(entry for piece in parts.pieces for entry in piece.entries())]
    with TensorFile(path, entries) as file:
        _write_all(file, random)
        for _ in parts.pieces:
            item = parts.copied.get()
            if isinstance(item, BaseException):
                raise item
            item.write(file)
            parts.staging.give_back(item.buffer)
    return file.size_bytes, file.crc32c


def _apart(ranks: Ranks | None, small: _Small) -> list[bool]:
    """Of every process, whether it has other buffers than the first. [Note: buffers of several ranks]"""
    if ranks is None:
        return [False]
    told = _in_step(ranks, lambda: (fingerprint(small.buffers()), 0))
    return [number != told[0] for number in told]


def _write_buffers(path: Path, small: _Small) -> tuple[int, int]:
    """The file of this rank's own buffers; gives its size and checksum."""
    buffers = small.buffers()
    with TensorFile(path, _entries(buffers)) as file:
        _write_all(file, buffers)
    return file.size_bytes, file.crc32c


def _entries(tensors: Mapping[str, torch.Tensor]) -> list[Entry]:
    return [Entry(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()]


def _write_all(file: TensorFile, tensors: Mapping[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        file.write(tensor)


def _explained(error: BaseException, saving: Saving) -> CheckpointError:
    if isinstance(error, Abandoned):
        return CheckpointError(f"{saving.path} was not saved: training ended before")
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return CheckpointError(f"{saving.path} was not saved: {said}; what was there before is still there")
