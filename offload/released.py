"""What an engine no longer has when it is closed, and what whoever asks for it is told."""

from collections.abc import Callable
from typing import Never, TypeVar

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from offload.errors import OffloadError
from offload.recovery import Recovery

HOLDERS = (
    *("states", "arena", "meter", "_rings", "_mover", "_gradients", "_updater", "_streamed", "_prefetcher", "_inputs"),
    *("_guard", "_watch", "_passes", "_steps", "early_updates", "recovery"),
)
"""What has buffers in it: a loss that somebody keeps leads through its graph to the engine, but no longer to these."""


Found = TypeVar("Found")
_OWNED = WeakIdKeyDictionary()
"""Parameters that an engine has now."""


def own(model: nn.Module) -> Callable[[], None]:
    """From now on an engine has the model's parameters; gives what ends that."""
    parameters = list(model.parameters())
    for parameter in parameters:
        _OWNED[parameter] = True

    def undo() -> None:
        for parameter in parameters:
            _OWNED.pop(parameter, None)

    return undo


def lost_parameter(model: nn.Module) -> str | None:
    """The first parameter whose numbers went with an engine that is closed, so that only their shape is left.

    Raises OffloadError where an engine has parameters of the model now.
    """
    lost = None
    for name, parameter in model.named_parameters():
        if parameter in _OWNED:
            raise OffloadError(f"another engine has parameter {name} now: close that one first")
        away = not parameter.is_meta and parameter.numel() > 1 and not any(parameter.stride())
        lost = name if lost is None and away else lost
    return lost


class Releasing:
    """Something that gives its holders back, and is not to be used any more then."""

    recovery: Recovery
    lost: str | None = None
    """A parameter whose numbers went with an engine of before, until others are loaded."""

    def check_numbers(self) -> None:
        """Raise OffloadError while numbers are lost, or of no step."""
        self.recovery.check()
        if self.lost is not None:
            raise OffloadError(
                f"the numbers of {self.lost} went with an engine that is closed: load_checkpoint() or "
                "load_state_dict() first, or build the model anew"
            )

    def restored(self, found: Found) -> Found:
        """There are numbers again; gives back what whoever loaded them found."""
        self.lost = None
        return found

    def __getattr__(self, name: str) -> Never:
        """Of what is not there. Raises OffloadError for what was given back."""
        if name in HOLDERS:
            raise OffloadError(
                "this engine is closed, and the model's numbers went with it: save a checkpoint or take state_dict() "
                "before, and make another engine of a model that is built anew"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def release(self) -> None:
        """Let go of the holders."""
        for name in HOLDERS:
            vars(self).pop(name, None)
