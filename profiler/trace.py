"""One fake training step of a model, as a stream of events."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from profiler.cuda_semantics import cuda_semantics
from profiler.errors import ProfilerError, SourceError
from profiler.events import BACKWARD, FORWARD, LOSS, Call, Category, Event, Gradient, Save
from profiler.fakes import fake_batch, fake_mode, faked
from profiler.folding import Folding
from profiler.obliging import obliging_fakes, unnoticed_fakes
from profiler.recorder import ModuleStack, Recorder
from profiler.recurrent import flattened_bytes
from profiler.runs import Run, parents
from profiler.trees import tensors_in
from profiler.unfold import unfold

logger = logging.getLogger(__name__)

AUTOCAST = {"amp": torch.bfloat16, "amp-fp16": torch.float16}
"""Precisions that cast as they compute, and to what."""
PRECISIONS = ("fp32", *AUTOCAST, "bf16")

KEY_VALUE_CACHES = frozenset({"past_key_values", "past_key_value", "layer_past"})
"""What transformers' blocks call the cache among their arguments."""

Forward = Callable[[nn.Module, Any], torch.Tensor]
"""Runs the model on a batch and returns the loss to call backward on."""


@dataclass(frozen=True)
class TracedParameter:
    """A parameter as it was in the step, its dtype that of the precision."""

    name: str
    shape: tuple[int, ...]
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
    used_outside: frozenset[str]
    """Parameters that were read while none of their modules was running."""
    assumptions: tuple[str, ...]
    given_bytes: int = 0
    """Of the batch's tensors that were cast, in the type in which they were given."""


def trace_step(
    model: nn.Module,
    batch: Any,
    forward: Forward,
    precision: str = "fp32",
    blocks: tuple[str, ...] = (),
    recompute: bool = False,
    runs: tuple[Run, ...] = (),
) -> Trace:
    """Trace forward, loss and backward with fake tensors; the model is left as it was.

    With ``recompute`` every module in ``blocks`` is checkpointed. A parameter is used "outside" when it is read
    while neither a module that holds it nor the block around one is running. Of the blocks of ``runs`` only some are
    run, and their events repeated for the others (``profiler.unfold``), where that comes to the same.
    """
    if precision not in PRECISIONS:
        raise ProfilerError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if runs:
        try:
            return _trace(model, batch, forward, precision, blocks, recompute, runs)
        except Exception as error:  # noqa: BLE001 - whatever it is, the whole step is what counts
            logger.info("not folded: %s", error)
    return _trace(model, batch, forward, precision, blocks, recompute, ())


def _trace(
    model: nn.Module,
    batch: Any,
    forward: Forward,
    precision: str,
    blocks: tuple[str, ...],
    recompute: bool,
    runs: tuple[Run, ...],
) -> Trace:
    cast = torch.bfloat16 if precision == "bf16" else None
    mode = fake_mode()
    with ExitStack() as scope:
        scope.enter_context(torch.random.fork_rng(devices=()))
        scope.enter_context(_quiet())
        stack = ModuleStack(model)
        recorder = Recorder(stack)
        folding = Folding(model, runs, recorder)
        scope.enter_context(faked(model, mode, cast, folding.inside))
        step = _Step(model, stack, recorder, folding, blocks, cast)
        scope.enter_context(cuda_semantics(recorder.report))
        inputs = fake_batch(mode, batch, cast)
        pairs = zip(tensors_in(batch), tensors_in(inputs), strict=True)  # the model may take some out of it
        given_bytes = sum(given.nbytes for given, held in pairs if given.dtype != held.dtype)
        recorder.values.tell(inputs, batch)
        step.register(inputs)
        scope.enter_context(step.observed(recompute))
        scope.enter_context(torch.compiler.set_stance("force_eager"))  # the compiler would meet fake tensors
        scope.enter_context(obliging_fakes(recorder.values, recorder.assume))
        scope.enter_context(unnoticed_fakes())
        scope.enter_context(mode)
        scope.enter_context(recorder)
        step.run(forward, inputs, _autocast(precision))
        return replace(step.result(), given_bytes=given_bytes)


