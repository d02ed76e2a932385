"""Lion, an optimizer that torch lacks: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from offload.rules import LionStep


class Lion(torch.optim.Optimizer):
    """The sign of the interpolated momentum, with decoupled decay; one moment of each element.

    Its steps are larger than AdamW's: the paper takes a learning rate three to ten times smaller, and a weight decay
    as much larger. To be given to an engine, or used alone.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Raises ValueError for values out of range, as torch's optimizers do."""
        if not lr >= 0 or not weight_decay >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr is {lr}, weight_decay {weight_decay}, betas {betas}; the first two must not be negative, "
                "betas lie between 0 and 1"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            how = LionStep(float(group["lr"]), float(beta1), float(beta2), float(group["weight_decay"]))
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(parameter)
                    how.update_(parameter, parameter.grad, (state["exp_avg"],))
        return loss
