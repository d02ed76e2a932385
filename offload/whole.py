"""Whole tensors while they are away: to look at, to write to, to save and to load, wherever they live.

[Note: whole parameters]
Inside of ``gathered`` a parameter's data is a copy of its own on the compute device, and the tiers keep what they have.
On leaving, both are compared bit by bit: only a unit that differs is written, and in bf16 only a weight that differs
takes a new master, so looking costs no write and keeps every remainder.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from offload import contents
from offload.dtensors import is_distributed, local_of, share_of
from offload.errors import OffloadError
from offload.state import UnitState, weight_dtype
from offload.unit import Field
from offload.watch import Watch

if TYPE_CHECKING:
    from offload.engine import Engine

EXTRA_STATE = "_extra_state"
"""How torch ends the key of what a module's ``get_extra_state`` returns."""
NAMED_AT_MOST = 3
"""Keys that an error names, of each kind."""

Chosen = str | nn.Module | nn.Parameter
"""A parameter or a module, or the dotted name of either."""


class KeyDifference(NamedTuple):
    """What a loaded state dict lacked, and had beyond the model's keys."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@contextmanager
def gathered(
    engine: "Engine", watch: Watch, chosen: Iterable[Chosen | Iterable[Chosen]]
) -> Iterator[dict[str, nn.Parameter]]:
    """See ``Engine.gathered``."""
    parameters = _parameters(engine.model, chosen)
    engine.finish()
    ids = {id(p) for p in parameters.values()}
    states = [s for s in engine.states if any(id(f.parameter) in ids for f in s.unit.fields)]
    lent: list[UnitState] = []
    try:
        for state in states:
            flat, _ = contents.split(
                contents.read(state, engine.plan.state_format, engine.store), engine.plan.precision
            )
            watch.lend(state, flat.to(engine.device))
            lent.append(state)
        with torch.no_grad():
            yield parameters
    finally:
        failed: OffloadError | None = None
        for state in lent:
            try:
                changed = _changed(engine, state)
            except OffloadError as error:
                failed, changed = failed or error, None
            if changed is not None:
                engine.replace(state, changed)
            watch.take_back(state)
        if failed is not None:
            raise failed


def state_dict(engine: "Engine") -> dict[str, Any]:
    """See ``Engine.state_dict``."""
    engine.finish()
    result = engine.model.state_dict(keep_vars=True)
    keys, owned = _keys_by_parameter(result), _owned(engine)
    buffers = {id(buffer) for buffer in engine.model.buffers()}
    for key, value in result.items():
        if not isinstance(value, torch.Tensor) or id(value) in owned:
            continue
        result[key] = value.detach().cpu().clone()
        if id(value) not in buffers and value.is_floating_point() and result[key].isnan().any():
            raise OffloadError(
                f"state_dict() has {key}, which the model's own state_dict or a hook of it computes, and computed of "
                "parameters that are away: take `with engine.gathered(model): model.state_dict()`"
            )
    for state in engine.states:
        whole = contents.read(state, engine.plan.state_format, engine.store)
        for field in state.unit.fields:
            part = field.view(whole.weights)
            weight = state.ranks.joined(field.share, part) if state.ranks is not None else part.clone()
            result |= dict.fromkeys(keys.get(id(field.parameter), ()), weight)
    return result


def load_state_dict(engine: "Engine", tensors: Mapping[str, Any], strict: bool) -> KeyDifference:
    """See ``Engine.load_state_dict``."""
    if not isinstance(tensors, Mapping):
        raise OffloadError(
            f"load_state_dict() takes tensors by name, as state_dict() gives them, not a {type(tensors).__name__}"
        )
    if not engine.recovery.half_done:
        engine.recovery.check()
    targets = engine.model.state_dict(keep_vars=True)
    difference = KeyDifference([k for k in targets if k not in tensors], [k for k in tensors if k not in targets])
    _check_keys(targets, tensors, difference, strict)
    keys = _keys_by_parameter({k: v for k, v in targets.items() if k in tensors})
    with engine.recovery.loading(engine.finish, everything=not difference.missing_keys) as half_done:
        if half_done:
            engine.zero_grad()
            engine.hyperparameters.steps.clear()
        for state in engine.states:
            given = [(f, tensors[key]) for f in state.unit.fields for key in keys.pop(id(f.parameter), ())]
            if given:
                # Moments of an update that is half done are of no step.
                whole = (
                    contents.Contents.zeros(state, engine.plan.optimizer)
                    if half_done
                    else contents.read(state, engine.plan.state_format, engine.store)
                )
                for field, tensor in given:
                    field.view(whole.weights).copy_(_own(field, tensor))
                engine.replace(state, whole)
        owned = _owned(engine)
        with torch.no_grad():
            for key in targets.keys() & tensors.keys():
                if key.endswith(EXTRA_STATE):
                    path = key.removesuffix(EXTRA_STATE).removesuffix(".")
                    engine.model.get_submodule(path).set_extra_state(tensors[key])
                elif id(targets[key]) not in owned:
                    targets[key].copy_(tensors[key])
    return difference


def _parameters(model: nn.Module, chosen: Iterable[Chosen | Iterable[Chosen]]) -> dict[str, nn.Parameter]:
    """The chosen parameters by name, in the model's order; shared ones under their first name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {id(p) for p in named.values()}
    wanted: set[int] = set()
    for one in chosen:
        if isinstance(one, str):
            if one not in named and one not in modules:
                raise OffloadError(f"the model has no parameter and no module of the name {one!r}")
            found = [named[one]] if one in named else list(modules[one].parameters())
        elif isinstance(one, nn.Parameter):
            found = [one]
        elif isinstance(one, nn.Module) and not isinstance(one, nn.ParameterList | nn.ParameterDict):
            found = list(one.parameters())
        elif isinstance(one, Iterable):
            found = list(_parameters(model, one).values())
        else:
            raise OffloadError(f"gathered() takes parameters, modules and their names, not a {type(one).__name__}")
        if any(id(p) not in known for p in found):
            raise OffloadError(f"gathered() was given a {type(one).__name__} that is not a part of the engine's model")
        wanted |= {id(p) for p in found}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def _changed(engine: "Engine", state: UnitState) -> contents.Contents | None:
    """The unit's numbers with what was written to its parameters; None where nothing was."""
    whole = contents.read(state, engine.plan.state_format, engine.store)
    before, _ = contents.split(whole, engine.plan.precision)
    written = False
    for field in state.unit.fields:
        written |= _take_over(field, field.view(before), field.view(whole.weights), engine)
    return whole if written else None


