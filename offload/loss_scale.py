"""The loss scale of fp16: small gradients would vanish in its few exponents, so they are those of a larger loss.

The rules are those of ``torch.amp.GradScaler``: a step whose gradients are not finite is skipped, and halves the scale;
so many steps in a row that are finite double it. The scale never leaves the device.
"""

from typing import Any

import torch

from offload.errors import OffloadError
from offload.plan import Precision
from offload.unit_update import ClipFactor


class LossScale:
    """Multiplies losses, and divides their gradients in the clip factor; ``scaler`` gives the rules and first scale."""

    def __init__(self, scaler: torch.amp.GradScaler | None, device: torch.device) -> None:
        scaler = torch.amp.GradScaler(device.type) if scaler is None else scaler
        if not scaler.is_enabled():
            raise OffloadError("the GradScaler is not enabled; training in fp16 needs one that is, or none given")
        self._rules = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
        self._scale = torch.zeros((), device=device)
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.load_state_dict(scaler.state_dict())

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward on."""
        return loss * self._scale

    def clip_factor(self, norm: torch.Tensor, max_norm: float | None) -> ClipFactor:
        """For gradients of this norm, of losses scaled so far; later losses get the scale that follows."""
        clip = ClipFactor(norm, max_norm, self._scale)
        assert clip.skip is not None
        torch._amp_update_scale_(self._scale, self._growth_tracker, clip.skip.float(), *self._rules)
        return clip

    def state_dict(self) -> dict[str, Any]:
        """As a GradScaler's, without its rules; waits for the device."""
        return {"scale": self._scale.item(), "_growth_tracker": self._growth_tracker.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; takes a GradScaler's too."""
        self._scale.fill_(state["scale"])
        self._growth_tracker.fill_(state["_growth_tracker"])


def loss_scale(scaler: torch.amp.GradScaler | None, precision: Precision, device: torch.device) -> LossScale | None:
    """What this precision needs; raises OffloadError for a scaler that it has no use for."""
    if precision is Precision.FP16:
        return LossScale(scaler, device)
    if scaler is not None:
        raise OffloadError(f"a GradScaler is for plans in fp16, and this one is in {precision}; leave it out")
    return None
