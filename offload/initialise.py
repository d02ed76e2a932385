"""First values of a model that was built on meta, from its modules' own code, unit by unit.

[Note: first values]
A module gives values to its parameters by ``reset_parameters``, as PyTorch's own do, or the model around it does by
``_init_weights(module)``, as transformers' models do. They are called in the order of ``nn.Module.apply``: children
before their parents. So a model whose parameters all come from ``reset_parameters`` gets, from the same seed, the
numbers that building it for real gives, whatever the plan.

Before, every value is NaN. What is NaN afterwards was set by nobody, and is refused by name. ``on_meta`` tells the
story of each parameter (see [Note: stories]): where building a model did otherwise to it than these methods do, that
would be lost, and is refused as well. Built under ``torch.device("meta")`` it has no story; then PyTorch's count of
in-place changes is compared, which leaves out what is written through ``.data``.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.errors import OffloadError
from offload.on_meta import MAKER, make_real, reset_of
from offload.stories import Repeating, Story, Writing, begin_story, sharing, story_of
from offload.unit import Unit


class Initialiser:
    """Makes a model on meta real, one unit after another."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Units are made on ``device``; what is no unit's is made now, on the host and without values."""
        self._model, self._device = model, device
        self._unset: dict[int, tuple[str, torch.Tensor]] = {}
        """Tensors without values so far, by identity."""
        self._built_changes: dict[int, int] = {}
        """In-place changes of each parameter while the model was built."""
        self._stories: dict[int, tuple[Story, Story]] = {}
        """What was done to each parameter when the model was built, and what its own initialisation does."""
        self._repeating = Repeating(device)
        if (names := sharing(model.named_parameters())) is not None:
            raise OffloadError(
                f"parameters {names[0]} and {names[1]} were built on meta with one memory, and would be made apart: "
                "let them be one parameter (a.weight = b.weight), or build the model for real"
            )
        self._decided: set[int] = set()
        """Parameters that transformers' code alone decides about."""
        self._makers = _makers(model)
        self._abstract = {m for m in model.modules() if any(t.is_meta for t in (*m.parameters(), *m.buffers()))}
        self._done: set[nn.Module] = set()
        for name, parameter in model.named_parameters():
            if parameter.is_meta and not (parameter.is_floating_point() and parameter.numel()):
                make_real(parameter, _without_values(parameter, parameter.dtype, torch.device("cpu")))
                self._unset[id(parameter)] = (name, parameter)
        for path, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    persistent = name not in module._non_persistent_buffers_set
                    real = _without_values(buffer, buffer.dtype, torch.device("cpu"))
                    module.register_buffer(name, real, persistent=persistent)
                    self._unset[id(real)] = (_joined(path, name), real)

    def units(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """These units, each when its parameters are real and have values.

        The root unit is made first and comes last. Raises OffloadError where the model's own code does not do.
        """
        yield from self._walk(self._model, "", {unit.name: unit for unit in units}, None)
        self._check_rest()

    def buffers(self) -> None:
        """Give values to the buffers that were on meta and have none yet; parameters stay as they are."""
        for module, family in _with_families(self._model, None):
            if any(id(b) in self._unset for b in module.buffers(recurse=False)):
                with _standing_in([(m, name) for m in module.modules() for name in m._parameters]):
                    self._call(module, family, "a part of the model")
        self._check_rest()

    def has_values(self, tensor: torch.Tensor) -> None:
        """Values of a tensor came from elsewhere."""
        self._unset.pop(id(tensor), None)

    def _walk(self, module: nn.Module, path: str, units: dict[str, Unit], family: nn.Module | None) -> Iterator[Unit]:
        family = module if _initialises_others(module) else family
        unit = units.get(path)
        if unit is not None:
            self._make(unit)
        for name, child in module.named_children():
            yield from self._walk(child, _joined(path, name), units, family)
        if module in self._abstract and module not in self._done:
            self._done.add(module)
            with _standing_in(self._out_of_reach(module)):
                self._call(module, family, path)
        if unit is not None:
            self._check(unit)
            yield unit

    def _make(self, unit: Unit) -> None:
        for field in unit.fields:
            parameter = field.parameter
            if parameter.is_meta:
                self._built_changes[id(parameter)] = parameter._version
                built = story_of(parameter)
                make_real(parameter, _without_values(parameter, torch.float32, self._device))
                if built is not None:
                    self._stories[id(parameter)] = (built, begin_story(parameter))
                self._unset[id(parameter)] = (field.name, parameter)

    def _out_of_reach(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Parameters in it that were real before, and those of its own that another module makes."""
        places = [(m, name, self._makers.get(id(p))) for m in module.modules() for name, p in m._parameters.items()]
        return [(m, name) for m, name, maker in places if maker is None or (m is module and maker is not module)]

    def _call(self, module: nn.Module, family: nn.Module | None, path: str) -> None:
        """Let the module's own code, and that of the model around it, set what is its own."""
        real = [(b, b.clone()) for b in module.buffers() if not b.is_meta and id(b) not in self._unset]
        try:
            with torch.no_grad(), Writing():
                for act in self._acts(module, family):
                    told = [self._stories[id(p)] for p in module.parameters() if id(p) in self._stories]
                    self._repeating.call(act, told)
        except Exception as error:
            said = str(error).strip().partition("\n")[0]
            away = " (a parameter of another unit of the plan is away then)" if "single memory location" in said else ""
            raise OffloadError(
                f"the initialisation of {path or 'the model'} ({type(module).__name__}) fails on a model that was "
                f"built on meta: {type(error).__name__}: {said}{away}; build the model for real, or read its weights "
                "from safetensors files"
            ) from error
        with torch.no_grad():
            for buffer, values in real:
                buffer.copy_(values)

    def _acts(self, module: nn.Module, family: Any) -> Iterator[Callable[[], object]]:
        name = reset_of(module)
        if family is None or not _sets_everything(family):
            if name is not None:
                yield getattr(module, name)
            if family is not None:
                yield partial(family._init_weights, module)
            return
        yield partial(family._init_weights, module)
        own = [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if id(t) in self._unset]
        self._decided.update(map(id, own))
        if name is not None and any(_has_no_values(t) for t in own):
            yield getattr(module, name)

    def _check(self, unit: Unit) -> None:
        """Raise OffloadError for a parameter that nobody set, or to which more was done when the model was built."""
        for field in unit.fields:
            if self._unset.pop(id(field.parameter), None) is None:
                continue
            if _has_no_values(field.parameter):
                raise OffloadError(_nobody_sets(field.name, field.parameter, self._model))
            if (said := self._lost(field.parameter)) is not None:
                raise OffloadError(
                    f"parameter {field.name} was {said[0]} while the model was built, and its own initialisation "
                    f"changes it {said[1]}: on meta the rest of what __init__ does to it would be lost. Move that into "
                    "reset_parameters() or _init_weights(module), or build the model for real, without "
                    "memplan.on_meta()."
                )

    def _lost(self, parameter: nn.Parameter) -> tuple[str, str] | None:
        """What was done to it when the model was built, and what is done now, where those differ."""
        if (stories := self._stories.get(id(parameter))) is None:
            built, now = self._built_changes[id(parameter)], parameter._version
            same = built in (0, now) or id(parameter) in self._decided
            return None if same else (f"changed {built} times", f"{now} times")
        told, made = stories
        same = told.blank or (told.tells(made) and not self._repeating.is_like_a_copy(made))
        return None if same else (told.described(), made.described().removeprefix("changed "))

    def _check_rest(self) -> None:
        for name, tensor in self._unset.values():
            if _has_no_values(tensor):
                raise OffloadError(_nobody_sets(name, tensor, self._model))
        self._unset.clear()


def _nobody_sets(name: str, tensor: torch.Tensor, model: nn.Module) -> str:
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    module = model.get_submodule(name.rpartition(".")[0])
    return (
        f"{kind} {name} was built on meta and nobody gives it values: {type(module).__name__} has no "
        "reset_parameters(), and no module around it an _init_weights(module), that does. Add one, or build the model "
        "under memplan.on_meta(), which keeps buffers and small parameters real, or read its weights from safetensors"
    )


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _without_values(like: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A real tensor of this shape: NaN where it is floating-point, zero otherwise."""
    return torch.full(like.shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=device)


def _has_no_values(tensor: torch.Tensor) -> bool:
    """Whether anything in it was never set; of integers, whether nothing was."""
    return bool(tensor.isnan().any()) if tensor.is_floating_point() else tensor._version == 0


def _initialises_others(module: nn.Module) -> bool:
    """Whether it has ``_init_weights(module)``; some have a method of that name for themselves alone."""
    method = getattr(module, "_init_weights", None)
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(module)
    except (TypeError, ValueError):
        return False
    return True


def _sets_everything(family: nn.Module) -> bool:
    """Whether its ``_init_weights`` alone decides, as in transformers, which too builds on meta to load weights."""
    return hasattr(family, "_initialize_weights")


def _makers(model: nn.Module) -> dict[int, nn.Module]:
    """The module that gives values to each parameter on meta: the one that made it, or else the first that has it."""
    found: dict[int, nn.Module] = {}
    modules = dict.fromkeys(model.modules())
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_meta:
                maker = getattr(parameter, MAKER, module)
                found.setdefault(id(parameter), maker if maker in modules else module)
    return found


def _with_families(module: nn.Module, family: nn.Module | None) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Every module with the nearest model around it that initialises others, children first."""
    family = module if _initialises_others(module) else family
    for child in module.children():
        yield from _with_families(child, family)
    yield module, family


@contextmanager
def _standing_in(places: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Parameters of these modules and names are out of reach: others on meta stand in, which nothing changes."""
    kept = [(module, name, module._parameters[name]) for module, name in places]
    for module, name, parameter in kept:
        if parameter is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter
