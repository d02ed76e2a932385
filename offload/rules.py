"""The rules of the update: what each optimizer does to fp32 masters, in torch's own operations. Pure.

Each is in the order of operations of the optimizer's ``step`` in torch, so that both end at the same numbers. The
compiled forms, ``native_rules.h`` and ``device_update.py``, have each rule once more, by the same name.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


class UpdateStep(ABC):
    """Hyperparameters of one update of one parameter; where there is a ``step``, it counts from 1."""

    rule: ClassVar[str]
    """Its name in the compiled forms."""

    @property
    @abstractmethod
    def scalars(self) -> tuple[float, ...]:
        """The numbers that the compiled forms are given, in their order."""

    @property
    def seed(self) -> int:
        """What differs from one update to the next: its number, where the rule counts."""
        return 0

    @abstractmethod
    def update_(self, master: torch.Tensor, gradient: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        """Update masters and moments in place, all fp32 and of one shape; the gradient is spent."""


@dataclass(frozen=True)
class AdamWStep(UpdateStep):
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019. Moments: of gradients, of their squares."""

    rule: ClassVar[str] = "adam"

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @property
    def seed(self) -> int:
        """The number of the step."""
        return self.step

    @property
    def shrink(self) -> float:
        """What decay leaves of a master."""
        return 1 - self.learning_rate * self.weight_decay

    @property
    def pull(self) -> float:
        """The share of a master that its gradient is given."""
        return 0.0

    @property
    def scalars(self) -> tuple[float, ...]:
        """As said above."""
        lerp, rest2 = 1 - self.beta1, 1 - self.beta2
        return self.pull, self.shrink, lerp, self.beta2, rest2, self.correction2, self.eps, -self.step_size

    @property
    def step_size(self) -> float:
        """Of the first moment, its bias corrected."""
        return self.learning_rate / (1 - self.beta1**self.step)

    @property
    def correction2(self) -> float:
        """What the root of the second moment is divided by for its bias."""
        return (1 - self.beta2**self.step) ** 0.5

    def update_(self, master: torch.Tensor, gradient: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        """As ``torch.optim.AdamW``."""
        exp_avg, exp_avg_sq = moments
        master.mul_(self.shrink)
        _pull_(gradient, master, self.pull)
        exp_avg.lerp_(gradient, 1 - self.beta1)
        exp_avg_sq.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = exp_avg_sq.sqrt().div_(self.correction2).add_(self.eps)
        master.addcdiv_(exp_avg, denominator, value=-self.step_size)


@dataclass(frozen=True)
class AdamStep(AdamWStep):
    """Kingma and Ba, Adam, 2015: decay is part of the gradient."""

    @property
    def shrink(self) -> float:
        """Nothing is taken off a master."""
        return 1.0

    @property
    def pull(self) -> float:
        """The L2 penalty's."""
        return self.weight_decay


@dataclass(frozen=True)
class LionStep(UpdateStep):
    """Chen et al., Symbolic Discovery of Optimization Algorithms, 2023. One moment, of gradients."""

    rule: ClassVar[str] = "lion"

    learning_rate: float
    beta1: float
    beta2: float
    weight_decay: float

    @property
    def shrink(self) -> float:
        """What decay leaves of a master."""
        return 1 - self.learning_rate * self.weight_decay

    @property
    def scalars(self) -> tuple[float, ...]:
        """As said above."""
        return self.shrink, 1 - self.beta1, 1 - self.beta2, -self.learning_rate

    def update_(self, master: torch.Tensor, gradient: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        """A step of one size for every element, where the gradient's average of now points."""
        (exp_avg,) = moments
        master.mul_(self.shrink)
        master.add_(exp_avg.lerp(gradient, 1 - self.beta1).sign_(), alpha=-self.learning_rate)
        exp_avg.lerp_(gradient, 1 - self.beta2)


@dataclass(frozen=True)
class SgdStep(UpdateStep):
    """Gradient descent without momentum. No moments."""

    rule: ClassVar[str] = "sgd"

    learning_rate: float
    weight_decay: float

    @property
    def scalars(self) -> tuple[float, ...]:
        """As said above."""
        return self.weight_decay, -self.learning_rate

    def update_(self, master: torch.Tensor, gradient: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        """As ``torch.optim.SGD``."""
        assert not moments
        _pull_(gradient, master, self.weight_decay)
        master.add_(gradient, alpha=-self.learning_rate)


@dataclass(frozen=True)
class MomentumStep(UpdateStep):
    """Gradient descent with momentum, Nesterov's or the plain one. One moment: the buffer."""

    rule: ClassVar[str] = "momentum"

    learning_rate: float
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    step: int

    @property
    def seed(self) -> int:
        """The number of the step."""
        return self.step

    @property
    def share(self) -> float:
        """Of the gradient in the buffer: the first one is the buffer, whatever the dampening."""
        return 1.0 if self.step == 1 or not self.momentum else 1 - self.dampening

    @property
    def scalars(self) -> tuple[float, ...]:
        """As said above."""
        return self.weight_decay, self.momentum, self.share, float(self.nesterov), -self.learning_rate

    def update_(self, master: torch.Tensor, gradient: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        """As ``torch.optim.SGD``."""
        (buffer,) = moments
        _pull_(gradient, master, self.weight_decay)
        buffer.mul_(self.momentum).add_(gradient, alpha=self.share)
        direction = gradient.add_(buffer, alpha=self.momentum) if self.nesterov else buffer
        master.add_(direction, alpha=-self.learning_rate)


@dataclass(frozen=True)
class AdagradStep(UpdateStep):
    """Duchi, Hazan and Singer, Adaptive Subgradient Methods, 2011. One moment: the sum of squares."""

    rule: ClassVar[str] = "adagrad"

    learning_rate: float
    rate_decay: float
    eps: float
    initial: float
    """What the sum of squares begins with."""
    weight_decay: float
    step: int

    @property
    def seed(self) -> int:
        """The number of the step."""
        return self.step

    @property
    def step_size(self) -> float:
        """The learning rate of this step."""
        return self.learning_rate / (1 + (self.step - 1) * self.rate_decay)

    @property
    def scalars(self) -> tuple[float, ...]:
        """As said above."""
        return self.weight_decay, float(self.step == 1), self.initial, self.eps, -self.step_size

    def update_(self, master: torch.Tensor, gradient: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        """As ``torch.optim.Adagrad``."""
        (total,) = moments
        if self.step == 1:
            total.fill_(self.initial)
        _pull_(gradient, master, self.weight_decay)
        total.addcmul_(gradient, gradient, value=1)
        master.addcdiv_(gradient, total.sqrt().add_(self.eps), value=-self.step_size)


def _pull_(gradient: torch.Tensor, master: torch.Tensor, share: float) -> None:
    """The gradient of an L2 penalty, where there is one."""
    if share:
        gradient.add_(master, alpha=share)
