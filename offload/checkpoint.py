"""Checkpoints: one safetensors file a unit and a manifest, written aside and renamed when complete. Nothing is pickled.

A checkpoint names parameters, not places: it can be loaded under another plan. In ``DIR/step-N/``:

``manifest.json``        schema, step, optimizer, files{name: {bytes, crc32c}}, steps of parameters, scheduler, extra
``unit-K.safetensors``   ``weight/NAME`` (fp32 master), and what the optimizer keeps: ``exp_avg/NAME``, ...
``rest.safetensors``     ``buffer/NAME``, ``random/cpu``, ``random/cuda``
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from offload import contents
from offload.contents import Contents
from offload.engine import Engine
from offload.errors import CheckpointError
from offload.plan import OptimizerKind

SCHEMA = "memplan.checkpoint/1"
_READ_BYTES = 8 << 20


def save(engine: Engine, directory: Path, extra: dict[str, Any]) -> Path:
    """Write the engine's whole state as ``directory/step-N`` and return that path; ``extra`` is any JSON of the caller.

    The checkpoint appears complete and durable, or not at all. Earlier ones stay.
    """
    engine.finish()
    target = directory / f"step-{engine.global_step}"
    partial = directory / f".{target.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for index, state in enumerate(engine.states):
        whole = contents.read(state, engine.plan.state_format, engine.store)
        tensors = {
            f"{what}/{name}": tensor.contiguous()
            for name, parts in contents.named(state, whole)
            for what, tensor in parts.items()
        }
        save_file(tensors, partial / f"unit-{index}.safetensors")
    # Clones: buffers may share memory with each other.
    rest = {f"buffer/{name}": b.detach().cpu().clone().contiguous() for name, b in engine.model.named_buffers()}
    save_file(rest | _random_states(engine.device), partial / "rest.safetensors")
    manifest = {
        "schema": SCHEMA,
        "step": engine.global_step,
        "optimizer": engine.plan.optimizer,
        "files": {p.name: {"bytes": p.stat().st_size, "crc32c": _checksum(p)} for p in sorted(partial.iterdir())},
        "parameter_steps": engine.hyperparameters.steps,
        "scheduler": _plain(engine.lr_scheduler.state_dict()) if engine.lr_scheduler is not None else None,
        "groups": [_plain(_settings(group)) for group in engine.optimizer.param_groups],
        "python_random": random.getstate(),
        "extra": extra,
    }
    try:
        text = json.dumps(manifest, indent=1)
    except TypeError as error:
        raise CheckpointError(f"the scheduler's state can not be written as JSON: {error}") from error
    (partial / "manifest.json").write_text(text + "\n")
    _make_durable(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync(directory)
    return target


def latest(directory: Path) -> Path:
    """The newest complete checkpoint in a directory; raises CheckpointError when there is none."""
    found = {int(p.name.removeprefix("step-")): p for p in directory.glob("step-*") if p.name[5:].isdigit()}
    if not found:
        raise CheckpointError(f"there is no checkpoint in {directory}; train without --resume first")
    return found[max(found)]


def load(engine: Engine, path: Path) -> dict[str, Any]:
    """Restore the engine, its scheduler and the random states; returns ``extra``.

    Every file is checked against the manifest before anything is changed.
    """
    manifest = _checked_manifest(path)
    trained_with = manifest.get("optimizer", OptimizerKind.ADAMW)  # the only one when it was not said
    if trained_with != engine.plan.optimizer:
        raise CheckpointError(
            f"{path} was trained with {trained_with}, and the plan is for {engine.plan.optimizer}: the state of one is "
            "none for the other; go on with the optimizer that it was begun with"
        )
    files = [path / name for name in manifest["files"]]
    places = {name: file for file in files for name in _tensor_names(file)}
    needed = {f"weight/{field.name}" for state in engine.states for field in state.unit.fields}
    held = {key for key in places if key.startswith("weight/")}
    if needed != held:
        name = min(needed ^ held).removeprefix("weight/")
        raise CheckpointError(f"{path} is of another model: parameter {name} is in only one of the two")
    _check_fits(engine, manifest, places, path)
    engine.finish()
    engine.zero_grad()
    for state in engine.states:
        whole = Contents.zeros(state, engine.plan.optimizer)
        for name, parts in contents.named(state, whole):
            for what, tensor in parts.items():
                _read_into(tensor, places, f"{what}/{name}")
        engine.replace(state, whole)
    rest = load_file(path / "rest.safetensors")
    with torch.no_grad():
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(rest[f"buffer/{name}"])
    engine.global_step = manifest["step"]
    engine.hyperparameters.steps = dict(manifest["parameter_steps"])
    for group, saved in zip(engine.optimizer.param_groups, manifest["groups"], strict=True):
        group.update(_restored(saved))
    if engine.lr_scheduler is not None and manifest["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(_restored(manifest["scheduler"]))
    version, internal, gauss = manifest["python_random"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(rest["random/cpu"])
    if "random/cuda" in rest and engine.device.type == "cuda":
        torch.cuda.set_rng_state(rest["random/cuda"], engine.device)
    return manifest["extra"]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises CheckpointError when it can not be read."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint: {error}") from error
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} has schema {manifest.get('schema')!r}, expected {SCHEMA!r}")
    return manifest


def _checked_manifest(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    for name, written in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != written["bytes"]:
            raise CheckpointError(f"{file} is missing or has another size than when it was written")
        if _checksum(file) != written["crc32c"]:
            raise CheckpointError(f"{file} is damaged: its checksum differs from the manifest's")
    return manifest


def _tensor_names(file: Path) -> Iterator[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield from tensors.keys()
    except SafetensorError as error:
        raise CheckpointError(f"{file} can not be read: {error}") from error


def _check_fits(engine: Engine, manifest: dict[str, Any], places: dict[str, Path], path: Path) -> None:
    """Raise CheckpointError unless everything that will be read is there in the shape it must have."""
    wanted = {f"buffer/{name}": tuple(b.shape) for name, b in engine.model.named_buffers()}
    for state in engine.states:
        for field in state.unit.fields:
            kinds = ("weight", *engine.plan.optimizer.moments) if field.trainable else ("weight",)
            wanted |= {f"{kind}/{field.name}": tuple(field.shape) for kind in kinds}
    for key, shape in wanted.items():
        if key not in places:
            raise CheckpointError(f"{path} has no {key}; it was made of another model, or with that parameter frozen")
        with safe_open(places[key], framework="pt") as tensors:
            saved = tuple(tensors.get_slice(key).get_shape())
        if saved != shape:
            raise CheckpointError(f"{path} is of another model: {key} is {list(saved)}, not {list(shape)}")
    groups, here = len(manifest["groups"]), len(engine.optimizer.param_groups)
    if groups != here:
        raise CheckpointError(f"{path} was made with {groups} parameter groups, the optimizer has {here}")


def _read_into(tensor: torch.Tensor, places: dict[str, Path], key: str) -> None:
    with safe_open(places[key], framework="pt") as tensors:
        tensor.copy_(tensors.get_tensor(key))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters; numbers in tensors as numbers."""
    return {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}


def _plain(value: Any) -> Any:
    """The value for JSON; dicts whose keys are not all strings (and Counters) as tagged pairs, tuples as such."""
    if isinstance(value, dict):
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
        kind = "Counter" if isinstance(value, Counter) else "dict"
        return {"__kind__": kind, "pairs": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__kind__": "tuple", "items": [_plain(item) for item in value]}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _restored(value: Any) -> Any:
    """The inverse of ``_plain``."""
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("__kind__")
    if kind == "tuple":
        return tuple(_restored(item) for item in value["items"])
    if kind is None:
        return {key: _restored(item) for key, item in value.items()}
    pairs = {_restored(key): _restored(item) for key, item in value["pairs"]}
    return Counter(pairs) if kind == "Counter" else pairs


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    return states


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            value = crc32c(data, value)
    return value


def _make_durable(directory: Path) -> None:
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
