"""From JSON to the dataclass that it was made of, each value of the type that is named there: standard library only.

JSON puts a string, a truth value or nothing where a number belongs, and a dataclass takes it. No number of these files
is below 0.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from reprlib import Repr
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from profiler.errors import ProfilerError

MOST_WHOLE = (1 << 63) - 1
"""Beyond it arithmetic in 64 bits would overflow."""
WORDS = {
    int: "a whole number, at least 0",
    float: "a number, at least 0",
    str: "a string",
    bool: "true or false",
}
hints_of = cache(get_type_hints)


def parsed(path: Path) -> Any:
    """The JSON in a file; raises OSError, and ProfilerError for what is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ProfilerError("it is nested too deeply") from error
    except ValueError as error:
        raise ProfilerError(str(error)) from error


def without_schema(data: Any, schema: str, *derived: str) -> dict[str, Any]:
    """What a file holds beside its schema and what is ``derived``; raises ProfilerError where the schema is another."""
    if not isinstance(data, Mapping):
        raise ProfilerError("it holds no object")
    if (found := data.get("schema")) != schema:
        raise ProfilerError(f"its schema is {_shown(found)}, and must be {schema!r}")
    return {name: value for name, value in data.items() if name not in ("schema", *derived)}


def typed(kind: Any, data: Any, at: str = "") -> Any:
    """The dataclass ``kind`` of what a file holds ``at`` a place; raises ProfilerError, naming the place."""
    if not isinstance(data, Mapping):
        raise ProfilerError(_other(at, data, "an object"))
    hints = hints_of(kind)
    # What does not make two of them differ is no data, and never in a file.
    known = {field.name: field for field in fields(kind) if field.compare}
    if unknown := [name for name in data if name not in known]:
        raise ProfilerError(f"{place(at, unknown[0])} is nothing that this version knows")
    if missing := [name for name, field in known.items() if name not in data and _written(field, hints[name])]:
        raise ProfilerError(f"{place(at, missing[0])} is missing")
    return kind(**{name: _value(hints[name], value, place(at, name)) for name, value in data.items()})


def _written(field: Field[Any], hint: Any) -> bool:
    """Whether it is in every file: a list is there even where it is empty, so one that lacks was lost."""
    return get_origin(hint) is tuple or (field.default is MISSING and field.default_factory is MISSING)


def _value(hint: Any, value: Any, at: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:  # of something and None
        return None if value is None else _value(inner[0], value, at)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ProfilerError(_other(at, value, "a list"))
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise ProfilerError(f"{at} has {len(value)} entries; it must have {len(kinds)}")
        return tuple(_value(kinds[i], entry, place(at, i)) for i, entry in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ProfilerError(_other(at, value, "an object"))
        return {name: _value(inner[1], entry, place(at, name)) for name, entry in value.items()}
    if is_dataclass(hint):
        return typed(hint, value, at)
    if not _holds(value, hint):
        large = isinstance(value, int) and value > MOST_WHOLE and hint in (int, float)
        raise ProfilerError(_other(at, value, "below 2^63" if large else WORDS[hint]))
    return value


def _holds(value: Any, kind: type) -> bool:
    if kind is not bool and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and 0 <= value <= MOST_WHOLE
    if kind is float:
        whole = isinstance(value, int) and 0 <= value <= MOST_WHOLE
        return whole or (isinstance(value, float) and isfinite(value) and value >= 0)
    return isinstance(value, kind)


def place(inside: str, name: str | int) -> str:
    """Where a value is in its file, like ``activations[1].modules``; what is no plain name is quoted."""
    if isinstance(name, str) and name.isidentifier() and len(name) <= _LONGEST:
        return f"{inside}.{name}" if inside else name
    return f"{inside}[{_shown(name)}]"


def _other(at: str, value: Any, words: str) -> str:
    return f"{at} is {_shown(value)}; it must be {words}"


def _shown(value: Any) -> str:
    """A value in a few words of one line, whatever is in it: what is nested without end, or long, is cut."""
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


_LONGEST = 120
_SHORT = Repr()
_SHORT.maxlevel = 4
_SHORT.maxstring = _SHORT.maxother = _LONGEST
