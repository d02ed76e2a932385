"""Inputs of recomputed blocks that wait for backward on the host.

[Note: where an input is]
While a block's forward runs, its input goes to the host; when the next block begins, it leaves the device, behind its
copy. The newest stays, for backward asks for it first. While a block runs again in backward, the input of the block
before it comes back. So the device holds two of them at most: the one in use, and one on its way.
"""

from typing import Any

import torch

from offload.arena import Arena
from offload.dtensors import local_of
from offload.plan import Tier
from offload.residency import checkpoint_host_bytes
from offload.streams import Done, Lane


class WaitingInput:
    """What autograd keeps in the place of a block's input."""

    def __init__(
        self, owner: "BlockInputs", tensor: torch.Tensor, buffer: torch.Tensor, previous: "WaitingInput | None"
    ) -> None:
        self.owner, self.buffer, self.previous = owner, buffer, previous
        self.device: torch.Tensor | None = tensor
        form = torch.empty_like(tensor, device="meta")
        self.host = buffer.view(tensor.dtype).as_strided(form.shape, form.stride())
        self.moved: Done | None = None
        """The copy that ``device`` is under, to the host or from it; None when it was waited for."""
        self.used = False

    def wait(self) -> None:
        """Let the current stream go on only when the copy that is under way is done."""
        if self.moved is not None:
            self.moved.wait()
            self.moved = None

    def __del__(self) -> None:
        # Whatever is copied into the buffer next comes behind the copies so far, on the same lane.
        self.owner.give_back(self.buffer)


class BlockInputs:
    """Sends inputs to pinned host memory and has them back in time. Its memory is had in the first pass, and kept.

    In the GPU tier they all stay where they are.
    """

    def __init__(self, device: torch.device, tier: Tier) -> None:
        self.host_bytes = self.sent_bytes = self.fetched_bytes = 0
        """Held on the host; moved so far."""
        self._device = device
        self._lane = Lane("inputs", device) if tier is Tier.HOST else None
        self._largest_bytes = 0
        self._arenas: list[Arena] = []
        self._idle: dict[int, list[torch.Tensor]] = {}
        """Buffers that nothing is in, by their bytes."""
        self._expected: set[int] = set()
        self._newest: WaitingInput | None = None
        self._coming: WaitingInput | None = None

    @property
    def leave(self) -> bool:
        """Whether any of them goes to the host."""
        return self._lane is not None

    @property
    def device_bytes(self) -> int:
        """Of the most inputs that are on the device at once ([Note: where an input is])."""
        return 2 * self._largest_bytes

    def begin_pass(self) -> None:
        """A forward pass begins, or backward is over: nothing of what was before is needed any more."""
        for waiting in (self._newest, self._coming):
            if waiting is not None:
                waiting.wait()
        self._newest = self._coming = None
        self._expected.clear()

    def begin_anew(self) -> None:
        """A pass was cut short: what waits stays where it is, for who keeps a loss of before."""
        if self._lane is not None:
            self._lane.settle()
        self.begin_pass()

    def expect(self, arguments: tuple[Any, ...]) -> None:
        """A recomputed block is about to run on these: what of them needs a gradient is to go to the host."""
        if self._lane is None:
            return
        given = (t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad and t.numel())
        tensors = map(local_of, given)
        # Others, such as masks, are the same for all blocks, and parts stay with the whole: they would free nothing.
        self._expected = {t.data_ptr() for t in tensors if t.untyped_storage().nbytes() == t.nbytes}

    def send(self, tensor: torch.Tensor) -> WaitingInput | None:
        """Send an expected input to the host; None for any other tensor."""
        if not self._expected or tensor.layout is not torch.strided or tensor.data_ptr() not in self._expected:
            return None
        self._expected.discard(tensor.data_ptr())
        tensor = tensor.detach()
        if self._newest is not None:
            self._newest.wait()
            self._newest.device = None
        waiting = self._newest = WaitingInput(self, tensor, self._take_buffer(tensor.nbytes), self._newest)
        self._largest_bytes = max(self._largest_bytes, tensor.nbytes)
        waiting.moved = self._copy(waiting.host, tensor)
        self.sent_bytes += tensor.nbytes
        return waiting

    def fetch(self, waiting: WaitingInput) -> torch.Tensor:
        """The input on the device; the one before it starts to come."""
        self._start(waiting)
        waiting.wait()
        tensor, waiting.device, waiting.used = waiting.device, None, True
        assert tensor is not None
        if waiting.previous is not None and not waiting.previous.used:
            self._start(waiting.previous)
        return tensor

    def _take_buffer(self, size_bytes: int) -> torch.Tensor:
        """Host memory of this size, as bytes."""
        if idle := self._idle.get(size_bytes):
            return idle.pop()
        arena = Arena(checkpoint_host_bytes(1, size_bytes), self._device)
        self._arenas.append(arena)
        self.host_bytes += arena.capacity_bytes
        buffer = arena.take(size_bytes)
        arena.pin()
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Nothing waits in this buffer any more."""
        self._idle.setdefault(buffer.nbytes, []).append(buffer)

    def close(self) -> None:
        """Finish what is under way, and unpin."""
        if self._lane is not None:
            self._lane.close()
        for arena in self._arenas:
            arena.close()

    def _start(self, waiting: WaitingInput) -> None:
        """Bring it to the device, if it is not there or on its way."""
        if waiting.device is not None:
            return
        if self._coming is not None:
            self._coming.wait()
        self._coming = waiting
        host = waiting.host
        device = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self._device)
        waiting.moved = self._copy(device, host)
        waiting.device = device  # last: what is on its way can be waited for
        self.fetched_bytes += host.nbytes

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> Done:
        """Behind all that the device was given so far: the memory may have been another's a moment ago."""
        assert self._lane is not None
        return self._lane.copy(target, source, [Done.now(self._device)])
