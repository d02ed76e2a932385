"""Passes: forward and backward as the engine sees them, told of every unit that begins and ends its use.

[Note: calls of the model itself]
Between steps the model may be called without gradients, by itself or by its ``generate``: such a call is a pass of its
own, from the model's pre-forward hook to its forward hook, and so is a call of a single unit.

[Note: backwards of others]
``torch.autograd.grad`` of what the engine computed, or the backward of another engine whose loss came through this one,
is no pass, but uses units as one does: they begin, end and run again in it as in a backward of the engine's own, and
when autograd is through nothing is in use. Where it makes a graph of its own (``create_graph``) that holds the weights
where they are, past all hooks: units stay in use then, beyond the plan, until the next ``engine.backward`` is over.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from offload import watchdog
from offload.away_guard import storage_address
from offload.block_inputs import BlockInputs, WaitingInput
from offload.call_order import Call, CallOrder
from offload.dtensors import Distributed, is_distributed, local_of
from offload.errors import OffloadError
from offload.events import EventLog, Pulse
from offload.gradients import GradientCollector
from offload.hooks import Packed, Saved, saved_tensors
from offload.memory import MemoryMeter
from offload.prefetch import Prefetcher
from offload.recomputed import RecomputedCalls
from offload.recovery import Recovery
from offload.setup import explained
from offload.update_in_backward import UpdateInBackward
from offload.updater import Updater
from offload.watch import Watch
from offload.weights import WeightMover

CHANGED = (
    "a tensor of shape {shape} that backward needs was changed in place after forward had used it, so gradients would "
    "be wrong, and PyTorch refuses it, too: use the out-of-place operation there, or change a clone"
)


class Passes:
    """Has the weights there while they are used; it is what ``offload.hooks`` tells.

    ``has_root`` says whether the root unit owns parameters; ``forget`` forgets the gradients since the last step.
    """

    def __init__(
        self,
        has_root: bool,
        mover: WeightMover,
        prefetcher: Prefetcher,
        inputs: BlockInputs,
        gradients: GradientCollector,
        updater: Updater,
        watch: Watch,
        meter: MemoryMeter,
        events: EventLog | None,
        recovery: Recovery,
        forget: Callable[[], None],
    ) -> None:
        self._has_root = has_root
        self._mover, self._prefetcher, self._inputs, self._updater = mover, prefetcher, inputs, updater
        self._watch, self._meter, self._pulse, self._forget = watch, meter, Pulse(events), forget
        self._gradients, self._recovery = gradients, recovery
        gradients.on_complete = self.complete
        self.early: UpdateInBackward | None = None
        """Told what it needs to begin updates in backward."""
        self._step = 1
        self._phase: str | None = None
        self.computing: str | None = None
        """The unit that was the last to begin, while it is in use; stays what it was where a pass fails."""
        self._bounded: set[str] = set()
        """Units of this pass whose inputs tell when their backward is over."""
        self._recomputed = RecomputedCalls()
        self._order = CallOrder()
        self._called_alone = False
        """[Note: calls of the model itself]"""
        self._others = False
        """[Note: backwards of others]: units were used in one that goes on; failed ones end when a pass begins."""
        self._others_graph = False
        """Whether that one may be making a graph: gradients were on whenever it used a unit."""

    @contextmanager
    def forward(self, step: int) -> Iterator[None]:
        """A forward pass of this step."""
        self._step = step
        watchdog.in_step(step)
        with self._in_phase("forward"), self._saving():
            self._begin_forward()
            yield
        if not torch.is_grad_enabled():
            self._end_inference()

    @contextmanager
    def backward(self, *, step_follows: bool) -> Iterator[None]:
        """A backward pass."""
        self._others = False
        self._use_root()  # an evaluation in between may have let it go
        self._recomputed.begin_pass()
        self._order.begin_backward()
        try:
            with self._in_phase("backward"):
                yield
        finally:
            self._mover.unuse_all()
            self._inputs.begin_pass()
        self._prefetcher.end_pass(step_follows=step_follows)

    @contextmanager
    def _in_phase(self, phase: str) -> Iterator[None]:
        """What fails in this phase is explained, and leaves nothing in use."""
        self._phase, self.computing = phase, None
        try:
            yield
        except BaseException as error:
            self._recovery.stop_watching()
            self._mover.unuse_all()
            if phase == "backward":
                self._forget()
            if (sentence := self._recovery.behind(error) or explained(error)) is not None:
                raise sentence from error
            raise
        else:
            self.computing = None  # a unit that got fewer gradients than it has parameters never told its end
        finally:
            self._phase = None

    def _saving(self) -> AbstractContextManager[Any]:
        """The hooks on what autograd saves: each costs time, and where nothing leaves the device none is needed."""
        needed = self._mover.streams or self._inputs.leave or self._meter.counts_saved
        return saved_tensors(self) if needed else nullcontext()

    def _in_backward(self) -> bool:
        return self._phase == "backward" or (self._phase is None and torch._C._current_graph_task_id() != -1)

    def _in_others(self) -> None:
        """A unit is used in what may be the backward of others. Gradients are on in a recompute of it, too."""
        if self._phase is not None or not self._in_backward():
            return
        if not self._others:
            self._others = self._others_graph = True
            self._recomputed.begin_pass()
            self._order.begin_backward()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_others)
        self._others_graph &= torch.is_grad_enabled()

    def _end_others(self) -> None:
        self._others, self.computing = False, None
        if not self._others_graph:
            self._mover.unuse_all()

    def _begin_forward(self) -> None:
        self._others = False
        self._updater.check()
        self._watch.check()
        self._prefetcher.begin_pass(training=torch.is_grad_enabled())
        self._mover.begin_pass()
        if torch.is_grad_enabled():  # the backward of a pass before may still come after one without gradients
            self._bounded.clear()
            self._order.begin_pass()
            self._meter.begin_forward()
            self._inputs.begin_pass()
        self._use_root()

    def _end_inference(self) -> None:
        self._mover.unuse_all()
        self._prefetcher.end_pass()

    def _use_root(self) -> None:
        if self._has_root:
            if self._recovery.live:
                self._mover.use("")
            else:
                with self._recovery.alone():
                    self._mover.use("")

    def begin_anew(self) -> None:
        """A pass was cut short: none goes on."""
        self._phase, self._called_alone, self._others = None, False, False
        self._recomputed.begin_pass()
        self._stop_saving()

    def _stop_saving(self) -> None:
        """Take the hooks on what autograd saves away, where an exception kept their context from doing it."""
        while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None and top[0] == self.pack:
            torch._C._autograd._pop_saved_tensors_default_hooks()

    def close(self) -> None:
        """Hold nothing any more: a loss that somebody keeps leads here."""
        self._stop_saving()
        vars(self).clear()

    # hooks.Listener

    def begin_call(self) -> None:
        """Somebody calls the model: the engine, or whoever evaluates or generates between steps."""
        if self._recovery.live:
            return
        if torch.is_grad_enabled():
            raise OffloadError(
                "the model was called with gradients, where the engine does not see it; call the engine in its place, "
                "or the model under torch.no_grad()"
            )
        self._recovery.check()
        with self._recovery.work():
            self._begin_forward()
        self._phase, self._called_alone = "forward", True

    def end_call(self) -> None:
        """Its forward is over, or has failed."""
        if self._called_alone:
            with self._recovery.work():
                self._phase, self._called_alone = None, False
                self._end_inference()

    def begin_root_use(self) -> None:
        """A module with parameters of the root unit is about to compute: in a pass they are there."""
        if not self._recovery.live:
            self._use_root()

    def begin_use(self, name: str) -> None:
        """A unit is about to compute: have its weights, and start the fetches of the schedule."""
        if self._recovery.live:
            self._begin_use(name)
        else:
            with self._recovery.alone():
                self._begin_use(name)

    def _begin_use(self, name: str) -> None:
        self._in_others()
        self.computing = name
        self._mover.use(name)
        if self._prefetcher.used(name):
            self._pulse.tell(self._step, self._phase, name, self._flights)

    def called(self, name: str) -> int | None:
        """A unit is called with gradients; one that is called in backward keeps its place in the order of units."""
        if self._phase == "forward":
            return self._order.called(name)
        return self._order.called_again() if self._in_backward() else None

    def bounds(self, name: str) -> bool:
        """Whether its weights may leave when its backward is over, or an update waits for that."""
        return self.early is not None or not self._mover.stays(name)

    def recorded(self, name: str) -> None:
        """In backward it is a recompute that calls it."""
        if self._in_backward():
            self._recomputed.called(name)

    def bounded(self, name: str) -> None:
        """Its inputs will tell when its backward is over."""
        self._bounded.add(name)
        if self.early is not None and self._phase == "forward":  # a recompute's call has no backward of its own
            self.early.called(name)

    def end_forward_use(self, name: str) -> int | None:
        """Its forward is over; a recompute's forward is part of its backward."""
        if not self._in_backward():
            self._end_use(name)
        return self._order.ended()

    def begin_backward_use(self, name: str, call: Call | None) -> None:
        """The backward of one of its calls is about to begin: have its weights.

        Before they are waited for, the gradients of units that are over go: other ranks may wait for those. And calls
        that are over end their use, for their slots may be needed.
        """
        self._in_others()
        if self._phase == "backward" and call is not None:
            for over in self._order.over(call.by_its_end):
                self._gradients.over(over)
        if call is not None and self._in_backward():
            for over in self._order.passed(call):
                self._end_call(over)
            self._order.opened(name, call)
        self.begin_use(name)
        if self._in_backward():
            self._recomputed.begin_backward(name)

    def end_backward_use(self, name: str) -> None:
        """The backward of one of its calls is over: it stays in use as long as a recompute has left others."""
        if not self._in_backward():
            return
        self._in_others()
        self._end_call(name)
        if self.early is not None and self._phase == "backward":
            self.early.passed(name)

    def complete(self, name: str) -> None:
        """All gradients of a unit are there: its backward is over, unless something else is to tell that."""
        if name and name not in self._bounded and not self._order.is_open(name):
            self._recomputed.forget(name)
            self._end_use(name)
        if self.early is not None:
            self.early.complete(name)

    def begin_recomputed(self, arguments: tuple[Any, ...]) -> None:
        """A block is about to run whose inputs are kept for backward, where its recompute has nothing more to keep."""
        if self._phase == "forward":
            self._inputs.expect(arguments)

    def pack(self, tensor: torch.Tensor) -> Packed:
        """Autograd must not keep a weight that may go away, or an input that waits on the host: it gets a reference."""
        local = local_of(tensor)
        address = storage_address(local)
        reference = self._mover.reference(local, address) or self._inputs.send(local)
        if reference is not None:
            return Distributed(reference, tensor) if is_distributed(tensor) else reference
        if self._meter.counts_saved and not self._mover.is_resident(address):
            self._meter.saved(local)
        # A result that held on to itself would outlive a pass without a backward.
        return Saved(tensor.detach(), tensor._version)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The tensor again; a unit that is away is fetched, and so is an input."""
        if isinstance(packed, Saved):
            if packed.tensor._version != packed.version:  # where hooks save tensors, autograd does not look itself
                raise OffloadError(CHANGED.format(shape=tuple(packed.tensor.shape)))
            return packed.tensor
        if isinstance(packed, Distributed):
            return packed.of(self.unpack(packed.local))
        if isinstance(packed, WaitingInput):
            return packed.owner.fetch(packed)
        if packed.unit:
            self.begin_use(packed.unit)
        else:
            self._use_root()  # in a pass it is in use; the backward of others may come after one
        return self._mover.resolve(packed)

    def _end_call(self, name: str) -> None:
        if self._recomputed.end_backward(name) and (self._phase is not None or not self._others_graph):
            self._end_use(name)
        elif self.computing == name:
            self.computing = None

    def _end_use(self, name: str) -> None:
        self._mover.unuse(name)
        if self.computing == name:
            self.computing = None

    def _flights(self) -> list[dict[str, str]]:
        flights = [{"unit": n, "link": "host_to_device"} for n in self._mover.in_flight()]
        return flights + [{"unit": n, "link": "nvme_read"} for n in self._updater.in_flight()]
