"""What a person may name as the model: a file that makes it, or a profile that was made of it."""

import re
from pathlib import Path

from profiler.profile import ModelProfile

PROFILE_MARK = re.compile(r'"schema"\s*:\s*"memplan\.profile/')


def saved_profile(path: Path) -> ModelProfile | None:
    """The profile in a file, or ``None`` for another kind of file. Raises ProfileError for one of another version."""
    if path.suffix != ".json" or not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        begins = file.read(200)
    return ModelProfile.load(path) if PROFILE_MARK.search(begins) else None
