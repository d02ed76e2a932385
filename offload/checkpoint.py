"""A directory of checkpoints: each is complete and on the disk, or not there at all.

[Note: how a checkpoint appears]
Its files are written into ``.TAG.partial`` and synced, then the manifest with their sizes and checksums, then the
directory; only then it is renamed to ``TAG``, and after that ``latest``, a file with the newest one's tag, is replaced
by renaming another over it. One of the same tag is renamed to ``.TAG.old`` before, and back by whoever comes next if
that was the end. Whenever the process or the machine stops, what has a tag is whole, and the one before is still there.

``docs/checkpoints.md`` describes the files.
"""

import json
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from crc32c import crc32c

from offload.errors import CheckpointError
from offload.plan import OptimizerKind

SCHEMA = "memplan.checkpoint/2"
MANIFEST, TRAINING, REST, LATEST = "manifest.json", "training.json", "rest.safetensors", "latest"
STEP_TAG = re.compile(r"step-\d+")
"""Tags that are made for a step; only these checkpoints are ever removed."""
RANK_FILE = re.compile(r"rank-\d+(?:-tensor-(\d+))?\.safetensors")
_READ_BYTES = 8 << 20
_SEAL = b'"crc32c": '


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole: every file has the size and the checksum of its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]

    @cached_property
    def training(self) -> dict[str, Any]:
        """What is no tensor: counts, hyperparameters, the scheduler, the caller's own."""
        return json.loads((self.path / TRAINING).read_text())

    @property
    def optimizer(self) -> str:
        """The kind of what updated it; AdamW where it was made before there was a choice."""
        return self.training.get("optimizer", OptimizerKind.ADAMW)

    def rank_files(self) -> list[tuple[Path, int]]:
        """The files with parameters and their state, each with its writer's place on the tensor axis."""
        found = ((name, RANK_FILE.fullmatch(name)) for name in self.manifest["files"])
        return [(self.path / name, int(match[1] or 0)) for name, match in found if match is not None]

    @property
    def tensor_parts(self) -> int:
        """Processes on the tensor axis."""
        return self.manifest.get("tensor_parallel", 1)


def rank_file(rank: int, tensor: int | None = None) -> str:
    """The name of the file that a rank writes, one of several with this place on the tensor axis."""
    return f"rank-{rank}.safetensors" if tensor is None else f"rank-{rank}-tensor-{tensor}.safetensors"


def buffer_file(rank: int, tensor: int | None = None) -> str:
    """The name of the file with that rank's own buffers, which is there where they are not those of the first."""
    return f"buffers-{rank_file(rank, tensor)}"


def step_tag(step: int) -> str:
    """The tag of a checkpoint that nobody gave one."""
    return f"step-{step}"


def check_tag(tag: str) -> str:
    """The tag; raises CheckpointError where it can not name a directory."""
    if not tag or tag.startswith(".") or "/" in tag or tag == LATEST:
        raise CheckpointError(f"{tag!r} can not be the tag of a checkpoint: it names a directory; use letters")
    return tag


def begin(directory: Path, tag: str) -> Path:
    """Make the directory that the files of a new checkpoint go into; what was left by one that broke off is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    _recover(directory)
    for left in directory.glob(".*.partial"):
        shutil.rmtree(left)
    partial = partial_of(directory, tag)
    partial.mkdir()
    return partial


def partial_of(directory: Path, tag: str) -> Path:
    """Where the files of a checkpoint are until it is one."""
    return directory / f".{check_tag(tag)}.partial"


def publish(partial: Path, tag: str, facts: dict[str, Any], files: dict[str, dict[str, int]]) -> Path:
    """Make it a checkpoint: its synced ``files`` {name: {bytes, crc32c}} and ``facts`` go into the manifest.

    Returns its path; it is the latest then. [Note: how a checkpoint appears]
    """
    directory = partial.parent
    target, old = directory / tag, directory / f".{tag}.old"
    body = {"schema": SCHEMA, "tag": tag, "time": time.time(), **facts, "files": files}
    write_durably(partial / MANIFEST, _sealed(body))
    sync_directory(partial)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync_directory(directory)
    replacement = directory / f".{LATEST}"
    write_durably(replacement, f"{tag}\n".encode())
    replacement.rename(directory / LATEST)
    sync_directory(directory)
    _remove(old)
    return target


def prune(directory: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest of those that are named for their step."""
    numbered = [path for tag, path in found(directory).items() if STEP_TAG.fullmatch(tag)]
    for path in numbered[keep:]:
        trash = directory / f".{path.name}.partial"  # a directory that is half removed must not look like a checkpoint
        path.rename(trash)
        _remove(trash)


