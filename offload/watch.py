"""Watch: parameters that somebody else than the engine changed are found before training goes on with half of it.

[Note: changes behind the engine's back]
A parameter that is away, or whose update runs elsewhere, has other copies; writing to what the model shows of it is
lost, or lasts until the next update. Three cheap questions a parameter tell: is it still the one in its module, does
its data lie where the engine put it, and has torch counted a change (``_version``; assigning ``data`` counts none).
One question a module tells whether it is still part of the model, or of what took its place: torch.compile's wrappers
have the same parameters, another block would train by nobody.
Weights whose update runs on the device have no other copy: they may be changed as in plain PyTorch. What is written
through ``parameter.data`` in place is counted nowhere, and not found.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from offload.dtensors import local_of
from offload.errors import OffloadError
from offload.state import UnitState
from offload.unit import Field
from offload.weights import WeightMover


class Watch:
    """Knows how every parameter must look between two passes; ``settle`` waits for all updates under way."""

    def __init__(
        self, model: nn.Module, states: Sequence[UnitState], mover: WeightMover, settle: Callable[[], None]
    ) -> None:
        self._states, self._mover, self._settle = states, mover, settle
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append((module, key))
        self._holders = {
            s.unit.name: [(module, key, f) for f in s.unit.fields for module, key in holders[id(f.parameter)]]
            for s in states
        }
        self._children = [
            (parent, key, child, f"{name}.{key}".removeprefix("."))
            for name, parent in model.named_modules()
            for key, child in parent._modules.items()
            if child is not None and next(child.parameters(), None) is not None
        ]
        self._versions: dict[str, int] = {}
        self._lent: set[str] = set()
        for state in states:
            self._note(state)

    def check(self) -> None:
        """Raise OffloadError, naming one, where modules or parameters were changed; they are as before then."""
        self._check_modules()
        found = {s.unit.name: how for s in self._states if (how := self._changed(s)) is not None}
        if not found:
            return
        self._settle()
        for state in self._states:
            if state.unit.name in found:
                self._restore(state)
        raise OffloadError(
            f"{next(iter(found.values()))} behind the engine's back, which keeps other copies of it, and was set back; "
            "change parameters inside of `with engine.gathered(...)`, or all of them by engine.load_state_dict()"
        )

    def _check_modules(self) -> None:
        for parent, key, child, name in self._children:
            now = parent._modules.get(key)
            if now is not child and (now is None or set(now.parameters()) != set(child.parameters())):
                parent._modules[key] = child
                raise OffloadError(
                    f"another module took the place of {name} after Engine(), which trains the parameters that it was "
                    "made with; it was set back: change the model first, and then make the engine"
                )

    def check_none_lent(self) -> None:
        """Raise OffloadError inside of ``gathered``."""
        if self._lent:
            raise OffloadError(
                "parameters are gathered, and what is written to them reaches the engine when that ends: "
                "leave `with engine.gathered(...)` first"
            )

    def lend(self, state: UnitState, flat: torch.Tensor) -> None:
        """Let the unit's parameters be a copy that anybody may write to, until ``take_back``."""
        self._lent.add(state.unit.name)
        self._mover.lend(state.unit.name, flat)

    def take_back(self, state: UnitState) -> None:
        """The unit's parameters are the engine's again; what is in the tiers is true."""
        self._mover.take_back(state.unit.name)
        self._lent.discard(state.unit.name)
        self._note(state)

    def _changed(self, state: UnitState) -> str | None:
        """How the unit was changed."""
        if state.unit.name in self._lent:
            return None
        for module, key, field in self._holders[state.unit.name]:
            if module._parameters.get(key) is not field.parameter:
                return f"another tensor took the place of parameter {field.name}"
        address = self._mover.address(state.unit.name)
        for field in state.unit.fields:
            parameter = field.parameter
            if local_of(parameter).data_ptr() != address(field):
                return f"other data was assigned to parameter {field.name}, or it was converted or moved,"
            if parameter._version != self._versions[field.name] and _has_other_copies(state, field):
                return f"parameter {field.name} was changed in place"
        return None

    def _restore(self, state: UnitState) -> None:
        for module, key, field in self._holders[state.unit.name]:
            module._parameters[key] = field.parameter
        self._mover.restore(state.unit.name)
        self._note(state)

    def _note(self, state: UnitState) -> None:
        for field in state.unit.fields:
            self._versions[field.name] = field.parameter._version


def _has_other_copies(state: UnitState, field: Field) -> bool:
    return state.device_weights is None or (state.host_weights is not None and field.trainable)
