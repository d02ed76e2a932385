"""A run's weights as a folder that ``from_pretrained`` reads, tensor by tensor, wherever the run's folder is."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan.errors import RunDirectoryError
from offload.checkpoint import MANIFEST, Checkpoint, checked, newest_whole, sync_directory, write_durably
from offload.optimizer import split_master_
from offload.plan import Precision
from offload.residency import chunks
from offload.restore import CheckpointTensors
from offload.tensor_file import Entry, TensorFile
from offload.weight_files import INDEX, WHOLE
from profiler.contract import ModelSource

CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000
PIECE_ELEMENTS = 1 << 24
"""Elements of a parameter that are in memory at a time."""


class Dtype(StrEnum):
    """What exported weights are stored in."""

    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def of_torch(self) -> torch.dtype:
        """PyTorch's."""
        return torch.bfloat16 if self is Dtype.BF16 else torch.float32


@dataclass(frozen=True)
class Exported:
    """What was written."""

    checkpoint: Checkpoint
    dtype: Dtype
    files: tuple[str, ...]
    size_bytes: int
    damaged: tuple[str, ...]
    """Newer checkpoints that were passed over, a sentence each."""


def keep_config(source: ModelSource, model: nn.Module, run_dir: Path) -> None:
    """Write the configuration of a model of transformers into its run, for an export later and elsewhere."""
    if (config := _config(source, model)) is not None:
        config["architectures"] = [type(model).__name__]
        (run_dir / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _config(source: ModelSource, model: nn.Module) -> dict[str, Any] | None:
    """As the person wrote it, where the model came from one: the model's own is changed for training."""
    own: Any = getattr(model, "config", None)
    if not callable(getattr(own, "to_json_string", None)) or not getattr(own, "model_type", None):
        return None
    if source.path.suffix == ".json":
        written = json.loads(source.path.read_text())
        if written.get("model_type") == own.model_type:
            return written
    return json.loads(own.to_json_string())


def export(run: Path, out: Path, dtype: Dtype | None = None, shard_bytes: int = SHARD_BYTES) -> Exported:
    """Write the newest whole checkpoint of a run, or the one that ``run`` itself is, into the new folder ``out``.

    ``dtype`` is by default that in which the run computed. Raises RunDirectoryError and CheckpointError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirectoryError(f"{out} is there already and not empty; name another --out")
    checkpoint, damaged = _checkpoint(run)
    bf16 = checkpoint.manifest["precision"] == Precision.BF16
    dtype = dtype or (Dtype.BF16 if bf16 else Dtype.FP32)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for left in partial.iterdir():
        left.unlink()
    with CheckpointTensors(checkpoint) as tensors:
        files = _write_shards(_Contents(checkpoint, tensors, dtype), partial, shard_bytes)
    for folder in (run, *checkpoint.path.parents[:2]):
        if (config := folder / CONFIG).is_file():
            data = json.loads(config.read_text())
            data.pop("torch_dtype", None)
            data["dtype"] = str(dtype.of_torch).removeprefix("torch.")
            write_durably(partial / CONFIG, (json.dumps(data, indent=2) + "\n").encode())
            break
    sync_directory(partial)
    partial.rename(out)
    sync_directory(out.parent)
    size = sum(path.stat().st_size for path in out.iterdir())
    return Exported(checkpoint, dtype, files, size, tuple(damaged))


def _checkpoint(run: Path) -> tuple[Checkpoint, list[str]]:
    if (run / MANIFEST).is_file():
        return checked(run), []
    inside = run / "checkpoints"
    return newest_whole(inside if inside.is_dir() else run)


class _Contents:
    """The tensors of the folder: as the model's state_dict has them, what it ties once."""

    def __init__(self, checkpoint: Checkpoint, tensors: CheckpointTensors, dtype: Dtype) -> None:
        self._tensors, self._dtype = tensors, dtype.of_torch
        training = checkpoint.training
        self._shapes = {name: tuple(facts["shape"]) for name, facts in training["parameters"].items()}
        saved = {f"buffer/{name}" for name in training["buffers"]}
        rest = {key: t for key, t in tensors.rest() if key in saved or key.startswith("parameter/")}
        self._rest = {key.partition("/")[2]: tensor for key, tensor in rest.items()}

    def entries(self) -> list[Entry]:
        """All of them."""
        owned = [Entry(name, self._dtype, shape) for name, shape in self._shapes.items()]
        return owned + [Entry(name, t.dtype, tuple(t.shape)) for name, t in self._rest.items()]

    def pieces(self, entry: Entry) -> Iterator[torch.Tensor]:
        """The elements of one, in their order."""
        if entry.key in self._rest:
            yield self._rest[entry.key]
            return
        for a, b in chunks(prod(entry.shape), PIECE_ELEMENTS):
            master = torch.empty(b - a)
            self._tensors.read_into(master, "weight", entry.key, a)
            if self._dtype is torch.float32:
                yield master
            else:  # the same rounding as in training
                weight, remainder = torch.empty(b - a, dtype=self._dtype), torch.empty(b - a, dtype=torch.int16)
                split_master_(master, weight, remainder)
                yield weight


def _write_shards(contents: _Contents, folder: Path, shard_bytes: int) -> tuple[str, ...]:
    """One file, or several with an index, named as in Hugging Face's repositories."""
    shards: list[list[Entry]] = [[]]
    for entry in contents.entries():
        if shards[-1] and sum(e.size_bytes for e in shards[-1]) + entry.size_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [WHOLE]
    for name, entries in zip(names, shards, strict=True):
        with TensorFile(folder / name, entries, {"format": "pt"}) as file:
            for entry in entries:
                for piece in contents.pieces(entry):
                    file.write(piece)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(e.size_bytes for shard in shards for e in shard)},
            "weight_map": {e.key: name for name, shard in zip(names, shards, strict=True) for e in shard},
        }
        write_durably(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return tuple(names)
