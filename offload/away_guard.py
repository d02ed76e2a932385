"""AwayGuard: watches the first pass for operations that read parameters which are away, or change those with copies.

What a parameter that is away looks like: [Note: parameters that are away] in ``offload.weights``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from offload.compiled import uncompiled
from offload.dtensors import local_of
from offload.errors import OffloadError


def storage_address(tensor: torch.Tensor) -> int:
    """Address of the tensor's memory here; 0 for a sparse or other tensor that has no plain storage."""
    try:
        return local_of(tensor).untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


class AwayGuard(TorchDispatchMode):
    """Raises OffloadError when an operation reads a parameter that is away or not up to date, or changes one.

    ``stale`` names the unit of an address whose update nobody has waited for in this pass; ``held`` tells addresses of
    weights.
    """

    def __init__(
        self,
        nan: torch.Tensor,
        names: Callable[[torch.Size], list[str]],
        stale: Callable[[int], bool],
        held: Callable[[int], bool],
    ) -> None:
        super().__init__()
        self._nan, self._names, self._stale, self._held = storage_address(nan), names, stale, held
        self._uncompiled: AbstractContextManager[Any] | None = None

    def __enter__(self) -> Self:
        self._uncompiled = uncompiled()
        self._uncompiled.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._compile_again()

    def begin_anew(self) -> None:
        """Leave it where an exception came between entering and leaving."""
        while self in (modes := _get_current_dispatch_mode_stack()):
            modes[-1].__exit__(None, None, None)  # those above it were entered inside
        self._compile_again()

    def _compile_again(self) -> None:
        if self._uncompiled is not None:
            self._uncompiled.__exit__(None, None, None)
            self._uncompiled = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the tensors of one operation, then do it."""
        # Views and detaching read no data, and autograd makes them of parameters that are away.
        if not func.is_view:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and self._out_of_reach(storage_address(leaf)):
                    names = self._names(local_of(leaf).shape)
                    raise OffloadError(
                        f"{func} reads a parameter of shape {list(leaf.shape)} outside of the forward of its module, "
                        f"while its unit is away: one of {names}. Leave that module's parameters to the root unit: "
                        "take its unit out of the plan."
                    )
        for value, argument in zip(args, func._schema.arguments, strict=False):
            changes = argument.alias_info is not None and argument.alias_info.is_write
            if changes and isinstance(value, torch.Tensor) and self._held(storage_address(value)):
                raise OffloadError(
                    f"{func} changes a parameter of shape {list(value.shape)} in place: one of "
                    f"{self._names(local_of(value).shape)}. The engine keeps other copies of it, which would not "
                    "change; train this model without offloading that parameter's optimizer state and weights."
                )
        return func(*args, **(kwargs or {}))

    def _out_of_reach(self, address: int) -> bool:
        return address != 0 and (address == self._nan or self._stale(address))
