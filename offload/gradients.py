"""Gradients: gathered as autograd makes them into one flat buffer a unit, summed over micro-batches, and landed.

[Note: accumulation]
A unit whose gradients live on the host gathers them in a device slot. In a later micro-batch the partial sum is
brought back into the slot first, so sums are made on the device, in the same order and type as ``Parameter.grad``
would. The norm is taken on the device, in fp32, when the last micro-batch's sum is complete.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from offload.errors import OffloadError
from offload.plan import Plan
from offload.residency import gradient_slot_counts
from offload.shards import Shards
from offload.state import UnitState, weight_dtype
from offload.streams import Done, Lane
from offload.unit import Field
from offload.visits import Kept


@dataclass(eq=False)
class Gathering:
    """One unit's gradients in the running optimizer step."""

    state: UnitState
    present: set[str] = field(default_factory=set)
    """Parameters that got a gradient in this optimizer step."""
    awaited: int = 0
    """Parameters that have not got theirs in this backward pass."""
    target: torch.Tensor | None = None
    """The device buffer being gathered into; ``None`` outside of a backward pass."""
    landed: Done | None = None
    kept: Sequence[Kept] = ()
    """Parts that did not land on the host, but where the device will update with them."""
    norms: torch.Tensor | None = None
    """Of the parameters' gradients, fp32 on the device, when the last micro-batch's sum is complete."""
    taken: bool = False
    """Whether an update has begun with it."""
    views: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    """By the address of a buffer, the parameters' places in it: making them anew for every gradient takes time."""

    def views_in(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The trainable parameters' places in a buffer that gathers this unit's gradients."""
        address = buffer.data_ptr()
        if address not in self.views:
            self.views[address] = {f.name: f.view(buffer) for f in self.state.unit.trainable}
        return self.views[address]


def hooks_after_accumulation(parameter: torch.Tensor) -> int:
    """How many a parameter has."""
    return len(parameter._post_accumulate_grad_hooks or ())


class GradientCollector:
    """Takes every gradient away from its parameter the moment it exists."""

    def __init__(
        self,
        states: Sequence[UnitState],
        plan: Plan,
        device: torch.device,
        down: Lane,
        up: Lane,
    ) -> None:
        self._gatherings = {s.unit.name: Gathering(s) for s in states}
        self._down, self._up, self._device = down, up, device
        self.on_complete: Callable[[str], None] = lambda _: None
        """Told the name of every unit whose gradients are all there."""
        self.kept: Callable[[str], Sequence[Kept]] = lambda _: ()
        """Asked which parts of a unit's last sum stay on the device."""
        self._last_micro_batch = True
        self._in_backward = False
        self._dtype = dtype = weight_dtype(plan.precision)
        shapes, placements = [s.unit.shape for s in states], [s.unit.placement for s in states]
        counts = gradient_slot_counts(shapes, placements, Shards.of(plan))
        self._idle: dict[int, deque[tuple[torch.Tensor, Done]]] = {
            elements: deque((torch.zeros(elements, dtype=dtype, device=device), Done.now(device)) for _ in range(count))
            for elements, count in counts.items()
        }
        self._slots = {elements: [slot for slot, _ in ring] for elements, ring in self._idle.items()}
        self.device_bytes = sum(t.nbytes for ring in self._idle.values() for t, _ in ring)
        self._handles = [
            f.parameter.register_post_accumulate_grad_hook(self._hook(self._gatherings[s.unit.name], f))
            for s in states
            for f in s.unit.trainable
        ]
        self._hooks = {f.name: hooks_after_accumulation(f.parameter) for s in states for f in s.unit.trainable}

    def check_hooks(self) -> None:
        """Raise OffloadError where somebody's hook would come when the gradient has been taken away."""
        for gathering in self._gatherings.values():
            for f in gathering.state.unit.trainable:
                if hooks_after_accumulation(f.parameter) > self._hooks[f.name]:
                    raise OffloadError(
                        f"parameter {f.name} got a hook after the accumulation of its gradient, which the engine has "
                        "taken away by then: register it before Engine()"
                    )

    def begin_backward(self, *, last_micro_batch: bool) -> None:
        """A backward pass begins; in the last one of an optimizer step the norm is taken."""
        self._last_micro_batch, self._in_backward = last_micro_batch, True
        for gathering in self._gatherings.values():
            gathering.awaited = sum(1 for _ in gathering.state.unit.trainable)

    def end_backward(self) -> None:
        """Land what autograd left incomplete, because some parameter got no gradient."""
        self._in_backward = False
        for gathering in self._gatherings.values():
            if gathering.target is not None or (self._last_micro_batch and gathering.norms is None):
                self._land(gathering)

    def over(self, name: str) -> None:
        """The unit's backward is over; of its parameters that have no gradient only those used elsewhere get one.

        One rank lets it wait for the end of the pass: nobody else waits for it.
        """

    def present(self, name: str) -> set[str]:
        """The unit's parameters that have a gradient."""
        return self._gatherings[name].present

    def landed(self, name: str) -> Done | None:
        """When the unit's gradient is in the buffer of its tier; ``None`` when it has none."""
        return self._gatherings[name].landed

    def stayed(self, name: str) -> bool:
        """Whether parts of it are not there, but where the device will update with them."""
        return bool(self._gatherings[name].kept)

    def taken(self, name: str) -> bool:
        """Take the unit's gradient for an update, before backward is over; whether it is complete."""
        gathering = self._gatherings[name]
        complete = self._last_micro_batch and gathering.awaited == 0 and gathering.landed is not None
        gathering.taken = complete
        return complete

    def norm(self) -> torch.Tensor:
        """Global norm of all gradients, an fp32 scalar on the device."""
        norms = [g.norms for g in self._gatherings.values() if g.norms is not None]
        return torch.linalg.vector_norm(torch.cat(norms)) if norms else torch.zeros((), device=self._device)

    def clear(self) -> None:
        """Forget the gradients: the optimizer has taken what it needs to know."""
        for gathering in self._gatherings.values():
            gathering.present, gathering.taken = set(), False
            gathering.landed = gathering.norms = None
            gathering.kept = ()

    def discard(self) -> None:
        """Forget what was gathered: a backward pass failed, or other numbers take the place of all of this."""
        self._in_backward = False
        for gathering in self._gatherings.values():
            if gathering.target is not None and gathering.state.host_gradients is not None:
                slot = (gathering.target, Done.now(self._device))
                self._idle[gathering.state.unit.shape.trainable_elements].append(slot)
            gathering.target = None
            for f in gathering.state.unit.trainable:
                f.parameter.grad = None  # of a hook that failed
        self.clear()

    def begin_anew(self) -> None:
        """Forget what was gathered in a pass that was cut short, when all lanes have settled: all slots are idle."""
        self.discard()
        for elements, slots in self._slots.items():
            self._idle[elements] = deque((slot, Done.now(self._device)) for slot in slots)

    def close(self) -> None:
        """Give the parameters back to plain autograd."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, gathering: Gathering, field: Field) -> Callable[[torch.Tensor], None]:
        name = field.name

        def take(parameter: torch.Tensor) -> None:  # in a backward that makes no graph: gradients are off
            if not self._in_backward:
                parameter.grad = None
                raise OffloadError("backward was called on a loss itself; call engine.backward(loss) in its place")
            gradient = self._own(parameter, name)
            if gradient is not None:  # autograd also comes by with none, where an operation did not use its input
                target, summed = gathering.views_in(self._target(gathering))[name], self._summed(gathering)
                if name in summed:
                    target.add_(gradient)
                else:
                    target.copy_(gradient)
                    gathering.present.add(name)
                    summed.add(name)
                parameter.grad = None
            gathering.awaited -= 1
            if gathering.awaited == 0:
                self._land(gathering)
                self.on_complete(gathering.state.unit.name)

        return take

    def _own(self, parameter: torch.Tensor, _: str) -> torch.Tensor | None:
        """What this process has of the gradient of a parameter, which has a name."""
        return parameter.grad

    def _summed(self, gathering: Gathering) -> set[str]:
        """Parameters whose sum so far is in the buffer that is gathered into."""
        return gathering.present

    def _target(self, gathering: Gathering) -> torch.Tensor:
        """The device buffer to gather into, holding the partial sum of earlier micro-batches."""
        if gathering.target is not None:
            return gathering.target
        state = gathering.state
        if gathering.taken:
            raise OffloadError(
                f"unit {state.unit.name!r} got one more gradient when its update had begun (update_in_backward), as "
                "with reentrant checkpoints: use the other kind (use_reentrant=False), or leave update_in_backward out"
            )
        if state.device_gradients is not None:
            gathering.target = state.device_gradients
            return gathering.target
        buffer, idle = self._idle_slot(state.unit.shape.trainable_elements)
        if gathering.present:
            assert state.host_gradients is not None
            assert gathering.landed is not None
            self._up.copy(buffer, state.host_gradients, after=[idle, gathering.landed]).wait()
            for kept in gathering.kept:
                buffer[kept.part].copy_(kept.there)
            gathering.kept = ()
        else:
            idle.wait()
        gathering.target = buffer
        return buffer

    def _idle_slot(self, elements: int) -> tuple[torch.Tensor, Done]:
        """An idle slot; where all are taken by incomplete units, the first of them lands early and is resumed later."""
        ring = self._idle[elements]
        if not ring:
            shapes = ((g, g.state.unit.shape.trainable_elements) for g in self._gatherings.values())
            gathering = (g for g, size in shapes if size == elements and g.target is not None)
            self._land(next(g for g in gathering if g.state.host_gradients is not None))
        return ring.popleft()

    def _land(self, gathering: Gathering) -> None:
        """The unit's gradient of this backward pass is complete, or must make room: take its norm, send it home."""
        if not gathering.present:
            return
        state = gathering.state
        buffer = self._target(gathering)
        if self._last_micro_batch:
            views = [view for name, view in gathering.views_in(buffer).items() if name in gathering.present]
            gathering.norms = torch.stack(torch._foreach_norm(views, dtype=torch.float32))
        gathering.landed = Done.now(self._device)
        if state.host_gradients is not None:
            if self._last_micro_batch:
                gathering.kept = self.kept(state.unit.name)
            gathering.landed = self._send(state.host_gradients, buffer, gathering.kept, gathering.landed)
            self._idle[state.unit.shape.trainable_elements].append((buffer, gathering.landed))
        gathering.target = None

    def _send(self, home: torch.Tensor, buffer: torch.Tensor, kept: Sequence[Kept], after: Done) -> Done:
        """To the host, but for the parts that stay on the device: those are copied to where they wait."""
        goes = len(home) - sum(k.part.stop - k.part.start for k in kept)
        assert all(k.part.start >= goes for k in kept), "what stays is the end of the unit"

        def send() -> None:
            self._down.move(home[:goes], buffer[:goes])
            for part, there, free in kept:
                free.wait()
                there.copy_(buffer[part], non_blocking=True)

        return self._down.submit(send, after=[after])
