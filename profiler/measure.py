"""The training step for real on a CUDA device: peak bytes by phase, what stays reserved, and seconds.

The loop is the one people write, with these phases::

    optimizer.zero_grad()
    outputs = model(batch)               # forward
    loss = loss_of(outputs, batch)       # loss
    loss.backward()                      # backward
    clip_grad_norm_(parameters, 1.0)     # clip, if asked for
    optimizer.step()                     # step
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pynvml
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from profiler.errors import ProfilerError
from profiler.events import LOSS, PHASES
from profiler.trace import AUTOCAST, PRECISIONS, Forward

ZERO_GRAD = "zero_grad"
STEADY_STEP = 3
"""The step whose peaks are the steady state's: optimizer state and the libraries' workspaces exist by then."""
TIMED_SECONDS = 2.0
"""No further step is timed after these."""
LARGEST_NORM = 1.0

_RATE = 1e-5  # too small to lead anywhere: only what a step holds and takes matters
_OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=_RATE),
    "adamw-fused": partial(torch.optim.AdamW, lr=_RATE, fused=True),
    "adamw-forloop": partial(torch.optim.AdamW, lr=_RATE, foreach=False),
    "sgd": partial(torch.optim.SGD, lr=_RATE),
    "sgd-momentum": partial(torch.optim.SGD, lr=_RATE, momentum=0.9),
    "adafactor": partial(torch.optim.Adafactor, lr=_RATE),
}


@dataclass(frozen=True)
class Measured:
    """What a training step took. Bytes are those of PyTorch's allocator unless said otherwise."""

    device: str
    first_bytes: dict[str, int]
    """Peak allocated bytes of the first step, by phase; "loss" only where something was allocated after the model
    returned, "clip" only where gradients are clipped."""
    steady_bytes: dict[str, int]
    """The same of the third step."""
    reserved_bytes: int
    """After the third step, above what was allocated before; without running out of memory it never falls."""
    nvml_bytes: int | None
    """What the driver says the device holds after the third step, less what it held before CUDA was initialised.
    ``None`` when the driver does not tell, or CUDA had been initialised already."""
    timed_bytes: int | None
    """Peak allocated bytes of the timed steps: above the third step's where steps differ (a dropped layer, say)."""
    step_seconds: float | None
    """Median of the timed steps, each waited for; ``None`` when none was timed."""

    @property
    def overall_bytes(self) -> int:
        """Peak allocated bytes of the steady state."""
        return max(self.steady_bytes.values())


class TrainingLoop:
    """A model on the current CUDA device with its optimizer, ready to step.

    The model (cast in place, as ``model.to`` does) and the batch's tensors are moved there.
    """

    def __init__(
        self, model: nn.Module, batch: Any, forward: Forward, precision: str, optimizer: str, clip: bool
    ) -> None:
        if precision not in PRECISIONS:
            raise ProfilerError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
        if optimizer not in _OPTIMIZERS:
            raise ProfilerError(f"optimizer {optimizer!r} can not be measured; these can: {', '.join(_OPTIMIZERS)}")
        cast = torch.bfloat16 if precision == "bf16" else None
        self.model = (model.to(cast) if cast else model).to("cuda").train()
        self._batch = tree_map_only(torch.Tensor, partial(_placed, cast=cast), batch)
        self._forward, self._clip = forward, clip
        self._autocast = AUTOCAST.get(precision)
        self._optimizer = _OPTIMIZERS[optimizer](self.model.parameters())
        # A scale of 1, so that no first step overflows and is skipped.
        self._scaler = torch.amp.GradScaler("cuda", init_scale=1.0) if precision == "amp-fp16" else None
        self._loss: torch.Tensor | None = None

    def step(self, ended: Callable[[str], None] = lambda _: None) -> None:
        """One training step; ``ended(phase)`` is called at the end of ``ZERO_GRAD`` and of every phase."""
        self._optimizer.zero_grad()
        ended(ZERO_GRAD)
        autocast = torch.autocast("cuda", self._autocast) if self._autocast else nullcontext()
        with _on_first_return(self.model, partial(ended, "forward")), autocast:
            self._loss = self._forward(self.model, self._batch)
        ended("loss")
        loss = self._loss if self._scaler is None else self._scaler.scale(self._loss)
        loss.backward()
        del loss
        ended("backward")
        if self._clip:
            if self._scaler is not None:
                self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
            ended("clip")
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        ended("step")


def check_measurable() -> None:
    """Raise ProfilerError when there is no CUDA device."""
    if not torch.cuda.is_available():
        raise ProfilerError("a step can only be measured on a CUDA device, and PyTorch finds none here")


