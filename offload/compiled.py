"""torch.compile on units: what was compiled stays compiled, and the runtime's hooks stay outside of it.

[Note: compiled units]
A module that was compiled in place compiles the call of its hooks too, and hooks that move memory break its graph. So
its compiled call gets a shell, a module of its own that carries the hooks. The first pass runs as if nothing were
compiled: it is watched operation by operation, and what torch sees under such a watch it would never compile again.
"""

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from offload.errors import PlanError
from offload.unit import Unit


class _Shell(nn.Module):
    """Calls a compiled module; hooks on it run as they are."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        super().__init__()
        self._compiled = compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As compiled."""
        return self._compiled(*args, **kwargs)


def hookable(module: nn.Module) -> nn.Module:
    """What every call of the module goes through uncompiled: the module itself, or the shell of a compiled one."""
    compiled = module._compiled_call_impl
    if compiled is None:
        return module
    shell = getattr(compiled, "__self__", None)
    if not isinstance(shell, _Shell):
        shell = _Shell(compiled)
        module._compiled_call_impl = shell.__call__
    return shell


def check_compiled(model: nn.Module, units: Iterable[Unit]) -> None:
    """Raise PlanError where a compiled module has units inside: their weights could not come and go in it."""
    names = [unit.name for unit in units if unit.name]
    for path, module in model.named_modules():
        if module._compiled_call_impl is None and not hasattr(module, "_orig_mod"):
            continue
        inside = next((n for n in names if n != path and n.startswith(f"{path}." if path else "")), None)
        if inside is not None:
            raise PlanError(
                f"{path or 'the model'} is compiled as a whole and has units of the plan inside, such as {inside}; "
                "compile those instead: `for block in model.layers: block.compile()`"
            )


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which compiled modules run as they were before, and stay compiled for later."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing is compiled, and to import the compiler takes seconds
    return torch.compiler.set_stance("force_eager")
