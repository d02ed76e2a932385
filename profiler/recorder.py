"""Watches a training step from below: every operation, every storage, and the module each belongs to."""

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from profiler.accumulation import added_in_place
from profiler.cudnn import passing_blocks
from profiler.errors import ProfilerError
from profiler.events import BACKWARD, FORWARD, LOSS, SETUP, Alloc, Category, Event, Free, Op
from profiler.formulas import MATMULS, flops_of, rate_dtype
from profiler.known import KnownValues, assumed_result, known_selection
from profiler.moved import moved_bytes, traffic
from profiler.reductions import reduction_scratch, softmax_scratch_bytes
from profiler.shapes import work_shape
from profiler.trees import tensors_in

aten = torch.ops.aten

WORKSPACE_BYTES = 32 << 20
"""cuBLAS keeps one for each handle and stream, in memory of the caching allocator; measured on Hopper."""

MOST_READS = 2000
"""Of values that depend on data, by one module."""
ALMOST_ONE = 1 - 2**-10
"""Stands for a number drawn from [0, 1) that decides whether a layer is dropped; the larger, the less is."""


class ModuleStack:
    """Which modules are running; in backward, which one made the autograd node that is running.

    [Note: Modules in backward] Autograd numbers its nodes in the order in which they are made. Forward notes the next
    number whenever a module starts or ends, so a node's number tells which module was innermost when it was made.
    """

    def __init__(self, model: nn.Module) -> None:
        self._running: list[str] = []
        self._numbers: list[int] = [-1]
        self._paths: list[str] = [""]
        self._owners = {id(p): n.rpartition(".")[0] for n, p in model.named_parameters()}

    @property
    def running(self) -> list[str]:
        """Paths of the modules that are running, the innermost last."""
        return self._running

    def push(self, path: str) -> None:
        """A module starts."""
        self._running.append(path)
        self._note()

    def pop(self) -> None:
        """The innermost module ends."""
        if self._running:
            self._running.pop()
        self._note()

    def current(self) -> str:
        """Path of the module that an operation running now belongs to, "" for the model itself or none."""
        if self._running:
            return self._running[-1]
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return ""
        if hasattr(node, "variable"):
            return self._owners.get(id(node.variable), "")
        return self._paths[bisect_right(self._numbers, node._sequence_nr()) - 1]

    def _note(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._paths.append(self._running[-1] if self._running else "")


class Recorder(TorchDispatchMode):
    """Logs events into ``events``. Enter it inside the fake mode, which carries the operations out."""

    def __init__(self, stack: ModuleStack) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.assumptions: dict[str, None] = {}
        self.phase = SETUP
        self.used_outside: set[str] = set()
        self.values = KnownValues()
        self._stack = stack
        self._ids: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}
        self._categories: dict[int, Category] = {}
        self._parameters: dict[int, tuple[str, frozenset[str]]] = {}
        self._workspaces: set[str] = set()
        self._paused = False
        self._read: Counter[str] = Counter()
        self._sums: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch need not keep its compiler away from this mode at every operation: nothing is compiled in a trace."""
        return False

    def watch(self, tensor: torch.Tensor, category: Category, module: str) -> int:
        """Log the tensor's storage, once, and its end when it comes; returns its id."""
        if tensor.layout is not torch.strided:
            raise ProfilerError(
                f"{self._place()} makes a {tensor.layout} tensor; only dense ones can be traced: build an embedding"
                " with sparse=False, or call to_dense() on the tensor"
            )
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._ids:
            number = self._ids[key] = self.stand_in(storage.nbytes(), category, module)
            self._watches[number] = weakref.ref(storage, partial(self._ended, key, number))
        return self._ids[key]

    def stand_in(self, size: int, category: Category, module: str, most_bytes: int = 0) -> int:
        """Log a storage that is there only in name; returns its id."""
        number = len(self._categories)
        self._categories[number] = category
        self.events.append(Alloc(number, size, category, module, self.phase, most_bytes))
        return number

    def watch_parameter(self, name: str, tensor: torch.Tensor, owners: frozenset[str]) -> int:
        """Log a parameter that belongs to the modules ``owners``."""
        number = self.watch(tensor, Category.PARAMETER, name.rpartition(".")[0])
        self._parameters[tensor.untyped_storage()._cdata] = (name, owners)
        return number

    def retag(self, tensor: torch.Tensor, category: Category) -> None:
        """Say what a storage turned out to be."""
        self._categories[self.watch(tensor, category, self._stack.current())] = category

    def category(self, number: int) -> Category:
        """What the storage holds, as far as is known."""
        return self._categories[number]

    def report(
        self,
        name: str,
        flops: int,
        tensors: Sequence[torch.Tensor],
        shape: tuple[int, ...] = (),
        lasting_bytes: int = 0,
        repeated_flops: int = 0,
    ) -> None:
        """Log an operation that the dispatcher does not show, with the tensors that it reads and writes.

        The first of its name makes ``lasting_bytes`` that are never given back. ``repeated_flops`` of the FLOPs do
        again what forward did.
        """
        if lasting_bytes and name not in self._workspaces:
            self._make_workspace(name, lasting_bytes)
        moved = traffic(tensors)
        place = (self._stack.current(), self.phase, self._recomputing())
        self.events.append(Op(name, flops, moved, rate_dtype(tensors), *place, shape, repeated_flops))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Everything inside belongs to this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing inside is logged; it must make no storage."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def finished(self) -> tuple[Event, ...]:
        """The events, each storage in its final category; what ends from now on is not logged."""
        self._watches.clear()
        events = [e._replace(category=self._categories[e.id]) if isinstance(e, Alloc) else e for e in self.events]
        return tuple(added_in_place(events, self._sums))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and log it with the storages it made."""
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].device  # the mode below would say the same, and is asked for twice as often as for work
        kwargs = dict(kwargs or {})
        name = func._schema.name
        if self._paused or name.startswith("prim::"):  # the latter ask about a tensor, for its device say
            return func(*args, **kwargs)
        if torch.device(kwargs.get("device") or "cpu").type not in ("cpu", "meta"):
            kwargs["device"] = torch.device("cpu")  # a fake tensor on an absent device would end the process
        if self.phase in (FORWARD, LOSS):
            self._note_reads((args, kwargs))
        module = self._stack.current()
        out = self._run(func, args, kwargs)
        self.values.follow(func, args, kwargs, out)
        flops = flops_of(func, args, kwargs, out)
        # Backward runs on a thread of its own, with a handle of its own.
        handle = BACKWARD if self.phase == BACKWARD else FORWARD
        if name in MATMULS and handle not in self._workspaces:
            self._make_workspace(handle, WORKSPACE_BYTES)
        read, written = tensors_in((args, kwargs)), tensors_in(out)
        passing = passing_blocks(func, args, out)
        with self.passing(passing.around, module):
            for number, tensor in enumerate(written):
                self.watch(tensor, Category.ACTIVATION, module)
                self.come_and_go(passing.after[number] if number < len(passing.after) else (), module)
        self.come_and_go((softmax_scratch_bytes(func, args),), module)
        partial_sums = reduction_scratch(func, args, kwargs, out)
        if partial_sums.most_bytes:
            number = self.stand_in(partial_sums.bytes, Category.SCRATCH, module, partial_sums.most_bytes)
            self.events.append(Free(number, self.phase))
        if func is aten.add.Tensor and self.phase == BACKWARD and not torch.is_grad_enabled():
            self._note_sum(out, *args[:2])
        moved = moved_bytes(func, args, read, written)
        dtype, shape = rate_dtype(read or written), work_shape(name, args, out)
        op = Op(name, flops, moved, dtype, module, self.phase, self._recomputing(), shape)
        self.events.append(op)
        return out

    @contextmanager
    def passing(self, sizes: Sequence[int], module: str) -> Iterator[None]:
        """Log blocks of these bytes, if more than none, that end after what is inside."""
        numbers = [self.stand_in(size, Category.SCRATCH, module) for size in sizes if size]
        yield
        self.events.extend(Free(number, self.phase) for number in reversed(numbers))

    def come_and_go(self, sizes: Sequence[int], module: str) -> None:
        """Log blocks of these bytes that come and go."""
        with self.passing(sizes, module):
            pass

    def _note_sum(self, out: torch.Tensor, first: torch.Tensor, second: Any) -> None:
        sizes = {tensor.untyped_storage().nbytes() for tensor in (out, first)}
        if isinstance(second, torch.Tensor) and len(sizes) == 1:
            module = self._stack.current()
            self._sums[self.watch(out, Category.ACTIVATION, module)] = self.watch(first, Category.ACTIVATION, module)

    def _make_workspace(self, key: str, size: int) -> None:
        self._workspaces.add(key)
        self.stand_in(size, Category.WORKSPACE, "")

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.rand.default and list(args[0]) in ([], [1]):
            self._assume(f"a random number that {self._place()} draws is taken to be close to 1, so nothing is dropped")
            return torch.tensor([ALMOST_ONE] if args[0] else ALMOST_ONE, dtype=kwargs.get("dtype"))
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return _grouped_mm(func, args, kwargs)
        if func is aten.native_layer_norm.default:
            return _layer_norm(func, args, kwargs)
        if func is aten.split_with_sizes.default and self.assumptions:
            args = self._even_split(*args)
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            known = self.values.of((args, kwargs))
            return self._assume_value(func, args) if known is None else self.values.run(func, *known)
        except DynamicOutputShapeException as error:
            known = known_selection(self.values, func, args, kwargs)
            return self._assume_selection(func, args, kwargs, error) if known is None else known

    def _even_split(self, tensor: torch.Tensor, sizes: list[int], dim: int = 0) -> Any:
        """The arguments of a split; sizes that do not fit, because they were assumed, become equal ones."""
        length, count = tensor.shape[dim], len(sizes)
        if sum(sizes) == length or not count:
            return tensor, sizes, dim
        self.assume("the parts that a tensor is split into are taken to be equal")
        return tensor, [length // count + (i < length % count) for i in range(count)], dim

    def assume(self, phrase: str) -> None:
        """Note what the running module was taken to have."""
        self._assume(f"in {self._place()} {phrase}")

    def _assume_value(self, func: Any, args: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            value: Any = True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        elif func in (aten.equal.default, aten.allclose.default):
            value = True
        else:
            raise ProfilerError(f"{func} in {self._place()} depends on data, which a profile can not know")
        self._assume(f"a value that {self._place()} reads from a tensor ({func._schema.name}) is taken to be {value}")
        self._read[self._place()] += 1
        if self._read[self._place()] > MOST_READS:
            raise ProfilerError(
                f"{self._place()} has read {MOST_READS} values that depend on data, which a profile does not know: a"
                " loop that goes on until such a value says so never ends here; give it a largest number of rounds"
            )
        return value

    def _assume_selection(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        if func is aten.nonzero.default:
            out: Any = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        elif func is aten.masked_select.default:
            out = args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
        elif func is aten.index.Tensor:
            out = func(args[0], _all_chosen(args[1]))
        elif (assumed := assumed_result(self.values, func, args, kwargs)) is not None:
            out, taken = assumed
            self._assume(f"in {self._place()} ({func._schema.name}) {taken}")
            return out
        else:
            raise ProfilerError(
                f"the size of the result of {func} in {self._place()} depends on data, which a profile can not know"
            ) from error
        self._assume(
            f"a mask in {self._place()} ({func._schema.name}) is taken to select everything: the figures are the most"
            " it can take, as if every expert of a mixture got every token"
        )
        return out

    def _assume(self, sentence: str) -> None:
        self.assumptions[sentence] = None

    def _place(self) -> str:
        return self._stack.current() or "the model"

    def _note_reads(self, tree: Any) -> None:
        for tensor in tensors_in(tree):
            found = self._parameters.get(tensor.untyped_storage()._cdata)
            if found is not None and found[1].isdisjoint(self._stack.running):
                self.used_outside.add(found[0])

    def _recomputing(self) -> bool:
        return self.phase == BACKWARD and (bool(self._stack.running) or torch.is_grad_enabled())

    def _ended(self, key: int, number: int, _: object) -> None:
        self._ids.pop(key, None)
        if self._watches.pop(number, None) is not None:
            self.events.append(Free(number, self.phase))


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Any:
    """CUDA takes any floating dtype here, the fake kernel bf16 only."""
    dtype = args[0].dtype
    halves = tree_map_only(torch.Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, args)
    return torch.empty_like(func(*halves, **kwargs), dtype=dtype)


def _layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """CUDA keeps mean and deviation of every row in fp32 at least, the fake kernel in the input's dtype."""
    out, *statistics = func(*args, **kwargs)
    return out, *(s.to(torch.promote_types(s.dtype, torch.float32)) for s in statistics)


def _all_chosen(indices: Any) -> list[Any]:
    """Boolean masks replaced by the index tensors that select every element."""
    out: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
            out += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
        else:
            out.append(index)
    return out
