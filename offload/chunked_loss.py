"""The head and the loss of a causal language model in pieces, so that its logits are never there as a whole.

[Note: the model's own head]
What a model does between its decoder and its logits (a norm, a soft cap, a scale) is its own affair, so its own forward
does it: once with a decoder that hands over what it made and goes no further, then for every piece with a decoder that
returns that piece. Both run on shallow copies; the model and its modules stay as they are. A piece computes its logits
again in backward (``torch.utils.checkpoint``), so they live for a moment only, in forward and in backward.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from offload.errors import OffloadError

NEXT_TOKEN_LOSS = "ForCausalLMLoss"
"""Transformers' name of cross entropy with the next token, in fp32."""
CONVENTIONS = ("base_model", "get_decoder", "get_output_embeddings", "loss_function")
"""What transformers' models have, and others may."""
IGNORED = -100
"""The label that transformers' losses leave out, unless told another."""


class ChunkedCausalLoss(nn.Module):
    """``model`` with its head and loss in ``chunks`` pieces; called as the model is.

    With labels its output is of the model's own class, with a ``loss`` and without logits; without labels it is the
    model's own output. The loss equals the model's within rounding. Raises OffloadError where that can not be.
    """

    def __init__(self, model: nn.Module, chunks: int) -> None:
        super().__init__()
        if (reason := can_chunk(model)) is not None:
            raise OffloadError(f"the loss can not be computed in chunks: {reason}")
        if chunks < 1:
            raise OffloadError(f"chunks is {chunks}; it must be at least 1")
        self.model, self.chunks = model, chunks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return call_in_chunks(self.model, self.chunks, *args, **kwargs)


def in_chunks(model: nn.Module, chunks: int) -> ChunkedCausalLoss | None:
    """What to call in the model's place for a loss in pieces; None where the model does not allow it."""
    return ChunkedCausalLoss(model, chunks) if can_chunk(model) is None else None


def can_chunk(model: Any) -> str | None:
    """Why the model's loss can not be computed in pieces with the same result; None if it can.

    It can where a model is built as transformers' causal language models are: a forward that takes labels and gives its
    logits to ``loss_function``, which is cross entropy with the next token and nothing beside it.
    """
    name = type(model).__name__
    if missing := [part for part in CONVENTIONS if not hasattr(model, part)]:
        return f"{name} is not built as transformers' causal language models are: it has no {missing[0]}"
    if "forward" in vars(model):
        return f"the forward of this {name} was replaced by another"
    forward = inspect.unwrap(type(model).forward)
    own_loss = "labels" in inspect.signature(forward).parameters and "loss_function" in forward.__code__.co_names
    if not own_loss or getattr(model.loss_function, "__name__", "") != NEXT_TOKEN_LOSS:
        return f"the loss of {name} is not transformers' cross entropy with the next token"
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        return f"{name} adds a loss of its routers (output_router_logits), which chunks would lose"
    head, path = model.get_output_embeddings(), _decoder_path(model)
    if head is None or path is None or any(m is head for m in model.get_submodule(path).modules()):
        return f"{name} does not call a decoder and then a head"
    return None