def _take_over(field: Field, before: torch.Tensor, master: torch.Tensor, engine: "Engine") -> bool:
    """Give a master the elements of its parameter that are not as before; whether there are any."""
    now = local_of(field.parameter).detach().cpu()
    if now.shape != field.shape:
        raise OffloadError(
            f"inside of gathered() parameter {field.name} became one of shape {list(now.shape)}, it has "
            f"{list(field.shape)}; it was set back"
        )
    if now.dtype != weight_dtype(engine.plan.precision):  # other data was assigned, perhaps of a finer type
        master.copy_(now)
        return True
    bits = torch.int16 if now.itemsize == 2 else torch.int32
    differs = now.contiguous().view(bits) != before.view(bits)  # as numbers, no NaN would equal itself
    master[differs] = now[differs].float()
    return bool(differs.any())


def _own(field: Field, tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor that is whole, or divided as the parameter is."""
    if not is_distributed(tensor):
        return field.share.own(tensor) if field.share is not None else tensor
    if share_of(tensor) != field.share:
        raise OffloadError(f"{field.name} is divided in another way there than in the model; give it as a whole tensor")
    return local_of(tensor)


def _owned(engine: "Engine") -> set[int]:
    """Identities of the parameters that live in the tiers."""
    return {id(f.parameter) for state in engine.states for f in state.unit.fields}


def _keys_by_parameter(tensors: Mapping[str, Any]) -> dict[int, list[str]]:
    """The keys of every parameter, several where it is shared."""
    keys: dict[int, list[str]] = {}
    for key, value in tensors.items():
        if isinstance(value, nn.Parameter):
            keys.setdefault(id(value), []).append(key)
    return keys


def _check_keys(targets: dict[str, Any], tensors: Mapping[str, Any], difference: KeyDifference, strict: bool) -> None:
    """Raise OffloadError where torch's ``load_state_dict`` would."""
    wrong = [f"it has no {_some(difference.missing_keys)}"] * (strict and bool(difference.missing_keys))
    wrong += [f"the model has no {_some(difference.unexpected_keys)}"] * (strict and bool(difference.unexpected_keys))
    for key, target in targets.items():
        if not isinstance(target, torch.Tensor) or key not in tensors or key.endswith(EXTRA_STATE):
            continue
        if not isinstance(tensors[key], torch.Tensor):
            wrong.append(f"{key} is a {type(tensors[key]).__name__}, not a tensor")
        elif tensors[key].is_meta or tensors[key].is_complex() > target.is_complex():
            wrong.append(f"{key} is {'on meta' if tensors[key].is_meta else 'complex'}, and has no numbers for it")
        elif tensors[key].shape != target.shape:
            wrong.append(f"{key} is {list(tensors[key].shape)} there and {list(target.shape)} in the model")
    if wrong:
        raise OffloadError(f"the state dict is not of this model: {'; '.join(wrong[:NAMED_AT_MOST])}")


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED_AT_MOST} more" if len(keys) > NAMED_AT_MOST else ""
    return ", ".join(map(str, keys[:NAMED_AT_MOST])) + more