class _Step:
    """The step being traced: ties model, module stack and recorder together."""

    def __init__(
        self,
        model: nn.Module,
        stack: ModuleStack,
        recorder: Recorder,
        folding: Folding,
        blocks: tuple[str, ...],
        cast: torch.dtype | None,
    ) -> None:
        self.model, self.stack, self.recorder, self.folding = model, stack, recorder, folding
        self.blocks, self.cast = frozenset(blocks), cast
        self.loss = torch.empty(0)
        self.inputs: frozenset[int] = frozenset()
        """Storages that go into the block that is about to run, those that need a gradient and are given whole."""

    def register(self, batch: Any) -> None:
        """Log what is there before the step."""
        owners: dict[int, set[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owner = name.rpartition(".")[0]
            owners.setdefault(id(parameter), set()).update({owner}, self.blocks.intersection(parents(owner)))
        for name, parameter in self.model.named_parameters():
            owner = name.rpartition(".")[0]
            if self.folding.inside(owner):
                self.recorder.stand_in(self._traced(name, parameter).bytes, Category.PARAMETER, owner)
            else:
                self.recorder.watch_parameter(name, parameter, frozenset(owners[id(parameter)]))
        for path, module in self.model.named_modules():
            self.recorder.come_and_go(flattened_bytes(module), path)
        for name, buffer in self.model.named_buffers():
            owner = name.rpartition(".")[0]
            if self.folding.inside(owner):
                self.recorder.stand_in(self._traced(name, buffer).bytes, Category.BUFFER, owner)
            else:
                self.recorder.watch(buffer, Category.BUFFER, owner)
        for tensor in tensors_in(batch):
            self.recorder.watch(tensor, Category.INPUT, "")

    @contextmanager
    def observed(self, recompute: bool) -> Iterator[None]:
        """Follow which module runs, which gradients arrive, and recompute the blocks if asked."""
        handles: list[Any] = []
        try:
            for path, module in self.model.named_modules():
                if self.folding.inside(path.rpartition(".")[0]):
                    continue
                # Instance attributes, which the restoration of the module's attributes takes away again.
                if (passing := self.folding.forward_of(path)) is not None:
                    module.forward = passing
                elif recompute and path in self.blocks:
                    module.forward = partial(self._checkpointed, module.forward, path)
                enter = module.register_forward_pre_hook(partial(self._enter, path), prepend=True, with_kwargs=True)
                handles.append(enter)
                handles.append(module.register_forward_hook(partial(self._leave, path), always_call=True))
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and not self.folding.inside(name.rpartition(".")[0]):
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
        events = unfold(self.recorder.finished(), self.folding.runs)
        with_gradient = {e.parameter for e in events if isinstance(e, Gradient)}
        parameters = tuple(self._traced(name, p, name in with_gradient) for name, p in self.model.named_parameters())
        return Trace(
            events=tuple(events),
            parameters=parameters,
            buffer_bytes=sum(self._traced(name, b).bytes for name, b in self.model.named_buffers()),
            used_outside=self.folding.with_likes(self.recorder.used_outside),
            assumptions=tuple(self.recorder.assumptions),
        )

    def _traced(self, name: str, tensor: torch.Tensor, has_gradient: bool = False) -> TracedParameter:
        """A parameter or buffer as it is in the step, also one that stands in a block that is passed over."""
        dtype = self.cast if self.cast is not None and tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * dtype.itemsize
        return TracedParameter(name, tuple(tensor.shape), str(dtype).removeprefix("torch."), size, has_gradient)

    def _enter(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.recorder.phase in (FORWARD, LOSS):
            if not path:
                self.recorder.phase = FORWARD
            self.recorder.events.append(Call(path))
        self.stack.push(path)
        self.folding.called(path, args, kwargs)

    def _leave(self, path: str, _: nn.Module, __: Any, output: Any) -> None:
        self.stack.pop()
        self.folding.returned(path, output)
        if not path and self.recorder.phase == FORWARD:
            self.recorder.phase = LOSS

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        number = self.recorder.watch(tensor, Category.ACTIVATION, self.stack.current())
        checkpoint = tensor.untyped_storage()._cdata in self.inputs
        self.recorder.events.append(Save(number, self.stack.current(), checkpoint))
        return tensor

    def _checkpointed(self, forward: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _without_cache(forward, args, kwargs)
        given = (t for t in args if isinstance(t, torch.Tensor) and t.requires_grad)
        self.inputs = frozenset(s._cdata for t in given if (s := t.untyped_storage()).nbytes() == t.nbytes)
        # What is not among the arguments themselves is kept, too, by the call that is to be repeated.
        for tensor in tensors_in((kwargs, [a for a in args if not isinstance(a, torch.Tensor)])):
            self.recorder.events.append(Save(self.recorder.watch(tensor, Category.ACTIVATION, path), path))

        def run(*args: Any, **kwargs: Any) -> Any:
            self.stack.push(path)
            try:
                return forward(*args, **kwargs)
            finally:
                self.stack.pop()

        out = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **kwargs)
        self.inputs = frozenset()
        return out

    def _gradient(self, name: str, parameter: torch.Tensor) -> None:
        self.recorder.events.append(Gradient(name))
        if parameter.grad is not None:
            self.recorder.retag(parameter.grad, Category.GRADIENT)


def _without_cache(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block that runs twice would append to its key-value cache twice, by position or name; training needs none."""
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [*names[: len(args)], *[""] * (len(args) - len(names))]
    given = tuple(None if _is_cache(name, value) else value for name, value in zip(named, args, strict=True))
    return given, {name: None if _is_cache(name, value) else value for name, value in kwargs.items()}


def _is_cache(name: str, value: Any) -> bool:
    """Whether it is an object that a block appends to; tensors and tuples (prefix tuning's) are not."""
    return name in KEY_VALUE_CACHES and not isinstance(value, torch.Tensor | tuple)


def _autocast(precision: str) -> AbstractContextManager[None]:
    return torch.autocast("cpu", AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


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