def call_in_chunks(model: nn.Module, chunks: int, /, *args: Any, **kwargs: Any) -> Any:
    """Call a model for which ``can_chunk`` gives no reason, its head and loss in ``chunks`` pieces of its tokens.

    Without labels, or with ``logits_to_keep``, the model is simply called. Raises OffloadError where the model turns
    out to be built otherwise.
    """
    inputs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    labels = inputs.get("labels")
    if labels is None or isinstance(kept := inputs.get("logits_to_keep", 0), torch.Tensor) or kept:
        return model(*args, **kwargs)
    if inputs.get("output_router_logits"):
        raise OffloadError("a loss in chunks would lose the routers' loss: leave output_router_logits out")
    head = _Head(model, {**inputs, "labels": None})
    hidden = head.hidden_states()
    ignored = inputs.get("ignore_index", IGNORED)
    targets = inputs.get("shift_labels")
    if targets is None:
        targets = F.pad(labels, (0, 1), value=ignored)[..., 1:]
    targets = targets.to(hidden.device).flatten()
    if (count := inputs.get("num_items_in_batch")) is None:
        count = (targets != ignored).sum()
    size = -(-len(targets) // chunks)
    pieces = zip(hidden.reshape(1, -1, hidden.shape[-1]).split(size, dim=1), targets.split(size), strict=True)
    losses = [checkpoint(head.loss, *piece, ignored, use_reentrant=False) for piece in pieces]
    loss = torch.stack(losses).sum() / (count.to(hidden.device) if isinstance(count, torch.Tensor) else count)
    return head.output(loss)


class _Reached(Exception):  # noqa: N818 - it is no error
    """Forward has reached the decoder's output."""

    def __init__(self, output: Any) -> None:
        self.output = output


class _Head:
    """What a model does behind its decoder, for one call with these inputs ([Note: the model's own head])."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self._model, self._inputs = model, inputs
        path = _decoder_path(model)
        assert path is not None
        self._path = path
        self._made: Any = None
        """What the decoder returned, its hidden states taken out."""
        self._output: type | None = None
        """The class of the model's output, None for a tuple."""

    def hidden_states(self) -> torch.Tensor:
        """Run the decoder; of shape (batch, tokens, width)."""
        decoder = self._model.get_submodule(self._path)

        def reach(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(decoder(*args, **kwargs))

        try:
            _with_decoder(self._model, self._path, reach).forward(**self._inputs)
        except _Reached as reached:
            return self._take(reached.output)
        raise OffloadError(
            f"the loss can not be computed in chunks: {type(self._model).__name__} does not call {self._path}; "
            "plan without chunks"
        )

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
        """The sum of the losses of some tokens: hidden states (1, tokens, width) and targets (tokens)."""
        # Without tensors: what asks for those of the whole batch behind the decoder is more than a head, and fails.
        inputs = {n: v for n, v in self._inputs.items() if not isinstance(v, torch.Tensor)}
        output = _with_decoder(self._model, self._path, lambda *_, **__: self._put(hidden)).forward(**inputs)
        self._output = type(output) if is_dataclass(output) else None
        logits: torch.Tensor = output[0]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=ignored, reduction="sum")

    def output(self, loss: torch.Tensor) -> Any:
        """The model's output with nothing but a loss."""
        return (loss,) if self._output is None else self._output(loss=loss)

    def _take(self, output: Any) -> torch.Tensor:
        self._made = type(output) if is_dataclass(output) else (output[1:] if isinstance(output, tuple) else None)
        hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return hidden

    def _put(self, hidden: torch.Tensor) -> Any:
        if isinstance(self._made, type):
            return self._made(last_hidden_state=hidden)
        return hidden if self._made is None else (hidden, *self._made)


def _decoder_path(model: Any) -> str | None:
    """Where the part below the head is, which forward calls by its name; None where that is not clear."""
    names = set(inspect.unwrap(type(model).forward).__code__.co_names)
    for decoder in (model.get_decoder(), model.base_model):
        path = next((path for path, module in model.named_modules() if module is decoder), "")
        if path and names.issuperset(path.split(".")):
            return path
    return None


def _with_decoder(module: nn.Module, path: str, forward: Callable[..., Any]) -> nn.Module:
    """A shallow copy of a module in which the submodule at ``path`` runs this forward, and no hooks."""
    copy = _shallow(module)
    name, _, below = path.partition(".")
    child = module.get_submodule(name)
    if below:
        copy._modules[name] = _with_decoder(child, below, forward)
    else:
        decoder = copy._modules[name] = _shallow(child)
        decoder.__dict__ |= {"forward": forward, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    return copy


def _shallow(module: nn.Module) -> nn.Module:
    copy = module.__new__(type(module))
    copy.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return copy
