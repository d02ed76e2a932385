"""Finds accesses to the same memory that nothing orders, whatever order chance gave them in this run.

[Note: what is a race]
As in torch's CUDA sanitizer (``torch.cuda._sanitizer``), every stream has a clock that says how much of every other
stream lies behind it. Launches advance it, events carry it, and two accesses race where one of them writes and the
clock of the later does not know of the earlier. Four things are stricter here, for what the engine does:

- Accesses are ranges of bytes. The sanitizer compares where tensors begin, but a unit's weights come as one tensor and
  are used as a dozen views of it.
- The host's memory of the tiers counts too, and the file below it: copies use it while the host, or a disk, goes on.
- A host thread has a clock of its own. What it has waited for lies behind what it does from then on, and behind what it
  tells others through jobs and futures. In the sanitizer any wait of any thread orders all streams: the update on the
  host waits for every gradient, which would hide most of what could be missing.
- Memory that is freed may be used at once by the stream that it was allocated on. So that stream must know by then of
  what others did with it, unless the allocator does (``record_stream``). The sanitizer forgets what is freed.
"""

import sys
import threading
import weakref
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = str(Path(__file__).parent.parent)
OURS = tuple(f"{ROOT}/{package}/" for package in ("offload", "tests"))
"""Not all below the root: an environment may lie there, too."""
INSTRUMENTS = {__file__}
"""Files whose frames tell nothing about an access."""
PAGE_BYTES = 4096
FILE_ADDRESS = 1 << 62
"""Where extents of the swap file lie, among the addresses of memory."""
EMPTY = ("empty", "new_empty")
"""How the names of operations begin that make tensors and write nothing."""
UNTOUCHED = ("_unsafe_view", "is_pinned")
"""Operations that neither read nor write."""
GATHER = "c10d::_allgather_base_"
"""Leaves a rank's own part as it is where that is gathered in its place, as NCCL says of it."""
TRAINING = "the training thread"

