"""Building a model without memory for its parameters: they are on the meta device until an engine takes them over."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from offload.stories import Building, story_of

SMALL_BYTES = 1 << 20
"""Parameters up to this size stay real where their module has no method that would make them again."""
MAKER = "_first_values_by"
"""Attribute of a parameter on meta: the module that made it, where several share it."""

_ORTHOGONAL = nn.init.orthogonal_


def reset_of(module: nn.Module) -> str | None:
    """The name of the method with which PyTorch's modules give their own parameters first values, if it has one."""
    return next((n for n in ("reset_parameters", "_reset_parameters") if callable(getattr(module, n, None))), None)


@contextmanager
def on_meta() -> Iterator[None]:
    """A context in which modules make their parameters on meta, without memory.

    What nobody could make again stays real: buffers, small parameters that have numbers as they come or whose module
    has no ``reset_parameters``, and parameters that are put in the place of others or have numbers of tensors from
    elsewhere, as loaded ones. The engine makes the rest real, unit by unit.
    """
    kept: dict[int, nn.Parameter] = {}

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or id(parameter) in kept:
            return None  # what is tied stays tied
        replaces, story = module._parameters.get(name) is not None, story_of(parameter)
        makes_it = reset_of(module) is not None and story is not None and story.blank
        if replaces or story is None or (not makes_it and parameter.nbytes <= SMALL_BYTES):
            kept[id(parameter)] = parameter
            return None
        abstract = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        vars(abstract).update(vars(parameter))
        setattr(abstract, MAKER, module)
        return abstract

    # PyTorch's annotation leaves out that a hook may give another parameter.
    handle = register_module_parameter_registration_hook(registered)  # type: ignore[arg-type]
    orthogonal, nn.init.orthogonal_ = nn.init.orthogonal_, _orthogonal_
    try:
        with Building():
            yield
    finally:
        nn.init.orthogonal_ = orthogonal
        handle.remove()


def _orthogonal_(tensor: torch.Tensor, gain: float = 1, generator: torch.Generator | None = None) -> torch.Tensor:
    """PyTorch's does nothing on meta, and would not be told; this one writes what that writes to a real tensor."""
    if not tensor.is_meta:
        return _ORTHOGONAL(tensor, gain, generator)
    with torch.no_grad():
        return tensor.copy_(torch.empty_like(tensor)).mul_(gain)


def make_real(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Put ``values`` into a parameter, on meta or not: it stays the object that optimizers and modules know."""
    if not parameter.is_meta:
        parameter.data = values
        return
    # Assigning to .data can not leave meta. ``torch.utils.swap_tensors`` does this too, but refuses a parameter that
    # is known by weak references, as those of recurrent layers and of traced models are.
    vars(parameter).pop(MAKER, None)
    torch._C._swap_tensor_impl(parameter, nn.Parameter(values, parameter.requires_grad))
