"""Files of torch.save, read without what they were made with.

[Note: reading what others pickled]
Nothing in such a file is run: torch's reader for weights takes no class but those of tensors and containers, and what
else is named in it becomes an object that only remembers its arguments. Tensors stay on the disk until they are copied.
"""

import zipfile
from pathlib import Path
from typing import Any, Self

import torch

from offload.errors import CheckpointError


class Inert:
    """Stands for an object of a class that is not loaded: it has that one's arguments and attributes."""

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> Self:
        """Whatever the class was made with."""
        made = super().__new__(cls)
        made.arguments = arguments
        return made


def loaded(file: Path) -> dict[str, Any]:
    """The dict that it holds; raises CheckpointError where it is damaged, or something else."""
    try:
        with zipfile.ZipFile(file) as archive:
            if (bad := archive.testzip()) is not None:
                raise CheckpointError(f"{file} is damaged: {bad} in it does not have its checksum")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        inert: list[Any] = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(inert):
            found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file} can not be read: {error.strerror or error}") from error
    except Exception as error:  # torch and pickle have many for a file that is none of theirs
        lines = str(error).splitlines() or [type(error).__name__]
        said = next((line.strip() for line in lines if "GLOBAL" in line), lines[0])  # what torch refuses, if it is that
        raise CheckpointError(f"{file} is damaged, or no file of torch.save: {said}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, not the dict of a checkpoint")
    return found