def found(directory: Path) -> dict[str, Path]:
    """The checkpoints in a directory by their tags, whole or not: what ``latest`` names, then the newest first."""
    paths = {p.parent.name: p.parent for p in directory.glob(f"*/{MANIFEST}") if not p.parent.name.startswith(".")}
    for old in directory.glob(".*.old"):  # [Note: how a checkpoint appears]
        paths.setdefault(old.name[1:].removesuffix(".old"), old)
    if (latest := _latest(directory)) is not None:
        paths.setdefault(latest, directory / latest)

    def age(item: tuple[str, Path]) -> tuple[bool, float]:
        with suppress(CheckpointError):
            return item[0] == latest, _manifest(item[1])["time"]
        return item[0] == latest, 0.0

    return dict(sorted(paths.items(), key=age, reverse=True))


def opened(directory: Path, tag: str | None = None) -> Checkpoint:
    """The checkpoint of this tag, or the latest; raises CheckpointError where it is not there or not whole."""
    paths = _some(directory)
    chosen = next(iter(paths)) if tag is None else tag
    try:
        return checked(paths.get(chosen, directory / chosen))
    except CheckpointError as error:
        others = ", ".join(name for name in paths if name != chosen)
        raise CheckpointError(
            f"{error}; others are there, by their tags: {others}" if others else str(error)
        ) from error


def newest_whole(directory: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each that is newer and damaged.

    Raises CheckpointError where there is none.
    """
    damaged: list[str] = []
    for path in _some(directory).values():
        try:
            return checked(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    raise CheckpointError(f"no checkpoint in {directory} is whole: {'; '.join(damaged)}")


def _some(directory: Path) -> dict[str, Path]:
    if not (paths := found(directory)):
        raise CheckpointError(f"there is no checkpoint in {directory}")
    return paths


def checked(path: Path) -> Checkpoint:
    """The checkpoint in this directory; every byte is read. Raises CheckpointError where one is not as it was."""
    manifest = _manifest(path)
    for name, written in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if (size := file.stat().st_size) != written["bytes"]:
            raise CheckpointError(f"{file} is damaged: it has {size} bytes, {written['bytes']} were written")
        if (found := file_crc32c(file)) != written["crc32c"]:
            raise CheckpointError(
                f"{file} is damaged: its checksum is {found:08x}, that of what was written {written['crc32c']:08x}"
            )
    return Checkpoint(path, manifest)


def write_durably(path: Path, data: bytes) -> dict[str, int]:
    """Write a whole file and sync it; returns its size and checksum."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "crc32c": crc32c(data)}


def as_json(value: Any) -> bytes:
    """As JSON; raises CheckpointError where JSON can not hold it."""
    try:
        return json.dumps(value, indent=1).encode() + b"\n"
    except TypeError as error:
        raise CheckpointError(f"the scheduler's or the caller's state can not be written as JSON: {error}") from error


def sync_directory(path: Path) -> None:
    """Make what was created and renamed in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_crc32c(path: Path) -> int:
    """The checksum of a file; raises CheckpointError where it can not be read."""
    value = 0
    try:
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                value = crc32c(data, value)
    except OSError as error:
        raise CheckpointError(f"{path} can not be read: {error}") from error
    return value


def _sealed(body: dict[str, Any]) -> bytes:
    """As JSON whose last key is the checksum of all bytes before that key."""
    text = json.dumps(body, indent=1).encode().removesuffix(b"\n}") + b",\n "
    return text + _SEAL + f'"{crc32c(text):08x}"\n}}\n'.encode()


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} is not a checkpoint: {error}") from error
    text, seal, rest = data.rpartition(_SEAL)
    if not seal or rest != f'"{crc32c(text):08x}"\n}}\n'.encode():
        raise CheckpointError(f"{file} is damaged: it does not have its own checksum, or was changed by hand")
    manifest = json.loads(data)
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} has schema {manifest.get('schema')!r}, expected {SCHEMA!r}")
    return manifest


def _latest(directory: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        return (directory / LATEST).read_text().strip() or None
    return None


def _recover(directory: Path) -> None:
    """[Note: how a checkpoint appears]: put back what was renamed before another could take its place."""
    for old in directory.glob(".*.old"):
        target = directory / old.name[1:].removesuffix(".old")
        if target.exists():
            _remove(old)
        else:
            old.rename(target)


def _remove(path: Path) -> None:
    with suppress(OSError):  # what is left takes space, and the next one tries again
        shutil.rmtree(path)
