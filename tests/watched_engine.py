"""Engines under the eyes of ``tests.stream_races``, on the streams of a GPU or on ``tests.simulated_streams``.

What the races can not see by themselves they are told: updates by kernels of Triton or compiled C (``over_masters``),
the disk's work (``Store``), and what threads tell each other (``Lane`` and futures). Everything else on memory of the
tiers or the device is an operation of torch. ``Event.query`` orders nothing here, and nothing of the engine counts on
it: it is asked for pace and for times only.
"""

import linecache
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.cuda._gpu_trace as gpu_trace

from offload import arena, snapshot, streamed_update, updater
from offload.arena import Arena
from offload.engine import Engine
from offload.state import OptimizerState
from offload.store import Extent, Store, Ticket
from offload.streamed_update import StreamedUpdate
from offload.streams import Done, Lane
from tests.stream_races import FILE_ADDRESS, INSTRUMENTS, Races

INSTRUMENTS.add(__file__)
STREAMS = Path(Done.wait.__code__.co_filename)


class Waits:
    """The places in the engine where a stream or a thread waits for what a stream does; one may be ``left_out``.

    There the threads still wait for each other, or nothing would come in any order at all.
    """

    def __init__(self, left_out: str | None = None) -> None:
        self.left_out = left_out
        self.seen: set[str] = set()

    def leaves_out(self, done: Done, place: str | None) -> bool:
        """Whether the one at this place is left out; then only the host's part of it was waited for."""
        if place is not None and _has_event(done):
            self.seen.add(place)
        return place is not None and place == self.left_out


class _At:
    """A Done that a job comes after."""

    def __init__(self, waits: Waits, done: Done, place: str) -> None:
        self._waits, self._done, self._place = waits, done, place

    def wait(self) -> None:
        if not self._waits.leaves_out(self._done, self._place):
            self._done.wait()


def _has_event(done: Done) -> bool:
    """Whether the device has a part in it; waits for threads."""
    parts = [done._host_part() is not None, *map(_has_event, done._others)]
    return any(parts)


