"""What was done to the numbers of tensors while a model was built, so that nothing of it is lost on meta.

[Note: stories]
A story belongs to memory, not to a tensor: ``parameter.data``, views and ``detach`` write to the same memory. It says
how the memory was made and every write since, by operation, numbers and shape. A parameter on meta may be made again
by its module's own code if that does the same since all of it was last overwritten. Copies go on with the story of
what they were copied from; what was not overwritten since is drawn for them from the same state of the generators.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Write = tuple[object, ...]
OVERWRITING = {"normal_", "uniform_", "zero_", "fill_", "copy_"}
COPYING = {"clone", "_to_copy", "constant_pad_nd"}


@dataclass(eq=False)
class Story:
    """Of one piece of memory."""

    shape: torch.Size
    made_by: str | None = None
    """The operation that gave it numbers as it was made; None where that gave none, as ``torch.empty``."""
    writes: list[Write] = field(default_factory=list)
    source: "Story | None" = None
    copied: int = 0
    """How many of the writes were to the source, before this was copied from it."""

    @property
    def blank(self) -> bool:
        """Whether nobody gave it numbers so far."""
        return self.made_by is None and not self.writes

    @property
    def overwritten(self) -> int:
        """Which write was the last that left nothing of what was there before."""
        whole = [i for i, (name, *_, shape) in enumerate(self.writes) if name in OVERWRITING and shape == self.shape]
        return whole[-1] if whole else 0

    def tells(self, other: "Story") -> bool:
        """Whether both memories come to the same, but for chance."""
        return bool(other.writes) and self.writes[self.overwritten :] == other.writes[other.overwritten :]

    def origin(self) -> "Story":
        """Where the numbers came from, before any copies."""
        story, index = self, self.overwritten
        while story.source is not None and index < story.copied:
            story = story.source
        return story

    def described(self) -> str:
        """As words in a sentence."""
        if self.made_by and not self.writes:
            return f"made by {self.made_by}"
        return f"changed {len(self.writes)} times ({', '.join(str(write[0]) for write in self.writes)})"


_stories: dict[StorageWeakRef, Story] = {}
"""Weak references keep the address of a memory that is gone from being taken for another's."""


def story_of(tensor: torch.Tensor) -> Story | None:
    """The story of its memory; None where it was made outside of ``Building``, or read from a file."""
    memory = _memory(tensor)
    return None if memory is None else _stories.get(memory)


def begin_story(tensor: torch.Tensor) -> Story:
    """Its memory gets a new one."""
    story = Story(tensor.shape)
    if (memory := _memory(tensor)) is not None:
        _stories[memory] = story
    return story


class Writing(TorchDispatchMode):
    """Writes to memory that has a story are told there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = list(_written(func, args, kwargs))
        if written:
            others = [t for t in _tensors((args, kwargs)) if not any(t is w for w in written)]
            numbers = [a for a in tree_leaves((args, kwargs)) if isinstance(a, int | float)]
            for tensor in written:
                if (story := story_of(tensor)) is not None:
                    if self.is_kept(tensor, others):
                        _stories.pop(_memory(tensor), None)  # type: ignore[arg-type]  # it has a story, so memory
                    else:
                        story.writes.append((_name(func), *numbers, tensor.shape))
        else:
            self.made(func, _tensors((args, kwargs)), _tensors(result))
        return result

    def is_kept(self, tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:  # noqa: ARG002
        """Whether a tensor that was written from others needs no story any more."""
        return False

    def made(self, func: Any, given: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        """See what an operation gives that writes to nothing."""


class Building(Writing):
    """All memory that is made begins a story, but what has numbers of real tensors from elsewhere, as loaded ones."""

    def __enter__(self) -> Any:
        for memory in [m for m in _stories if m.expired()]:
            del _stories[memory]
        return super().__enter__()

    def is_kept(self, tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:  # noqa: D102
        return not tensor.is_meta and _loaded(others)

    def made(self, func: Any, given: list[torch.Tensor], results: list[torch.Tensor]) -> None:  # noqa: D102
        known = {_memory(tensor) for tensor in given}
        name = _name(func)
        for result in results:
            if (memory := _memory(result)) in known or (_loaded(given) and "empty" not in name):
                continue  # a view, or real numbers that are kept
            source = story_of(given[0]) if given and name in COPYING else None
            story = begin_story(result)
            if source is not None and given[0].is_contiguous() and given[0].shape == source.shape == result.shape:
                story.made_by, story.writes = source.made_by, list(source.writes)
                story.source, story.copied = source, len(source.writes)
            elif "empty" not in name:
                story.made_by = name
            known.add(memory)


APART = "it is a copy of a part of a module that is made in another way"


class Repeating:
    """Draws for copies what was drawn for the first that was made of them."""

    def __init__(self, device: torch.device) -> None:
        """Numbers are drawn on ``device`` or the host."""
        self._cuda = [device] if device.type == "cuda" else []
        self._before: dict[tuple[Story, int], tuple[int, list[torch.Tensor]]] = {}
        """By origin and the number of a write: how many memories were written with it, and the generators' states."""
        self._drawn_along: dict[Story, int] = {}
        """What is no copy but was drawn with one, and has to be overwritten: how many writes it had by then."""

    def call(self, act: Callable[[], object], stories: list[tuple[Story, Story]]) -> None:
        """Call what may write to memories with these stories, the one told and the one that is made.

        Raises ValueError where a copy is made together with others than what it is a copy of.
        """
        writes = [len(made.writes) for _, made in stories]
        keys = [(told.origin(), count) for (told, _), count in zip(stories, writes, strict=True)]
        copies = [told is not origin for (told, _), (origin, _) in zip(stories, keys, strict=True)]
        found = {
            id(self._before[k]): self._before[k] for k, c in zip(keys, copies, strict=True) if c and k in self._before
        }
        now = self._states()
        record = next(iter(found.values())) if len(found) == 1 else None
        if record is not None:
            self._set(record[1])
        act()
        if record is not None:
            self._set(now)
        written = [i for i, (_, made) in enumerate(stories) if len(made.writes) > writes[i]]
        unlike = (
            record is None
            or len(written) != record[0]
            or any(copies[i] and keys[i] not in self._before for i in written)
        )
        if found and written and unlike:
            raise ValueError(APART)
        if record is not None:
            self._drawn_along.update({stories[i][1]: len(stories[i][1].writes) for i in written if not copies[i]})
        record = record or (len(written), now)
        self._before.update({keys[i]: record for i in written if keys[i] not in self._before})

    def is_like_a_copy(self, made: Story) -> bool:
        """Whether it has numbers that were drawn for a copy, and is none."""
        return self._drawn_along.get(made) == len(made.writes)

    def _states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)]

    def _set(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._cuda, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)


def sharing(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[str, str] | None:
    """Names of two parameters on meta that have one memory, if there are any."""
    first: dict[Story, str] = {}
    for name, parameter in parameters:
        if parameter.is_meta and (story := story_of(parameter)) is not None and first.setdefault(story, name) != name:
            return first[story], name
    return None


def _loaded(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether real numbers from elsewhere are among them."""
    return any(not tensor.is_meta and story_of(tensor) is None for tensor in tensors)


def _memory(tensor: torch.Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without memory of their own
        return None


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _tensors(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[index] if index < len(args) else kwargs.get(argument.name))
