"""A checkpoint of DeepSpeed's ZeRO: which elements of which parameter, and of its state, lie in which of its files.

[Note: where ZeRO puts a parameter]
Each parameter group is flat. In stages 1 and 2 the group as a whole is cut into one partition a rank; parameters lie in
the order of ``param_shapes`` (which with round_robin_gradients is not the optimizer's), some with padding behind them,
and the padding behind the last one is not saved. In stage 3 each parameter is cut by itself, into pieces of
ceil(elements / ranks), the last ones padded; a rank's pieces follow each other in the order of the group, over one or
several flat tensors (sub-groups), which hold whole pieces.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memplan.unpickled import Inert, loaded
from offload.errors import CheckpointError
from offload.plan import Precision

OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
EXPERT_FILES = "*expert_*_model_states.pt"
ONE_RANK = "is made by several processes that share one model's tensors or layers (model_parallel_size or pipeline)"


class Span(NamedTuple):
    """Some elements of a parameter, flat, from ``start`` on: their masters, or weights where they are frozen."""

    name: str
    start: int
    weights: torch.Tensor
    moments: Mapping[str, torch.Tensor]
    """By the optimizer's names; empty where the parameter is frozen or was never updated."""
    steps: int


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """One folder of a tag. Raises CheckpointError for what it lacks, and for what memplan can not go on from."""

    path: Path
    ranks: int
    model: Mapping[str, Any]
    """The first rank's file of the model's states."""
    fragments: Sequence[Mapping[str, torch.Tensor]]
    """By rank: its pieces of frozen parameters, in stage 3."""
    optimizers: Sequence[Mapping[str, Any]]
    """By rank: the optimizer's states."""

    @cached_property
    def stage(self) -> int:
        """ZeRO's."""
        stage = self.optimizers[0]["zero_stage"]
        return int(stage.arguments[0] if isinstance(stage, Inert) else stage)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.model["global_steps"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The ds_config.json of the run."""
        config = self.model.get("ds_config")
        return config if isinstance(config, dict) else {}

    @property
    def precision(self) -> Precision:
        """In which it computed."""
        for name, precision in (("bf16", Precision.BF16), ("bfloat16", Precision.BF16), ("fp16", Precision.FP16)):
            if isinstance(section := self.config.get(name), dict) and section.get("enabled"):
                return precision
        return Precision.FP32

    @cached_property
    def groups(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of trained parameters by the optimizer's group, which in stage 3 may be several flat tensors."""
        of_flat: list[dict[str, torch.Size]] = self.model["param_shapes"]
        given = [group["params"] for group in self._base(0)["param_groups"]]
        if len(of_flat) == len(given):
            given = [[i] for i in range(len(given))]
        elif sorted(i for group in given for i in group) != list(range(len(of_flat))):
            raise CheckpointError(
                f"{self.path} does not say which parameters belong to which of the optimizer's groups"
            )
        return [{name: tuple(s) for i in group for name, s in of_flat[i].items()} for group in given]

    @cached_property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """The same of all groups together."""
        return {name: shape for group in self.groups for name, shape in group.items()}

    @cached_property
    def frozen(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the others: the file says them, or has them."""
        said = self.model.get("frozen_param_shapes") or {}
        if self.stage == 3:
            return {name: tuple(shape) for name, shape in said.items()}
        known = {*self.aliases, *self.buffers, *self.trained}
        return {name: tuple(tensor.shape) for name, tensor in self.model["module"].items() if name not in known}

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of shared parameters, each with the one that it has here."""
        return self.model.get("shared_params") or {}

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Those of the model's state_dict, of the first rank."""
        return {name: self.model["module"][name] for name in self.model.get("buffer_names") or ()}

    @cached_property
    def hyperparameters(self) -> list[dict[str, Any]]:
        """Of the optimizer's groups."""
        return [
            {key: value for key, value in group.items() if key != "params"} for group in self._base(0)["param_groups"]
        ]

    @property
    def moments(self) -> set[str]:
        """What the optimizer kept of its elements, by its names."""
        states = self._base(0)["state"].values()
        return {name for state in states for name, value in state.items() if _many(value)}

    @property
    def loss_scale(self) -> float | None:
        """In fp16."""
        scaler = self.optimizers[0].get("loss_scaler")
        scale = getattr(scaler, "cur_scale", None)
        return float(scale) if scale is not None and self.precision is Precision.FP16 else None

    def spans(self) -> Iterator[Span]:
        """All elements of all parameters, each once."""
        trained = self._of_pieces() if self.stage == 3 else self._of_partitions()
        found: dict[str, int] = dict.fromkeys(self._shapes, 0)
        for span in (*trained, *self._of_frozen()):
            found[span.name] += span.weights.numel()
            yield span
        for name, shape in self._shapes.items():
            if found[name] != prod(shape):
                raise CheckpointError(f"{self.path} has {found[name]} of the {prod(shape)} elements of {name}")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.trained | self.frozen

    def _base(self, rank: int) -> Mapping[str, Any]:
        """The state_dict of the optimizer that ZeRO has wrapped."""
        name = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        base = self.optimizers[rank].get(name)
        if not isinstance(base, dict) or "param_groups" not in base:
            raise CheckpointError(
                f"{self.path} was saved without the optimizer's groups (elastic_checkpoint); save one without that"
            )
        return base

    def _state(self, rank: int, index: int, flat: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
        """The moments beside the masters of a flat tensor, and how often it was updated."""
        base = self._base(rank)
        state = base["state"].get(index, {})
        moments = {name: value for name, value in state.items() if _many(value)}
        for name, value in moments.items():
            if value.numel() < flat.numel():
                raise CheckpointError(
                    f"{self.path}: rank {rank} has {value.numel()} of {flat.numel()} numbers of {name}"
                )
        if not moments and "step" not in state:
            return {}, 0
        return moments, int(state.get("step", self.step))

    def _of_partitions(self) -> Iterator[Span]:
        """Stages 1 and 2: [Note: where ZeRO puts a parameter]."""
        for index, group in enumerate(self.groups):
            paddings = self.optimizers[0].get("param_alignment_paddings")
            start = 0  # in the flat group
            for place, (name, shape) in enumerate(group.items()):
                stop, first = start + prod(shape), 0  # of the group, of the partition
                for rank, optimizer in enumerate(self.optimizers):
                    flat = optimizer["single_partition_of_fp32_groups"][index]
                    a, b = max(start, first), min(stop, first + flat.numel())
                    if a < b:
                        own = slice(a - first, b - first)
                        moments, steps = self._state(rank, index, flat)
                        yield Span(name, a - start, flat[own], {k: m[own] for k, m in moments.items()}, steps)
                    first += flat.numel()
                start = stop + (paddings[index][place] if paddings else 0)

    def _of_pieces(self) -> Iterator[Span]:
        """Stage 3: [Note: where ZeRO puts a parameter]."""
        for rank, optimizer in enumerate(self.optimizers):
            flats: list[torch.Tensor] = list(optimizer["fp32_flat_groups"])
            index = offset = 0
            for name, shape in self.trained.items():
                piece, start, count = self._piece(prod(shape), rank)
                if index < len(flats) and offset == flats[index].numel():
                    index, offset = index + 1, 0
                if index == len(flats) or offset + piece > flats[index].numel():
                    raise CheckpointError(f"{self.path}: rank {rank} lacks numbers of {name}")
                moments, steps = self._state(rank, index, flats[index])
                own = slice(offset, offset + count)
                if count:
                    yield Span(name, start, flats[index][own], {k: m[own] for k, m in moments.items()}, steps)
                offset += piece

    def _piece(self, elements: int, rank: int) -> tuple[int, int, int]:
        """(elements with padding, the first one, how many there are) of a rank's piece of a parameter in stage 3."""
        piece = -(-elements // self.ranks)
        start = min(rank * piece, elements)
        return piece, start, min(piece, elements - start)

    def _of_frozen(self) -> Iterator[Span]:
        for name, shape in self.frozen.items():
            if not self.model["module"][name].is_floating_point():
                raise CheckpointError(
                    f"{self.path}: parameter {name} is of {self.model['module'][name].dtype}; memplan imports "
                    "floating-point ones"
                )
            if self.stage < 3:
                yield Span(name, 0, self.model["module"][name].reshape(-1), {}, 0)
                continue
            for rank, fragments in enumerate(self.fragments):
                _, start, count = self._piece(prod(shape), rank)
                if count:
                    yield Span(name, start, fragments[name].reshape(-1)[:count], {}, 0)


def opened(directory: Path) -> DeepSpeedCheckpoint:
    """The one that ``latest`` names in the directory, or the one that the directory itself is."""
    path = _folder(directory)
    if list(path.glob(EXPERT_FILES)):
        raise CheckpointError(f"{path} has DeepSpeed's experts, divided over processes; memplan does not import those")
    numbered: dict[int, Path] = {}
    for file in path.iterdir():
        if (match := OPTIMIZER_FILE.fullmatch(file.name)) is not None:
            if int(match[2]):
                raise CheckpointError(f"{path} {ONE_RANK}; memplan imports those of data parallelism")
            numbered[int(match[1])] = file
    if not numbered:
        raise CheckpointError(
            f"{path} has no file of ZeRO's optimizer (zero_pp_rank_0_mp_rank_00_optim_states.pt): it was saved in "
            "stage 0, or without the optimizer's states; memplan imports stages 1, 2 and 3"
        )
    first = _model_file(path, 0)
    model = loaded(first)
    ranks = int(model.get("dp_world_size", len(numbered)))
    if missing := [rank for rank in range(ranks) if rank not in numbered]:
        raise CheckpointError(f"{path} lacks the optimizer's states of rank {missing[0]} of {ranks}")
    for key in ("module", "param_shapes", "global_steps"):
        if model.get(key) is None:
            raise CheckpointError(f"{first} has no {key!r}: it is of a DeepSpeed that is too old, or of none")
    if int(model.get("mp_world_size") or 1) > 1:
        raise CheckpointError(f"{path} {ONE_RANK}; memplan imports those of data parallelism")
    fragments: list[Mapping[str, torch.Tensor]] = []
    if model.get("frozen_param_shapes") and first.name.startswith("zero"):
        fragments = [loaded(_model_file(path, rank))["frozen_param_fragments"] for rank in range(ranks)]
    optimizers = [loaded(numbered[rank]).get("optimizer_state_dict") for rank in range(ranks)]
    needed = ("zero_stage",), ("fp32_flat_groups", "single_partition_of_fp32_groups")
    for rank, states in enumerate(optimizers):
        if not isinstance(states, dict) or not all(any(key in states for key in keys) for keys in needed):
            raise CheckpointError(f"{numbered[rank]} is not as ZeRO's stages 1 to 3 write it")
    return DeepSpeedCheckpoint(path, ranks, model, fragments, [o for o in optimizers if isinstance(o, dict)])


def _folder(directory: Path) -> Path:
    if (latest := directory / "latest").is_file():
        return directory / latest.read_text().strip()
    if not directory.is_dir():
        raise CheckpointError(f"there is no folder {directory}")
    if not any(directory.glob("*_model_states.pt")):
        raise CheckpointError(
            f"{directory} is no checkpoint of DeepSpeed: it has neither a file 'latest' nor *_model_states.pt"
        )
    return directory


def _model_file(path: Path, rank: int) -> Path:
    whole, divided = path / "mp_rank_00_model_states.pt", path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
    for file in (divided, whole):
        if file.is_file():
            return file
    raise CheckpointError(f"{path} has neither {whole.name} nor, of stage 3, {divided.name}")


def _many(value: Any) -> bool:
    """Whether it has a number for every element, as counts have not."""
    return isinstance(value, torch.Tensor) and value.dim() > 0