def measure_step(
    model: nn.Module,
    batch: Any,
    forward: Forward,
    precision: str = "fp32",
    optimizer: str = "adamw",
    clip: bool = False,
    timed_steps: int = 10,
    then: Callable[[TrainingLoop], None] | None = None,
) -> Measured:
    """Train the model for a few steps on the current CUDA device and say what they took.

    At most ``timed_steps`` are timed. ``then`` is given the warm loop afterwards. The model stays on the device; it
    must not be there yet. Raises ProfilerError when there is no CUDA device or the device's memory runs out.
    """
    before = {} if torch.cuda.is_initialized() else _driver_bytes()
    check_measurable()
    if any(p.device.type not in ("cpu", "cuda") for p in model.parameters()):
        raise ProfilerError("the model has no values to train on (it is on the meta device); build it on the CPU")
    with _out_of_memory_explained():
        return _measured(model, batch, forward, precision, optimizer, clip, timed_steps, then, before)


def _measured(
    model: nn.Module,
    batch: Any,
    forward: Forward,
    precision: str,
    optimizer: str,
    clip: bool,
    timed_steps: int,
    then: Callable[[TrainingLoop], None] | None,
    before: dict[str, int],
) -> Measured:
    _clear()
    allocated = torch.cuda.memory_allocated()
    loop = TrainingLoop(model, batch, forward, precision, optimizer, clip)
    first = _peaks(loop, allocated)
    for _ in range(STEADY_STEP - 2):
        loop.step()
    steady = _peaks(loop, allocated)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved() - allocated
    nvml_bytes = _driver_growth(before)
    torch.cuda.reset_peak_memory_stats()
    seconds = _timed(loop, timed_steps)
    timed_bytes = torch.cuda.max_memory_allocated() - allocated
    if then is not None:
        then(loop)
    return Measured(
        device=torch.cuda.get_device_name(),
        first_bytes=first,
        steady_bytes=steady,
        reserved_bytes=reserved,
        nvml_bytes=nvml_bytes,
        timed_bytes=timed_bytes if seconds else None,
        step_seconds=statistics.median(seconds) if seconds else None,
    )


def _peaks(loop: TrainingLoop, base_bytes: int) -> dict[str, int]:
    """Run one step; returns the peak of each phase above ``base_bytes``."""
    peaks: dict[str, int] = {}
    allocations = 0

    def ended(phase: str) -> None:
        nonlocal allocations
        now = torch.cuda.memory_stats()["allocation.all.allocated"]
        if phase in PHASES and (phase != LOSS or now > allocations):
            peaks[phase] = torch.cuda.max_memory_allocated() - base_bytes
        allocations = now
        torch.cuda.reset_peak_memory_stats()

    loop.step(ended)
    return peaks


def _timed(loop: TrainingLoop, most_steps: int) -> list[float]:
    seconds: list[float] = []
    while len(seconds) < most_steps and sum(seconds) < TIMED_SECONDS:
        start = time.perf_counter()
        loop.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def _placed(tensor: torch.Tensor, cast: torch.dtype | None) -> torch.Tensor:
    return tensor.to("cuda", cast) if cast is not None and tensor.is_floating_point() else tensor.to("cuda")


@contextmanager
def _on_first_return(model: nn.Module, call: Callable[[], None]) -> Iterator[None]:
    """Call back once, when the model returns for the first time or, if it never ran, at the end."""
    returned = False

    def hook(*_: Any) -> None:
        nonlocal returned
        if not returned:
            returned = True
            call()

    handle = model.register_forward_hook(hook)
    try:
        yield
        hook()
    finally:
        handle.remove()


@contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, ProfilerError) as error:
        cause = error.__cause__ if isinstance(error, ProfilerError) else error
        if not isinstance(cause, torch.OutOfMemoryError):
            raise
        text = str(cause).split(". ")[:2]
        raise ProfilerError(
            f"the step does not fit on {torch.cuda.get_device_name()}; take a smaller batch ({'; '.join(text)})"
        ) from error


def _clear() -> None:
    """Give back what earlier work in this process left on the device."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _driver_bytes() -> dict[str, int]:
    """Used bytes of every device by its UUID; none when the driver does not tell."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return {pynvml.nvmlDeviceGetUUID(h): int(pynvml.nvmlDeviceGetMemoryInfo(h).used) for h in handles}
    except pynvml.NVMLError:
        return {}


def _driver_growth(before: dict[str, int]) -> int | None:
    now = _driver_bytes()
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    if len(now) == 1:
        uuid = next(iter(now))
    return now[uuid] - before[uuid] if uuid in before and uuid in now else None
