"""Gradients of several ranks: gathered as those of one, then summed over the ranks, each keeping what it updates.

[Note: order of reductions]
Units are reduced in a fixed order, the reverse of forward, on every rank: one that is complete waits for those before
it. One that lacks a gradient here takes part, too, and soon: another rank for which it is complete may wait for its
buffer before it comes to what this one needs next. So it is complete as well when its backward is over and autograd
has nothing more for it (``over``), and at the latest at the end of backward. From stage 2 on every micro-batch is
reduced, for no rank keeps a whole gradient; below it only the last one of a step. Losses are divided by the number of
ranks before backward, so sums are means.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import get_gradient_edge

from offload.dtensors import gradient_of, is_partial, share_of
from offload.errors import OffloadError
from offload.gradients import Gathering, GradientCollector
from offload.plan import Plan
from offload.ranks import Ranks
from offload.state import UnitState
from offload.streams import Done, Lane


@dataclass(eq=False)
class _Divided:
    """What several ranks need to know of one unit's gradients."""

    square: torch.Tensor
    """Square of the norm of this rank's part of the sum, a scalar on the device."""
    fields: list[slice]
    """The parameters' places in that part."""
    passed: set[str] = field(default_factory=set)
    """Parameters that got a gradient in this backward pass."""
    complete: bool = False
    reduced: bool = False
    """Whether nothing can be added in this backward pass any more."""
    partial: bool = False
    """Whether earlier micro-batches of the step left a sum at home."""