def _place() -> tuple[str, str] | None:
    """Where in the engine somebody waits: the function, and what it says there."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        path = Path(code.co_filename)
        if path.parent == STREAMS.parent and path != STREAMS and code.co_name != "wait":
            lines = (linecache.getline(str(path), i) for i in range(code.co_firstlineno, frame.f_lineno + 1))
            said = [line.partition("  #")[0].strip() for line in lines]
            again = said.count(said[-1])
            return code.co_qualname, said[-1] + (f" ({again})" if again > 1 else "")
        frame = frame.f_back
    return None


def watch(patch: pytest.MonkeyPatch, races: Races, waits: Waits) -> None:
    """Let the races know what engines that are made from now on do."""
    _watch_memory(patch, races)
    _watch_threads(patch, races)
    _watch_waits(patch, waits)


def _watch_memory(patch: pytest.MonkeyPatch, races: Races) -> None:
    make, mapped, over_masters = Arena.__init__, arena.mapped, updater.over_masters

    def taken(size_bytes: int) -> torch.Tensor:
        memory = mapped(size_bytes)
        races.on_host(memory, tier=False)
        return memory

    def made(self: Arena, *args: Any) -> None:
        make(self, *args)
        races.on_host(self._bytes, tier=True)

    def asked(request: Callable[..., Ticket], verb: str) -> Callable[..., Ticket]:
        def ask(store: Store, extent: Extent, memory: torch.Tensor) -> Ticket:
            at = FILE_ADDRESS + extent.offset_bytes
            file, there = (at, at + extent.size_bytes), (memory.data_ptr(), memory.data_ptr() + memory.nbytes)
            reads, writes = (file, there) if verb == "read" else (there, file)
            clock = races.asked(reads, writes, f"{verb} of the disk")
            ticket: Any = request(store, extent, memory)
            ticket.request = clock
            return ticket

        return ask

    def told(update: Callable[..., None]) -> Callable[..., None]:
        update = over_masters(update)

        def updated(weight: torch.Tensor, gradient: torch.Tensor, state: Any, how: Any, clip: Any) -> None:
            with races.unseen():
                update(weight, gradient, state, how, clip)
            reads = [t for t in (gradient, clip) if isinstance(t, torch.Tensor)]
            races.touched(reads, [weight, *state.tensors()], "the update")

        return updated

    patch.setattr(Arena, "__init__", made)
    patch.setattr(Store, "read", asked(Store.read, "read"))
    patch.setattr(Store, "write", asked(Store.write, "write"))
    for module in (arena, snapshot):
        patch.setattr(module, "mapped", taken)
    for module in (updater, streamed_update):
        patch.setattr(module, "over_masters", told)


def _watch_threads(patch: pytest.MonkeyPatch, races: Races) -> None:
    work, close, submit = Lane._work, Lane.close, Lane.submit
    set_result, result, settled, check = Future.set_result, Future.result, Done.settled.fget, Done.check

    def working(lane: Lane, cpu_threads: int) -> None:
        with races.thread(f"the thread of {lane.name}"):
            work(lane, cpu_threads)

    def closed(lane: Lane) -> None:
        close(lane)
        races.hear(races.clock(f"the thread of {lane.name}"))

    def submitted(lane: Lane, job: Callable[[], None], after: Sequence[Done] = ()) -> Done:
        clock = races.clock()

        def told_job() -> None:
            races.hear(clock)
            job()

        return submit(lane, told_job, after)

    def tell(future: Any, value: Any) -> None:
        future.clock = races.clock()
        set_result(future, value)

    def hear(future: Any, timeout: float | None = None) -> Any:
        value = result(future, timeout)
        for clock in (getattr(future, "clock", {}), getattr(future, "request", {})):
            races.hear(clock)
        return value

    def is_settled(done: Done) -> bool:
        """Whoever need not wait for it goes on as if he had."""
        if known := settled(done):
            with suppress(Exception):
                done._enqueued.result()
        return known

    def checked(done: Done) -> None:
        """Who asks what went wrong so far must not count on what chance let him hear."""
        with races.deaf():
            check(done)

    patch.setattr(Lane, "_work", working)
    patch.setattr(Lane, "close", closed)
    patch.setattr(Lane, "submit", submitted)
    patch.setattr(Future, "set_result", tell)
    patch.setattr(Future, "result", hear)
    patch.setattr(Done, "settled", property(is_settled))
    patch.setattr(Done, "check", checked)


def _watch_waits(patch: pytest.MonkeyPatch, waits: Waits) -> None:
    wait, synchronize, submit = Done.wait, Done.synchronize, Lane.submit

    def unless_left_out(original: Callable[[Done], None]) -> Callable[[Done], None]:
        def waited(done: Done) -> None:
            place = _place()
            if not waits.leaves_out(done, place and ": ".join(place)):
                original(done)

        return waited

    def submitted(lane: Lane, job: Callable[[], None], after: Sequence[Done] = ()) -> Done:
        function, _ = _place() or ("", "")
        named: Any = [_At(waits, done, f"{function}: after[{i}]") for i, done in enumerate(after)]
        return submit(lane, job, named)

    patch.setattr(Done, "wait", unless_left_out(wait))
    patch.setattr(Done, "synchronize", unless_left_out(synchronize))
    patch.setattr(Lane, "submit", submitted)


def watch_gpu(patch: pytest.MonkeyPatch) -> Races:
    """Let torch tell of the streams and events of a GPU, in this process from now on."""
    races = Races(lambda: torch.cuda.current_stream().cuda_stream, simulated=False)
    torch.cuda.init()
    torch._C._activate_gpu_trace()
    name_streams(patch, races, lambda _, stream: stream)
    for kind, callback in (
        ("EventRecord", races.recorded),
        ("EventWait", races.waited),
        ("EventSynchronization", races.event_synchronized),
        ("StreamSynchronization", races.stream_synchronized),
        ("DeviceSynchronization", races.device_synchronized),
        ("MemoryDeallocation", races.freed),
    ):
        patch.setattr(getattr(gpu_trace, f"{kind}Callbacks"), "callback_list", [callback])
    return races


def name_streams(patch: pytest.MonkeyPatch, races: Races, made: Callable[[str, Any], Any]) -> None:
    """Streams of lanes are called as these, in reports; ``made`` gives the stream to use in the place of one."""
    make_lane, make_update = Lane.__init__, StreamedUpdate.__init__

    def named(name: str, stream: Any) -> Any:
        with (stream := made(name, stream)):
            races.names[races.current_stream()] = name
        return stream

    def lane(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        make_lane(self, name, *args, **kwargs)
        self._stream = named(f"the stream of {name}", self._stream)

    def update(self: Any, *args: Any, **kwargs: Any) -> None:
        make_update(self, *args, **kwargs)
        self._computing = named("the stream of the update", self._computing)

    patch.setattr(Lane, "__init__", lane)
    patch.setattr(StreamedUpdate, "__init__", update)


def label_memory(races: Races, engine: Engine) -> None:
    """Reports say whose memory it is."""
    for state in engine.states:
        name = state.unit.name or "the root unit"
        for what, memory in vars(state).items():
            if isinstance(memory, torch.Tensor):
                races.label(memory, f"{what} of {name}")
            elif isinstance(memory, OptimizerState):
                for part in memory.tensors():
                    races.label(part, f"{what} of {name}")
    for ring in engine._rings.rings.values():
        for slot in ring:
            races.label(slot.buffer, "a slot for weights")
    for buffers in engine._gradients._idle.values():
        for buffer, _ in buffers:
            races.label(buffer, "a slot for gradients")
    for slot in engine._streamed._slots if engine._streamed is not None else ():
        for part in (slot.weights, slot.gradients, *slot.state.tensors()):
            races.label(part, "a slot of the streamed update")
