"""A checkpoint of DeepSpeed's ZeRO as one of memplan's own: to go on from in any plan, or to export."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memplan.deepspeed_checkpoint import DeepSpeedCheckpoint, Span, opened
from memplan.errors import RunDirectoryError
from memplan.export import CONFIG
from offload import checkpoint
from offload.buffers import BUFFER
from offload.errors import CheckpointError
from offload.hyperparameters import DEFAULTS, REFUSED
from offload.plain import plain
from offload.plan import MomentFormat, OptimizerKind
from offload.snapshot import WEIGHT, span_key
from offload.tensor_file import Entry, TensorFile

BY_MOMENTS = {frozenset(kind.moments): kind for kind in OptimizerKind if kind is not OptimizerKind.ADAM}
NAMES = {
    OptimizerKind.ADAMW: ("adam", "adamw"),
    OptimizerKind.LION: ("lion",),
    OptimizerKind.SGD: ("sgd",),
    OptimizerKind.SGD_MOMENTUM: ("sgd",),
    OptimizerKind.ADAGRAD: ("adagrad",),
}
"""What DeepSpeed's configuration calls those that keep the same: others (Lamb) keep what Adam does."""
ITS_OWN = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "sparse_tensor_module_names",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_version",
    "autoep_layers",
    "ds_autoep_layers",
}
"""What DeepSpeed writes beside the person's own client_state, in one dict with it."""


class _Tensor(NamedTuple):
    values: torch.Tensor
    dtype: torch.dtype
    """In the file."""


@dataclass(frozen=True)
class Imported:
    """What was written."""

    path: Path
    found: DeepSpeedCheckpoint
    optimizer: OptimizerKind
    parameters: int
    """Elements of the model."""
    left_out: tuple[str, ...]
    """What could not be taken along, a sentence each."""


def import_checkpoint(directory: Path, run: Path, optimizer: OptimizerKind | None = None) -> Imported:
    """Write it as ``run``/checkpoints/step-N, of which it is the latest.

    ``optimizer`` says which it was, where the checkpoint does not. Raises CheckpointError for what can not be imported,
    and RunDirectoryError where the run has a checkpoint of that step already.
    """
    found = opened(directory)
    kind, left_out = _optimizer(found, optimizer), list[str]()
    target, tag = run / "checkpoints", checkpoint.step_tag(found.step)
    if tag in checkpoint.found(target):
        raise RunDirectoryError(f"{target / tag} is there already; name another --out")
    spans = list(found.spans())
    training = _training(found, kind, spans)
    for key, what in (("scheduler", "lr_scheduler"), ("client_state", "client_state")):
        try:
            checkpoint.as_json(training[key])
        except CheckpointError:
            left_out.append(f"its {what} can not be written as JSON and is left out")
            training[key] = None
    text = checkpoint.as_json(training)
    rest = {f"{BUFFER}{name}": _Tensor(buffer, buffer.dtype) for name, buffer in found.buffers.items()}
    partial = checkpoint.begin(target, tag)
    try:
        files = {
            checkpoint.TRAINING: checkpoint.write_durably(partial / checkpoint.TRAINING, text),
            checkpoint.REST: _write(partial / checkpoint.REST, rest),
            checkpoint.rank_file(0): _write(partial / checkpoint.rank_file(0), _tensors(found, spans, kind)),
        }
        facts = {"step": found.step, "precision": found.precision, "world_size": 1}
        path = checkpoint.publish(partial, tag, facts, files)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if (config := directory / CONFIG).is_file():  # Hugging Face's trainers put it there
        shutil.copyfile(config, run / CONFIG)
    return Imported(path, found, kind, sum(span.weights.numel() for span in spans), tuple(left_out))


