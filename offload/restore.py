"""A checkpoint back into an engine, of whatever plan: parameters are put together from the files of all ranks."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open

from offload.buffers import BUFFER, put
from offload.checkpoint import REST, Checkpoint, buffer_file, rank_file
from offload.contents import Contents
from offload.dtensors import Share
from offload.errors import CheckpointError
from offload.moments import dequantized
from offload.plain import restored
from offload.plan import MOMENT_BLOCK_ELEMENTS
from offload.randomness import restore_random_states
from offload.ranks import Ranks
from offload.snapshot import CODES, SCALES, WEIGHT
from offload.unit import Field

if TYPE_CHECKING:
    from offload.engine import Engine


RANDOM = "random"
"""What keys of a rank's file begin with that are of no parameter."""


class _Span(NamedTuple):
    start: int
    stop: int
    key: str
    file: Any
    """A ``safe_open`` of the file."""


class CheckpointTensors:
    """The tensors of a checkpoint, whichever rank wrote which elements of them. Raises CheckpointError.

    Parameters that a tensor axis divided are whole again, or divided in another way.
    """

    def __init__(self, found: Checkpoint) -> None:
        self.path = found.path
        self._opened = ExitStack()
        self._spans: dict[tuple[str, str, int], list[_Span]] = {}
        """By kind, name, and place on the tensor axis."""
        self._tensor_parts = found.tensor_parts
        self._files = found.manifest["files"]
        self._places = found.manifest.get("world_size"), found.tensor_parts
        self._shares = {
            name: Share(facts["divided_dim"], found.tensor_parts, 0, torch.Size(facts["shape"]))
            for name, facts in found.training["parameters"].items()
            if "divided_dim" in facts
        }
        self._joined: tuple[tuple[str, str], torch.Tensor] | None = None
        """The one that was put together last: it may be asked for piece by piece."""
        try:
            for file, position in found.rank_files():
                self._add(self._open(file), position)
            self._rest = self._open(found.path / REST)
        except BaseException:
            self._opened.close()
            raise
        for spans in self._spans.values():
            spans.sort(key=lambda span: span.start)

    def read_into(self, target: torch.Tensor, kind: str, name: str, start: int = 0, share: Share | None = None) -> None:
        """Fill a flat tensor with elements of a parameter's ``kind`` (``WEIGHT`` or a moment), from ``start`` on.

        They are those of the whole parameter, or of a share of it.
        """
        saved = self._shares.get(name)
        if saved is None and share is None:
            self._read(target, kind, name, start, 0)
        elif saved is not None and share is not None and saved.at(share.position) == share:
            self._read(target, kind, name, start, share.position)
        else:
            whole = self._whole(kind, name, saved, share)
            own = whole if share is None else share.own(whole)
            target.copy_(own.reshape(-1)[start : start + target.numel()])

    def _whole(self, kind: str, name: str, saved: Share | None, share: Share | None) -> torch.Tensor:
        """A parameter in its shape, put together from what the tensor axis divided as ``saved`` says."""
        if self._joined is not None and self._joined[0] == (kind, name):
            return self._joined[1]
        self._joined = None
        if saved is None:
            assert share is not None
            whole = torch.empty(share.whole)
            self._read(whole.view(-1), kind, name, 0, 0)
        else:
            whole = torch.empty(saved.whole)
            for position in range(saved.parts):
                part = torch.empty(saved.at(position).shape)
                self._read(part.view(-1), kind, name, 0, position)
                saved.at(position).own(whole).copy_(part)
        self._joined = (kind, name), whole
        return whole

    def _read(self, target: torch.Tensor, kind: str, name: str, start: int, position: int) -> None:
        """What the ranks of this place on the tensor axis wrote."""
        done, stop = start, start + target.numel()
        for span in self._spans.get((kind, name, position), ()):
            a, b = max(done, span.start), min(stop, span.stop)
            if a < b and span.start <= done:
                target[a - start : b - start].copy_(self._slice(span, a, b))
                done = b
        if done < stop:
            raise CheckpointError(
                f"{self.path} lacks elements of {kind} of {name} from {done} on; "
                "it was made of another model, or with that parameter frozen"
            )

    def names(self) -> set[str]:
        """Of the parameters."""
        return {name for kind, name, _ in self._spans if kind == WEIGHT}

    def rest(self, ranks: Ranks | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """What no unit owns: ``buffer/NAME`` and ``parameter/NAME``.

        Buffers are those of the first rank, or this one's own where as many ranks saved it as load it: of others none
        is this one. [Note: buffers of several ranks] in ``offload/buffers.py``.
        """
        own = self._own_buffers(ranks) if ranks is not None else None
        for key in self._rest.keys():  # noqa: SIM118 - it is no dict
            if own is None or not key.startswith(BUFFER):
                yield key, self._rest.get_tensor(key)
        if own is not None:
            for key in own.keys():  # noqa: SIM118
                yield key, own.get_tensor(key)

    def _own_buffers(self, ranks: Ranks) -> Any:
        """The file of a rank's own ones; None where the first rank's are its."""
        name = buffer_file(ranks.rank, ranks.tensor_position if self._tensor_parts > 1 else None)
        if (ranks.world, ranks.tensor_parts) != self._places or name not in self._files:
            return None
        return self._open(self.path / name)

    def random_states(self, rank: int, tensor: int) -> dict[str, torch.Tensor]:
        """Those of a rank's generators by their name; empty where there was no such rank."""
        file = self.path / rank_file(rank, tensor if self._tensor_parts > 1 else None)
        if not file.exists():
            return {}
        opened = self._open(file)
        keys = [key for key in opened.keys() if key.startswith(f"{RANDOM}/")]  # noqa: SIM118
        return {key.removeprefix(f"{RANDOM}/"): opened.get_tensor(key) for key in keys}

    def _slice(self, span: _Span, start: int, stop: int) -> torch.Tensor:
        kind, rest = span.key.split("/", 1)
        if kind.endswith(CODES):
            first = (start - span.start) // MOMENT_BLOCK_ELEMENTS
            before = span.start + first * MOMENT_BLOCK_ELEMENTS
            codes = span.file.get_slice(span.key)[before - span.start : stop - span.start]
            scales = span.file.get_tensor(f"{kind.removesuffix(CODES)}{SCALES}/{rest}")
            return dequantized(codes, scales[first : -(-(stop - span.start) // MOMENT_BLOCK_ELEMENTS)])[
                start - before :
            ]
        if (start, stop) == (span.start, span.stop):
            return span.file.get_tensor(span.key)
        return span.file.get_slice(span.key)[start - span.start : stop - span.start]

    def _open(self, path: Path) -> Any:
        try:
            return self._opened.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} can not be read: {error}") from error

    def _add(self, file: Any, position: int) -> None:
        for key in file.keys():  # noqa: SIM118
            kind, start, *name = key.split("/", 2)
            if kind != RANDOM and not kind.endswith(SCALES):
                elements = file.get_slice(key).get_shape()[0]
                span = _Span(int(start), int(start) + elements, key, file)
                self._spans.setdefault((kind.removesuffix(CODES), name[0], position), []).append(span)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._opened.close()


def load(engine: "Engine", found: Checkpoint) -> Any:
    """Restore the engine, its scheduler and the random states; returns the ``client_state``.

    Raises CheckpointError, before anything is changed, where it is of another model or optimizer.
    """
    training = found.training
    with CheckpointTensors(found) as tensors:
        ranks = next((state.ranks for state in engine.states), None)
        _check_fits(engine, found, tensors, ranks)
        with engine.recovery.loading(engine.finish):
            random_states = _load(engine, found, tensors, ranks)
    restore_random_states(random_states, engine.device)
    return restored(training["client_state"])


def _load(
    engine: "Engine", found: Checkpoint, tensors: CheckpointTensors, ranks: Ranks | None
) -> dict[str, torch.Tensor]:
    """Put everything into the engine but the random states, which it gives."""
    training = found.training
    engine.zero_grad()
    for state in engine.states:
        whole = Contents.zeros(state, engine.plan.optimizer)
        for field in state.unit.fields:
            _read(field, whole, tensors)
        engine.replace(state, whole)
    parts = {f"{BUFFER}{name}": b for name, b in engine.model.named_buffers()}
    parts |= {f"parameter/{name}": p for name, p in engine.model.named_parameters()}
    for key, tensor in tensors.rest(ranks):
        put(parts[key], tensor)
    place = (ranks.rank, ranks.tensor_position) if ranks is not None else (0, 0)
    engine.global_step = found.step
    engine.hyperparameters.steps = dict(training["parameter_steps"])
    if engine.loss_scale is not None and training.get("loss_scale") is not None:
        engine.loss_scale.load_state_dict(training["loss_scale"])
    for group, saved in zip(engine.optimizer.param_groups, training["groups"], strict=True):
        group.update(restored(saved))
    if engine.lr_scheduler is not None and training["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(restored(training["scheduler"]))
    return tensors.random_states(*place)


def _read(field: Field, whole: Contents, tensors: CheckpointTensors) -> None:
    span = slice(field.start, field.stop)
    tensors.read_into(whole.weights[span], WEIGHT, field.name, share=field.share)
    if field.trainable:
        for kind, moments in whole.moments.items():
            tensors.read_into(moments[span], kind, field.name, share=field.share)


def _check_fits(engine: "Engine", found: Checkpoint, tensors: CheckpointTensors, ranks: Ranks | None) -> None:
    """Raise CheckpointError unless everything that will be read is there in the shape it must have."""
    if found.optimizer != engine.plan.optimizer:
        raise CheckpointError(
            f"{found.path} was trained with {found.optimizer}, and the plan is for {engine.plan.optimizer}: the state "
            "of one is none for the other; go on with the optimizer that it was begun with"
        )
    saved = found.training["parameters"]
    fields = {f.name: f for state in engine.states for f in state.unit.fields}
    if differing := saved.keys() ^ fields.keys():
        raise CheckpointError(f"{found.path} is of another model: parameter {min(differing)} is in only one of the two")
    for name, field in fields.items():
        if saved[name]["shape"] != list(field.whole_shape):
            raise CheckpointError(
                f"{found.path} is of another model: {name} is {saved[name]['shape']}, not {list(field.whole_shape)}"
            )
        if field.trainable and not saved[name]["trainable"]:
            raise CheckpointError(f"{found.path} was made with {name} frozen, so it has no optimizer state of it")
    shapes = {key: list(tensor.shape) for key, tensor in tensors.rest(ranks)}
    here = {f"{BUFFER}{name}": list(b.shape) for name, b in engine.model.named_buffers()}
    # Buffers that no state_dict has are the model's own to make; checkpoints that were imported lack them.
    kept = engine.model.state_dict(keep_vars=True).keys()
    here = {key: shape for key, shape in here.items() if key in shapes or key.removeprefix(BUFFER) in kept}
    here |= {f"parameter/{name}": list(p.shape) for name, p in engine.model.named_parameters() if name not in fields}
    for key in sorted(here.keys() | shapes.keys()):
        if here.get(key) != shapes.get(key):
            raise CheckpointError(
                f"{found.path} is of another model: {key.replace('/', ' ')} is {shapes.get(key, 'not in it')}, "
                f"and {here.get(key, 'not')} in the model"
            )
    groups, groups_here = len(found.training["groups"]), len(engine.optimizer.param_groups)
    if groups != groups_here:
        raise CheckpointError(f"{found.path} was made with {groups} parameter groups, the optimizer has {groups_here}")
    names_here = engine.hyperparameters.names_of_groups()
    for i, (names, own) in enumerate(zip(found.training.get("group_parameters", names_here), names_here, strict=True)):
        if differing := set(names) ^ set(own):
            raise CheckpointError(
                f"{found.path} was made with other parameter groups: {min(differing)} is in group {i} of only one of "
                "the two; give the optimizer its groups in the order of then"
            )