Clock = dict[str, int]
"""By actor, a stream or a thread: the number of the last of its accesses that is known to be over."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Access:
    """What an actor did with some bytes."""

    start: int
    stop: int
    writes: bool
    actor: str
    number: int
    what: str

    def __str__(self) -> str:
        return f"{'writes' if self.writes else 'reads'} on {self.actor}: {self.what}"


class Block(NamedTuple):
    """Memory that was allocated at once."""

    stop: int
    owner: int | None
    """The stream that it goes back to; None on the host."""


class Races:
    """What was found so far. ``current_stream`` gives that of a thread.

    Where streams are ``simulated`` the device's memory is what was not said to be the host's.
    """

    def __init__(self, current_stream: Callable[[], int], *, simulated: bool) -> None:
        self.found: dict[tuple[str, str], str] = {}
        """By what the two accesses were."""
        self.names: dict[int, str] = {}
        """Of streams."""
        self.current_stream, self._simulated = current_stream, simulated
        self._lock = threading.RLock()  # of one thread, too: memory may be freed while it is in here
        self._here = threading.local()
        self._clocks: defaultdict[str, Clock] = defaultdict(dict)
        self._streams: set[str] = set()
        self._events: dict[int, Clock] = {}
        self._pages: defaultdict[int, list[Access]] = defaultdict(list)
        self._count = 0
        self._blocks: dict[int, Block] = {}
        self._lent: set[int] = set()
        """Blocks whose other streams the allocator knows."""
        self._host: list[tuple[int, int, bool]] = []
        """Memory of the host, and whether it is a tier's; in order."""
        self._noting = False
        self._late: list[int] = []
        """Blocks that were freed, and not looked at."""
        self._labels: list[tuple[int, int, str]] = []

    # Threads

    @contextmanager
    def thread(self, name: str) -> Iterator[None]:
        """This thread is an actor of this name, and its operations are seen."""
        self._here.actor = name
        with Watched(self):
            yield

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Somebody else tells of what this thread does: its operations are not looked at one by one."""
        self._here.unseen = True
        try:
            yield
        finally:
            self._here.unseen = False

    @property
    def sees(self) -> bool:
        """Whether operations of this thread are looked at."""
        return not getattr(self._here, "unseen", False)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """This thread learns nothing from other threads."""
        self._here.deaf = True
        try:
            yield
        finally:
            self._here.deaf = False

    def clock(self, actor: str | None = None) -> Clock:
        """What this thread knows now, or another actor."""
        with self._lock:
            return dict(self._clocks[actor or self._actor()])

    def hear(self, clock: Clock) -> None:
        """This thread was told what another one knew."""
        with self._lock:
            if not getattr(self._here, "deaf", False):
                _learn(self._clocks[self._actor()], clock)

    def _actor(self) -> str:
        if not hasattr(self._here, "actor"):
            thread = threading.current_thread()
            # Autograd's threads, which Python does not know, work while the training thread waits for them.
            trains = thread is threading.main_thread() or isinstance(thread, threading._DummyThread)
            self._here.actor = TRAINING if trains else thread.name
        return self._here.actor

    # Streams, events and memory: the callbacks of torch.cuda._gpu_trace

    def recorded(self, event: int, stream: int) -> None:
        with self._lock:
            self._events[event] = dict(self._stream(stream))

    def waited(self, event: int, stream: int) -> None:
        with self._lock:
            _learn(self._stream(stream), self._events.get(event, {}))

    def event_synchronized(self, event: int) -> None:
        with self._lock:
            self.hear(self._events.get(event, {}))

    def stream_synchronized(self, stream: int) -> None:
        with self._lock:
            self.hear(self._stream(stream))

    def device_synchronized(self) -> None:
        with self._lock:
            for name in self._streams:
                self.hear(self._clocks[name])

    def freed(self, address: int) -> None:
        with self._lock:
            self._late.append(address)
            if not self._noting:  # else memory was freed while an access was noted down
                self._free_late()

    def read_back(self) -> None:
        """This thread has got something from its stream, so what the stream was given is over."""
        self.stream_synchronized(self.current_stream())

    def _name(self, stream: int) -> str:
        return self.names.get(stream, f"stream {stream:#x}" if stream else "the default stream")

    def _stream(self, stream: int) -> Clock:
        """Of a stream that this thread is about to give something: that comes after all that the thread knows of."""
        self._streams.add(self._name(stream))
        clock = self._clocks[self._name(stream)]
        _learn(clock, self._clocks[self._actor()])
        return clock

    # Memory

    def on_host(self, memory: torch.Tensor, *, tier: bool) -> None:
        """This memory is the host's; accesses count where it is a ``tier``'s."""
        address, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        with self._lock:
            self._host = [h for h in self._host if h[0] != address]
            insort(self._host, (address, stop, tier))
            if address not in self._blocks:
                self._blocks[address] = Block(stop, None)
                weakref.finalize(memory.untyped_storage(), self.freed, address).atexit = False

    def allocated(self, tensor: torch.Tensor) -> None:
        """It was made, and nothing was written to it."""
        with self._lock:
            self._span(tensor)

    def label(self, memory: torch.Tensor, name: str) -> None:
        """What reports call it."""
        self._labels.append((memory.data_ptr(), memory.data_ptr() + memory.nbytes, name))

    def lent(self, tensor: torch.Tensor) -> None:
        """``record_stream`` was called."""
        self._lent.add(tensor.untyped_storage().data_ptr())

    def on_device(self, tensor: torch.Tensor) -> bool:
        """Whether only streams touch it."""
        if not self._simulated:
            return tensor.is_cuda
        return tensor.device.type == "cpu" and self._hosts(tensor.data_ptr()) is None

    def _hosts(self, address: int) -> bool | None:
        """Whether it is a tier's; None where it is not known to be the host's."""
        i = bisect_right(self._host, (address, FILE_ADDRESS, True))
        return self._host[i - 1][2] if i and address < self._host[i - 1][1] else None

    def _span(self, tensor: torch.Tensor) -> Span | None:
        """The bytes of a tensor, where they count."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        if self.on_device(tensor):
            self._know(tensor.untyped_storage())
        elif tensor.device.type != "cpu" or not self._hosts(tensor.data_ptr()):
            return None
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize

    def _know(self, storage: torch.UntypedStorage) -> None:
        """Memory is seen for the first time: it was allocated by this thread a moment ago."""
        address = storage.data_ptr()
        if address not in self._blocks:
            self._blocks[address] = Block(address + storage.nbytes(), self.current_stream())
            if self._simulated:
                weakref.finalize(storage, self.freed, address).atexit = False

    # Accesses

    def touched(self, reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor], what: str) -> None:
        """This thread did it: on its stream where a tensor is on the device, else at once."""
        reads, writes = list(reads), list(writes)
        with self._lock:
            spans = [(s, w) for some, w in ((reads, False), (writes, True)) for t in some if (s := self._span(t))]
            if not spans:
                return
            on_stream = any(map(self.on_device, chain(reads, writes)))
            stream = self.current_stream() if on_stream else 0
            clock = self._stream(stream) if on_stream else self._clocks[self._actor()]
            self._did(self._name(stream) if on_stream else self._actor(), clock, spans, f"{what} {place()}")

    def asked(self, reads: Span, writes: Span, what: str) -> Clock:
        """The disk was given a request: what whoever waits for it knows then."""
        with self._lock:
            clock, actor = self.clock(), f"the disk's request {self._count}"
            spans = [(s, w) for s, w in ((reads, False), (writes, True)) if s[0] >= FILE_ADDRESS or self._hosts(s[0])]
            self._did(actor, clock, spans, f"{what} {place()}")
            return clock

    def _did(self, actor: str, clock: Clock, spans: Iterable[tuple[Span, bool]], what: str) -> None:
        self._noting = True
        self._count += 1
        clock[actor] = self._count
        for (start, stop), writes in spans:
            now = Access(start, stop, writes, actor, self._count, what)
            for page in _pages(start, stop):
                self._note(page, now, clock)
        self._noting = False
        self._free_late()

    def _note(self, page: int, whole: Access, clock: Clock) -> None:
        edge = page * PAGE_BYTES
        now = replace(whole, start=max(whole.start, edge), stop=min(whole.stop, edge + PAGE_BYTES))
        kept = [now]
        for old in self._pages[page]:
            meet = old.start < now.stop and now.start < old.stop and (old.writes or now.writes)
            if meet and old.number > clock.get(old.actor, 0):
                self._found(old, now)
            # Whoever races with what is left out here races with this one as well.
            covered = now.start <= old.start and old.stop <= now.stop
            if not (covered and (now.writes or (old.actor == now.actor and not old.writes))):
                kept.append(old)
        self._pages[page] = kept

    def _free_late(self) -> None:
        while self._late:
            address = self._late.pop()
            if (block := self._blocks.pop(address, None)) is not None:
                self._free(address, block)

    def _free(self, address: int, block: Block) -> None:
        # The allocator gives it away behind all that its stream has been given, and never before now.
        clock = dict(self._clocks[self._actor()])
        if block.owner is not None:
            _learn(clock, self._clocks[self._name(block.owner)])
        if address in self._lent:
            self._lent.discard(address)
            clock = None
        self._host = [h for h in self._host if h[0] != address]
        freed = Access(address, block.stop, True, "the allocator", 0, f"frees it {place()}")
        for page in _pages(address, block.stop):
            accesses = self._pages.pop(page, [])
            inside = [a for a in accesses if a.start < block.stop and address < a.stop]
            if len(inside) < len(accesses):
                self._pages[page] = [a for a in accesses if a not in inside]
            for old in inside:
                if clock is not None and old.number > clock.get(old.actor, 0):
                    self._found(old, freed)

    def _found(self, old: Access, now: Access) -> None:
        if (key := (str(old), str(now))) not in self.found:
            where = next((name for a, b, name in self._labels if a <= now.start < b), f"memory at {now.start:#x}")
            self.found[key] = f"{where}\n  {old}\n  {now}"