def _optimizer(found: DeepSpeedCheckpoint, wanted: OptimizerKind | None) -> OptimizerKind:
    """Which it was; raises CheckpointError for those that memplan does not have, and where it can not be told."""
    section = found.config.get("optimizer")
    section = section if isinstance(section, dict) else {}
    named = str(section.get("type", "")).lower()
    kind = BY_MOMENTS.get(frozenset(found.moments))
    groups = found.hyperparameters
    by_torch = all("decoupled_weight_decay" in group for group in groups)
    if kind is None or (named and not by_torch and named not in NAMES[kind]):
        raise CheckpointError(
            f"{found.path} was trained with {named or 'an optimizer'} that keeps {', '.join(sorted(found.moments))}; "
            f"memplan goes on with {', '.join(OptimizerKind)}"
        )
    if refused := [key for key in REFUSED if any(group.get(key) for group in groups)]:
        raise CheckpointError(f"{found.path} was trained with {refused[0]}=True, which memplan does not do")
    if any(group.get("bias_correction") is False for group in groups):
        raise CheckpointError(f"{found.path} was trained with bias_correction=False, which memplan does not do")
    if kind is not OptimizerKind.ADAMW:
        return kind
    if by_torch:
        return OptimizerKind.ADAMW if groups[0]["decoupled_weight_decay"] else OptimizerKind.ADAM
    if named:  # DeepSpeed's Adam decays as AdamW does, if it is not told otherwise
        decoupled = named == "adamw" or section.get("params", {}).get("adam_w_mode", True)
        return OptimizerKind.ADAMW if decoupled else OptimizerKind.ADAM
    if wanted is not None:
        return wanted
    if any(float(group.get("weight_decay", 0)) for group in groups):
        raise CheckpointError(
            f"{found.path} does not say whether AdamW or Adam made it, whose weight decay differs: "
            "say --optimizer adamw or --optimizer adam"
        )
    return OptimizerKind.ADAMW


def _training(found: DeepSpeedCheckpoint, kind: OptimizerKind, spans: list[Span]) -> dict[str, Any]:
    """What is no tensor, as docs/checkpoints.md has it."""
    aliases: dict[str, list[str]] = {}
    for alias, name in found.aliases.items():
        aliases.setdefault(name, []).append(alias)
    kept = DEFAULTS[kind]([torch.nn.Parameter(torch.zeros(1))]).defaults.keys() | {"initial_lr"}
    model, scale = found.model, found.loss_scale
    return {
        "parameters": {
            name: {"shape": list(shape), "trainable": name in found.trained, "aliases": aliases.get(name, [])}
            for name, shape in (found.trained | found.frozen).items()
        },
        "buffers": sorted(found.buffers),
        "optimizer": kind,
        "moments": MomentFormat.FP32,
        "parameter_steps": {span.name: span.steps for span in spans if span.name in found.trained and span.steps},
        "loss_scale": None if scale is None else {"scale": scale, "_growth_tracker": 0},
        "groups": [plain({k: v for k, v in group.items() if k in kept}) for group in found.hyperparameters],
        "group_parameters": [list(group) for group in found.groups],
        "scheduler": plain(model.get("lr_scheduler")),
        "client_state": plain({key: value for key, value in model.items() if key not in ITS_OWN}),
    }


def _tensors(found: DeepSpeedCheckpoint, spans: list[Span], kind: OptimizerKind) -> dict[str, _Tensor]:
    """What the rank's file holds, by its keys."""
    tensors: dict[str, _Tensor] = {}
    for name, start, weights, moments, _ in spans:
        if name not in found.trained:
            tensors[span_key(WEIGHT, start, name)] = _Tensor(weights, weights.dtype)
            continue
        tensors[span_key(WEIGHT, start, name)] = _Tensor(weights, torch.float32)
        for moment in kind.moments:
            values = moments.get(moment, torch.zeros(()).expand(weights.shape))
            tensors[span_key(moment, start, name)] = _Tensor(values, torch.float32)
    return tensors


def _write(path: Path, tensors: dict[str, _Tensor]) -> dict[str, int]:
    """One safetensors file; gives its size and checksum."""
    with TensorFile(path, [Entry(key, t.dtype, tuple(t.values.shape)) for key, t in tensors.items()]) as file:
        for tensor in tensors.values():
            file.write(tensor.values.to(tensor.dtype))
    return {"bytes": file.size_bytes, "crc32c": file.crc32c}
