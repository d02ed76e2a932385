"""One fake training step of a model, as a stream of events."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from profiler.cuda_semantics import cuda_semantics
from profiler.errors import ProfilerError, SourceError
from profiler.events import BACKWARD, FORWARD, Category, Event
from profiler.fakes import fake_batch, fake_mode, faked
from profiler.obliging import obliging_fakes
from profiler.recorder import ModuleStack, Recorder

PRECISIONS = ("fp32", "amp", "bf16")

KEY_VALUE_CACHES = frozenset({"past_key_values", "past_key_value", "layer_past"})
"""What transformers' blocks call the cache among their keyword arguments."""

Forward = Callable[[nn.Module, Any], torch.Tensor]
"""Runs the model on a batch and returns the loss to call backward on."""


@dataclass(frozen=True)
class TracedParameter:
    """A parameter as it was in the step, its dtype that of the precision."""

    name: str
    dtype: str
    bytes: int
    has_gradient: bool


@dataclass(frozen=True)
class Trace:
    """What one step did: set-up, forward and backward. The optimizer's part is added in a replay."""

    events: tuple[Event, ...]
    parameters: tuple[TracedParameter, ...]
    """Shared ones once, in the order of ``model.named_parameters()``."""
    buffer_bytes: int
    saved: tuple[tuple[str, int], ...]
    """(module, bytes) of every storage that autograd kept for backward, parameters left out."""
    calls: dict[str, int]
    """How often each module ran in forward, in the order of the first calls."""
    used_outside: frozenset[str]
    """Parameters that were read while none of their modules was running."""
    assumptions: tuple[str, ...]


def trace_step(
    model: nn.Module,
    batch: Any,
    forward: Forward,
    precision: str = "fp32",
    blocks: tuple[str, ...] = (),
    recompute: bool = False,
) -> Trace:
    """Trace forward, loss and backward with fake tensors; the model is left as it was.

    With ``recompute`` every module in ``blocks`` is checkpointed. A parameter is used "outside" when it is read
    while neither a module that holds it nor the block around one is running.
    """
    if precision not in PRECISIONS:
        raise ProfilerError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    cast = torch.bfloat16 if precision == "bf16" else None
    mode = fake_mode()
    with ExitStack() as scope:
        scope.enter_context(torch.random.fork_rng(devices=()))
        scope.enter_context(_quiet())
        scope.enter_context(faked(model, mode, cast))
        stack = ModuleStack(model)
        recorder = Recorder(stack)
        step = _Step(model, stack, recorder, blocks)
        scope.enter_context(cuda_semantics(recorder.report))
        inputs = fake_batch(mode, batch, cast)
        recorder.values.tell(inputs, batch)
        step.register(inputs)
        scope.enter_context(step.observed(recompute))
        scope.enter_context(torch.compiler.set_stance("force_eager"))  # the compiler would meet fake tensors
        scope.enter_context(obliging_fakes(recorder.values, recorder.assume))
        scope.enter_context(mode)
        scope.enter_context(recorder)
        step.run(forward, inputs, torch.autocast("cpu", torch.bfloat16) if precision == "amp" else nullcontext())
        return step.result()


class _Step:
    """The step being traced: ties model, module stack and recorder together."""

    def __init__(self, model: nn.Module, stack: ModuleStack, recorder: Recorder, blocks: tuple[str, ...]) -> None:
        self.model, self.stack, self.recorder, self.blocks = model, stack, recorder, blocks
        self.calls: dict[str, int] = {}
        self.saved: dict[int, tuple[str, int]] = {}
        self.with_gradient: set[str] = set()
        self.loss = torch.empty(0)

    def register(self, batch: Any) -> None:
        """Log what is there before the step."""
        owners: dict[int, set[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owner = name.rpartition(".")[0]
            around = {b for b in self.blocks if owner == b or owner.startswith(b + ".")}
            owners.setdefault(id(parameter), set()).update({owner}, around)
        for name, parameter in self.model.named_parameters():
            self.recorder.watch_parameter(name, parameter, frozenset(owners[id(parameter)]))
        for name, buffer in self.model.named_buffers():
            self.recorder.watch(buffer, Category.BUFFER, name.rpartition(".")[0])
        for tensor in tree_leaves(batch):
            if isinstance(tensor, torch.Tensor):
                self.recorder.watch(tensor, Category.INPUT, "")

    @contextmanager
    def observed(self, recompute: bool) -> Iterator[None]:
        """Follow which module runs, which gradients arrive, and recompute the blocks if asked."""
        handles: list[Any] = []
        try:
            for path, module in self.model.named_modules():
                if recompute and path in self.blocks:
                    # An instance attribute, which the restoration of the module's attributes takes away again.
                    module.forward = partial(_checkpointed, module.forward, self.stack, path)
                handles.append(module.register_forward_pre_hook(partial(self._enter, path), prepend=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_post_accumulate_grad_hook(partial(self._gradient, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, forward: Forward, batch: Any, autocast: Any) -> None:
        """Forward and loss, then backward. Outputs are dropped once the loss is there, which stays."""
        keep = torch.autograd.graph.saved_tensors_hooks(self._save, _same)
        with self.recorder.during(FORWARD), keep, autocast, self._doubted():
            self.loss = forward(self.model, batch)
        with self.recorder.during(BACKWARD):
            self.loss.backward()

    @contextmanager
    def _doubted(self) -> Iterator[None]:
        """Say with an error what was assumed before it, and may have led to it."""
        try:
            yield
        except SourceError as error:
            if not self.recorder.assumptions:
                raise
            last = list(self.recorder.assumptions)[-1]
            raise SourceError(f"{error}; before that, {last}", error.traceback) from error

    def result(self) -> Trace:
        """What was seen."""
        parameters = tuple(
            TracedParameter(name, str(p.dtype).removeprefix("torch."), p.nbytes, name in self.with_gradient)
            for name, p in self.model.named_parameters()
        )
        return Trace(
            events=self.recorder.finished(),
            parameters=parameters,
            buffer_bytes=sum(b.nbytes for b in self.model.buffers()),
            saved=tuple(self.saved.values()),
            calls=dict(self.calls),
            used_outside=frozenset(self.recorder.used_outside),
            assumptions=tuple(self.recorder.assumptions),
        )

    def _enter(self, path: str, *_: Any) -> None:
        self.stack.push(path)
        if self.recorder.phase == FORWARD:
            self.calls[path] = self.calls.get(path, 0) + 1

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        number = self.recorder.watch(tensor, Category.ACTIVATION, self.stack.current())
        if self.recorder.category(number) is not Category.PARAMETER:
            self.saved.setdefault(number, (self.stack.current(), tensor.untyped_storage().nbytes()))
        return tensor

    def _gradient(self, name: str, parameter: torch.Tensor) -> None:
        self.with_gradient.add(name)
        if parameter.grad is not None:
            self.recorder.retag(parameter.grad, Category.GRADIENT)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep fake tensors from logging a traceback of theirs for what is raised, and said, anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _checkpointed(forward: Callable[..., Any], stack: ModuleStack, path: str, *args: Any, **kwargs: Any) -> Any:
    # A block that runs twice would append to a key-value cache twice; training needs none.
    kwargs = {name: None if name in KEY_VALUE_CACHES else value for name, value in kwargs.items()}

    def run(*args: Any, **kwargs: Any) -> Any:
        stack.push(path)
        try:
            return forward(*args, **kwargs)
        finally:
            stack.pop()

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **kwargs)