class DividedGradients(GradientCollector):
    """``GradientCollector`` over several ranks."""

    def __init__(
        self,
        states: Sequence[UnitState],
        plan: Plan,
        device: torch.device,
        down: Lane,
        up: Lane,
        reduces: Lane,
        ranks: Ranks,
    ) -> None:
        super().__init__(states, plan, device, down, up)
        self._ranks, self._reduces = ranks, reduces
        self._each_pass = not ranks.shards.whole_gradients()
        trained = [s for s in reversed(states) if s.unit.shape.trainable_elements]
        self._order = [s.unit.name for s in trained]
        self._next = 0
        self._divided = {s.unit.name: _Divided(torch.zeros((), device=device), _places(s)) for s in trained}
        self._came: set[str] = set()
        """Parameters that autograd came by in this backward pass."""
        self._total = torch.zeros((), device=device)
        self._watched = ranks.divides_tensors
        """Whether copies of a gradient on a tensor axis are compared: in the first backward pass."""
        self.overflow_count = 0
        """Buffers made beyond the plan, because units that were complete had to wait for others."""

    def begin_backward(self, *, last_micro_batch: bool) -> None:
        """A backward pass begins; in the last one of an optimizer step the norm is taken."""
        super().begin_backward(last_micro_batch=last_micro_batch)
        self._next = 0
        for divided in self._divided.values():
            divided.complete = divided.reduced = False
            divided.passed.clear()
        self._came.clear()

    def end_backward(self) -> None:
        """Reduce what is left, and agree with the others on which parameters have a gradient."""
        self._in_backward = self._watched = False
        for name in self._order[self._next :]:
            self._divided[name].complete = True
        self._reduce_in_order()
        if self._last_micro_batch:
            names = [
                (g, f.name) for g in map(self._gatherings.__getitem__, self._order) for f in g.state.unit.trainable
            ]
            agreed = self._ranks.any_rank([name in gathering.present for gathering, name in names])
            for (gathering, name), there in zip(names, agreed, strict=True):
                if there:
                    gathering.present.add(name)

    def over(self, name: str) -> None:
        """The unit waits only for those gradients that autograd will still make: of parameters used elsewhere, too."""
        gathering = self._gatherings[name]
        if gathering.awaited > 0:
            lacking = [f for f in gathering.state.unit.trainable if f.name not in self._came]
            gathering.awaited = sum(_comes(f.parameter) for f in lacking)
            if gathering.awaited == 0:
                self._land(gathering)

    def norm(self) -> torch.Tensor:
        """Global norm of all gradients, an fp32 scalar on the device."""
        squares = [divided.square for divided in self._divided.values()]

        def total() -> None:
            self._total.copy_(torch.stack(squares).sum())
            self._total.copy_(self._ranks.sum_over_parts(self._total).sqrt())

        if squares:
            self._reduces.submit(total).wait()
        return self._total.clone()

    def clear(self) -> None:
        """Forget the gradients: the optimizer has taken what it needs to know."""
        super().clear()
        for divided in self._divided.values():
            divided.partial = False

    def _own(self, parameter: torch.Tensor, name: str) -> torch.Tensor | None:
        self._came.add(name)
        partial, gradient = is_partial(parameter.grad), gradient_of(parameter)
        copied = self._watched and not partial and share_of(parameter) is None
        if copied and gradient is not None and not self._ranks.alike(gradient, roughly=True):
            raise OffloadError(
                f"the gradient of parameter {name} differs between processes that share tensors, each of which "
                "has all of it: give these processes the same batch, and a module that sees a part of the sequence "
                "in each (SequenceParallel) parameters that are DTensors"
            )
        return gradient

    def _summed(self, gathering: Gathering) -> set[str]:
        return self._divided[gathering.state.unit.name].passed if self._each_pass else gathering.present

    def _target(self, gathering: Gathering) -> torch.Tensor:
        if self._divided[gathering.state.unit.name].reduced:
            raise OffloadError(
                f"unit {gathering.state.unit.name!r} got one more gradient after it was summed over the ranks, as with "
                "reentrant checkpoints: use the other kind (use_reentrant=False)"
            )
        if gathering.target is None and self._each_pass:
            buffer, idle = self._idle_slot(gathering.state.unit.shape.trainable_elements)
            idle.wait()
            gathering.target = buffer
        return super()._target(gathering)

    def _idle_slot(self, elements: int) -> tuple[torch.Tensor, Done]:
        """An idle slot, or one beyond the plan: what is incomplete can not land early, for all ranks would have to."""
        ring = self._idle[elements]
        if not ring:
            self.overflow_count += 1
            ring.append((torch.zeros(elements, dtype=self._dtype, device=self._device), Done.now(self._device)))
        return ring.popleft()

    def _land(self, gathering: Gathering) -> None:
        """The unit's gradient of this backward pass is complete on this rank."""
        self._divided[gathering.state.unit.name].complete = True
        self._reduce_in_order()

    def _reduce_in_order(self) -> None:
        while self._next < len(self._order) and self._divided[self._order[self._next]].complete:
            gathering = self._gatherings[self._order[self._next]]
            self._next += 1
            if self._each_pass or self._last_micro_batch:
                self._reduce(gathering)
            elif gathering.target is not None:
                super()._land(gathering)

    def _reduce(self, gathering: Gathering) -> None:
        """Sum one unit over the ranks, and send home what this rank has of the sum."""
        state, divided = gathering.state, self._divided[gathering.state.unit.name]
        buffer, last, ranks = self._target(gathering), self._last_micro_batch, self._ranks
        for name, view in gathering.views_in(buffer).items():
            if name not in self._summed(gathering):
                view.zero_()  # another rank may have a gradient for it
        after = [Done.now(self._device)]
        adds = divided.partial and self._each_pass
        if adds and gathering.landed is not None:
            after.append(gathering.landed)
        home = state.device_gradients if self._each_pass else None

        def reduce() -> None:
            own = ranks.reduce(buffer, state.unit.name)
            if adds:
                own.add_(_brought(home if home is not None else state.host_gradients, buffer, own))
            if last:
                ranks.sum_over_replicas(own, state.unit.name)
                if divided.fields:  # else this rank's part is padding, or counted by another
                    norms = torch._foreach_norm([own[part] for part in divided.fields], dtype=torch.float32)
                    divided.square.copy_(torch.stack(norms).square().sum())
            if home is not None:
                home.copy_(own)

        ranks.submitted("reduce", state.unit.name)
        gathering.landed = self._reduces.submit(reduce, after)
        divided.partial = True
        if state.host_gradients is not None:
            whole = len(state.host_gradients) == len(buffer) and ranks.shards.zero_stage > 0
            there = state.host_gradients[state.updated] if whole else state.host_gradients
            own = buffer if ranks.shards.zero_stage == 0 else ranks.own(buffer)
            gathering.landed = self._down.copy(there, own, after=[gathering.landed])
        if buffer is not state.device_gradients:
            self._idle[state.unit.shape.trainable_elements].append((buffer, gathering.landed))
        gathering.target, divided.reduced = None, True


def collector(
    states: Sequence[UnitState],
    plan: Plan,
    device: torch.device,
    down: Lane,
    up: Lane,
    reduces: Lane | None,
    ranks: Ranks | None,
) -> GradientCollector:
    """What collects the gradients of one rank, or of several, which reduce them on the lane ``reduces``."""
    if ranks is None:
        return GradientCollector(states, plan, device, down, up)
    assert reduces is not None
    return DividedGradients(states, plan, device, down, up, reduces, ranks)


def _comes(parameter: torch.Tensor) -> bool:
    """Whether the running backward will come by this parameter."""
    return bool(torch._C._will_engine_execute_node(get_gradient_edge(parameter).node))


def _brought(home: torch.Tensor | None, buffer: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The sum of earlier micro-batches on the device: from the host it comes to where another rank's part was."""
    assert home is not None
    if home.device == own.device:
        return home
    free = buffer[len(own) : 2 * len(own)] if own.data_ptr() == buffer.data_ptr() else buffer[: len(own)]
    return free.copy_(home, non_blocking=True)


def _places(state: UnitState) -> list[slice]:
    """Of the parameters that count in the norm, in the elements that this rank updates."""
    here, found = state.updated, []
    for f in filter(lambda f: f.counted, state.unit.trainable):
        a, b = max(f.start, here.start), min(f.stop, here.stop)
        if a < b:
            found.append(slice(a - here.start, b - here.start))
    return found
