"""Weights from safetensors files, tensor by tensor: a model larger than memory is never whole in it."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from offload.errors import WeightsError
from offload.on_meta import make_real
from offload.unit import Unit

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
FLOATING = {"F64", "F32", "F16", "BF16"}


def files_of(path: Path) -> list[Path]:
    """The safetensors files of a path: itself, or of a folder its ``model.safetensors``, or the shards of its index.

    Empty where a folder has neither; raises WeightsError where a shard is missing or the index can not be read.
    """
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if not index.is_file():
        return [path / WHOLE] if (path / WHOLE).is_file() else []
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path / name for name in shards]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of safetensors files: {type(error).__name__}: {error}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise WeightsError(f"{path} lacks {missing[0]}, one of {len(files)} files in {INDEX}: download it again")
    return files


@dataclass(frozen=True)
class _Place:
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """The tensors of a model's ``state_dict`` in safetensors files; parameters that it ties need be there once.

    The files' headers are read, and compared with the model, when this is made; the tensors when they are asked for.
    """

    def __init__(self, path: str | Path, model: nn.Module) -> None:
        """``path`` is a file, or a folder with one or with shards and their index. Raises WeightsError."""
        path = Path(path)
        self._path, self._model = path, model
        if not (files := files_of(path)):
            raise WeightsError(
                f"{path} holds neither {WHOLE} nor {INDEX}; name the folder or the file with the weights"
            )
        places = {place.name: place for file in files for place in _places(file)}
        self._aliases = _aliases(model)
        saved = model.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
        rename = _renaming(model, saved, places.keys())
        self._found = {rename(name): place for name, place in places.items()}
        self._check_names()
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *self._buffers.items()):
            self._check_fits(name, tensor)

    def units(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """These units, each when its parameters hold the files' numbers."""
        for unit in units:
            with ExitStack() as opened:
                self._read(opened, [field.parameter for field in unit.fields])
                yield unit

    def rest(self, units: Iterable[Unit]) -> Iterator[torch.Tensor]:
        """Read the parameters that no unit owns, and the buffers; gives each."""
        owned = {field.parameter for unit in units for field in unit.fields}
        others = [p for p in self._model.parameters() if p not in owned]
        with ExitStack() as opened, torch.no_grad():
            self._read(opened, others)
            yield from others
            for name in self._buffers.keys() & self._found.keys():
                buffer = self._model.get_buffer(name)
                buffer.copy_(self._tensor(opened, {}, name))
                yield buffer

    def _read(self, opened: ExitStack, parameters: Iterable[nn.Parameter]) -> None:
        handles: dict[Path, Any] = {}
        for parameter in parameters:
            first, *others = [name for name in self._aliases[parameter] if name in self._found]
            values = self._tensor(opened, handles, first)
            for other in others:
                if not torch.equal(values, self._tensor(opened, handles, other)):
                    raise WeightsError(
                        f"{self._path} has different numbers for {first} and {other}, which are one parameter of the "
                        "model: build the model without tying them (tie_word_embeddings=False)"
                    )
            make_real(parameter, values)

    def _tensor(self, opened: ExitStack, handles: dict[Path, Any], name: str) -> torch.Tensor:
        place = self._found[name]
        try:
            if place.file not in handles:
                handles[place.file] = opened.enter_context(safe_open(place.file, framework="pt"))
            return handles[place.file].get_tensor(place.name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(place.file, error) from error

    def _check_names(self) -> None:
        may_lack, may_have = (
            [re.compile(p) for p in getattr(self._model, f"_keys_to_ignore_on_load_{kind}", None) or ()]
            for kind in ("missing", "unexpected")
        )
        lacking = [names[0] for names in self._aliases.values() if not any(n in self._found for n in names)]
        lacking += [n for n in self._buffers.keys() - self._found.keys() if not any(p.search(n) for p in may_lack)]
        known = {n for names in self._aliases.values() for n in names} | self._buffers.keys()
        # What a model computes for itself, and files of other versions may hold.
        computed = {n.rpartition(".")[2] for n, _ in self._model.named_buffers() if n not in self._buffers}
        strange = [
            n
            for n in self._found.keys() - known
            if n.rpartition(".")[2] not in computed and not any(p.search(n) for p in may_have)
        ]
        if lacking or strange:
            said = [f"lacks {len(lacking)} of its tensors ({min(lacking)})"] if lacking else []
            said += [f"has {len(strange)} that it does not ({min(strange)})"] if strange else []
            raise WeightsError(
                f"{self._path} is not of this model: it {' and '.join(said)}. Build the model that the files are of, "
                "or load them into it as their library does, and save its state_dict in safetensors"
            )

    def _check_fits(self, name: str, tensor: torch.Tensor) -> None:
        if (place := self._found.get(name)) is None:
            return
        if place.shape != tuple(tensor.shape):
            raise WeightsError(
                f"{place.file}: {name} is {list(place.shape)}, the model's is {list(tensor.shape)}: "
                "the files are of a model of another size"
            )
        if tensor.is_floating_point() and place.dtype not in FLOATING:
            raise WeightsError(
                f"{place.file}: {name} is of type {place.dtype}; quantised weights can not be trained on: use the "
                "files in 16 or 32 bits"
            )


def _places(file: Path) -> Iterator[_Place]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                part = tensors.get_slice(name)
                yield _Place(file, name, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _renaming(model: nn.Module, here: Collection[str], there: Collection[str]) -> Callable[[str], str]:
    """From the files' names to the model's: transformers leaves the body's name out where a file has no head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    inside, outside = (any(name.startswith(prefix) for name in names) for names in (here, there))
    if inside and not outside:
        return lambda name: name if name in here else prefix + name
    if outside and not inside:
        return lambda name: name.removeprefix(prefix)
    return lambda name: name


def _unreadable(file: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{file} can not be read as safetensors ({error}); if it was not copied whole, copy it again")


def _aliases(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of every parameter."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return found