def _pages(start: int, stop: int) -> range:
    return range(start // PAGE_BYTES, -(-stop // PAGE_BYTES))


def _learn(clock: Clock, other: Clock) -> None:
    for actor, number in other.items():
        if number > clock.get(actor, 0):
            clock[actor] = number


class Watched(TorchDispatchMode):
    """Tells of every operation of the threads that are in it, autograd's too."""

    def __init__(self, races: Races) -> None:
        super().__init__()
        self._races = races

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs := kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name == "record_stream":
            self._races.lent(args[0])
        elif name.startswith(EMPTY):
            self._races.allocated(result)
        elif self._races.sees and not func.is_view and name not in UNTOUCHED:
            reads, writes = _accesses(func._schema, args, kwargs, result)
            self._races.touched(reads, writes, name)
            if self._waits(name, args, kwargs, result):
                self._races.read_back()
        return result

    def _waits(self, name: str, args: Any, kwargs: Any, result: Any) -> bool:
        """Whether the thread goes on only when the device has done it; the gpu trace tells of what was before it."""
        on_device = self._races.on_device
        if name in ("copy_", "_to_copy"):
            other = args[1] if name == "copy_" else args[0]
            goes_on = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return not goes_on and on_device(result) != on_device(other)
        return name == "_local_scalar_dense" and on_device(args[0])


def _accesses(schema: Any, args: Any, kwargs: Any, result: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that an operation reads, and those that it writes."""
    if schema.name == GATHER:
        whole, own = args[:2]
        return [own], [part for part in whole.split(len(own)) if part.data_ptr() != own.data_ptr()]
    reads, writes = [], []
    named = {argument.name: argument for argument in schema.arguments}
    for argument, value in chain(zip(schema.arguments, args, strict=False), ((named[k], v) for k, v in kwargs.items())):
        changes = argument.alias_info is not None and argument.alias_info.is_write
        (writes if changes else reads).extend(_tensors(value))
    if all(returned.alias_info is None for returned in schema.returns):
        writes.extend(_tensors(result))
    return reads, writes


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def place() -> str:
    """Who asks for it, as far as that is Python of this project."""
    found, frame = [], sys._getframe(1)
    while frame is not None and len(found) < 3:
        code = frame.f_code
        if code.co_filename.startswith(OURS) and code.co_filename not in INSTRUMENTS:
            found.append(f"{code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return "from " + " < ".join(found) if found else "from autograd"
