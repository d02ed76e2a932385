"""Facts for the rules, from this machine and from the model."""

from dataclasses import replace
from pathlib import Path

import psutil

from memplan.disks import filesystem
from memplan.host import memlock_bytes
from memplan.inputs import saved_profile
from memplan.lint.document import Document
from memplan.lint.view import Facts
from profiler.profile import ModelProfile
from profiler.run import profile_source
from profiler.source import load_source


def facts_about(document: Document, gpus: int | None, model: Path | None) -> Facts:
    """What can be known of a job from here.

    ``model`` is a model file, or a profile.json that was made of one. Of the machine, only what the model's figures
    are held against is asked. Raises the profiler's errors.
    """
    facts = Facts(gpus=gpus, filesystems=_filesystems(document))
    if model is None:
        return facts
    return replace(
        facts,
        parameter_elements=tuple(p.elements for p in _profile(model).parameters),
        memlock_bytes=memlock_bytes(),
        host_bytes=int(psutil.virtual_memory().total),
    )


def _profile(model: Path) -> ModelProfile:
    # Only the parameters are looked at, so the smallest batch does.
    return saved_profile(model) or profile_source(load_source(model), 1, "fp32")


def _filesystems(document: Document) -> dict[str, str | None]:
    """Kind of the file system of each ``nvme_path``; ``None`` where there is no such directory."""
    named = [document.get("zero_optimization", part, "nvme_path") for part in ("offload_param", "offload_optimizer")]
    paths = [path for path in named if isinstance(path, str) and path]
    return {path: filesystem(Path(path)) if Path(path).is_dir() else None for path in paths}
