"""Every key that DeepSpeed knows, from ``keys.json``.

The file lists, by section, each key with its type and its real default: what the code does, which is not always what
its documentation says. A section that is ``checked`` is a class that refuses keys it does not know and turns strings
into numbers; what is in any other is looked up key by key, and the rest is never seen.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from memplan.lint.document import KeyPath

ANY_KEY = "*"
"""Stands for keys that people choose, like the names of metrics."""


@dataclass(frozen=True)
class Key:
    """What one key takes."""

    name: str
    types: tuple[str, ...] = ()
    """bool, int, float, str, list, dict, null, section, any; empty for a key without use."""
    default: Any = None
    required: bool = False
    status: str | None = None
    """deprecated, ignored, refused, removed, or internal (DeepSpeed's own); ``None`` for a key of use."""
    because: str | None = None
    instead: str | None = None
    """The key that does it now."""
    also: str | None = None
    """A second name of the key."""
    same: str | None = None
    """The section that this one is another name of."""
    values: tuple[Any, ...] = ()
    nocase: bool = False
    """Whether capitals in ``values`` make no difference."""
    words: tuple[str, ...] = ()
    """The only strings, where numbers may be too."""
    items: tuple[Any, ...] = ()
    """What elements of a list may be."""
    item_type: str | None = None
    """Of the elements of a list."""
    strict: bool = False
    """Whether true and false are not even taken for 1 and 0."""
    stages: tuple[int, ...] = ()
    """The ZeRO stages in which the key has an effect; empty for all."""
    min: float | None = None
    above: float | None = None
    max: float | None = None
    below: float | None = None


@dataclass(frozen=True)
class Section:
    """The keys of one section."""

    path: KeyPath
    checked: bool
    keys: Mapping[str, Key]
    """By name; a second name has an entry of its own."""


@dataclass(frozen=True)
class Schema:
    """All of ``keys.json``."""

    deepspeed: str
    """The version that it describes."""
    sections: Mapping[KeyPath, Section]
    optimizers: Mapping[str, Mapping[str, Mapping[str, Key]]]
    """Parameters by optimizer, in lower case, and then by which one DeepSpeed makes of it: cpu, gpu, or torch's."""
    schedulers: Mapping[str, Mapping[str, Key]]
    filled: frozenset[KeyPath]
    """Where Hugging Face's integrations replace "auto"."""

    def section(self, path: KeyPath) -> Section | None:
        """The section at a path of a file; ``None`` where anything may be."""
        if path[:1] and (root := self.sections[()].keys.get(path[0])) is not None and root.same:
            path = (root.same, *path[1:])
        if path in self.sections:
            return self.sections[path]
        for known, section in self.sections.items():
            if len(known) == len(path) and all(k in (ANY_KEY, p) for k, p in zip(known, path, strict=True)):
                return section
        return None

    def key(self, path: KeyPath) -> Key:
        """The key at a path that is known to be in the schema."""
        return self.sections[path[:-1]].keys[path[-1]]


@cache
def schema() -> Schema:
    """The keys of the DeepSpeed version that is described here."""
    data = json.loads((files("memplan.lint") / "keys.json").read_text(encoding="utf-8"))
    sections = {}
    for name, section in data["sections"].items():
        path = tuple(name.split(".")) if name else ()
        sections[path] = Section(path, section["checked"], _keys(section["keys"]))
    optimizers = {}
    for name, variants in data["optimizers"].items():
        variants = data["optimizers"][variants["same"]] if "same" in variants else variants
        optimizers[name] = {variant: _keys(keys) for variant, keys in variants.items()}
    return Schema(
        deepspeed=data["deepspeed"],
        sections=sections,
        optimizers=optimizers,
        schedulers={name: _keys(keys) for name, keys in data["schedulers"].items()},
        filled=frozenset(tuple(path.split(".")) for path in data["filled_by_hugging_face"]),
    )


def _keys(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Key]:
    found = {}
    for name, record in records.items():
        fields: dict[str, Any] = {k: v for k, v in record.items() if k != "type"}
        fields |= {k: tuple(v) for k, v in record.items() if k in ("values", "words", "items", "stages")}
        key = Key(name, tuple(record["type"].split("|")) if "type" in record else (), **fields)
        found[name] = key
        if key.also is not None:
            found[key.also] = key
    return found
