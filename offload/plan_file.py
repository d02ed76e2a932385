"""A plan as it is in its file: the objects, lists and names that a dataclass has, and no others.

Standard library only. What numbers and texts must be is in ``offload.plan_rules``, for plans that no file held too.
"""

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from offload.errors import PlanError
from offload.figures import place, shown, strange

AGAIN = "make the plan again with memplan plan"
hints_of = cache(get_type_hints)


def parsed(path: Path) -> Any:
    """The JSON in a file; raises PlanError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(f"{path} does not exist; memplan plan writes one") from error
    except OSError as error:
        raise PlanError(f"{path} can not be read: {error.strerror}") from error
    except RecursionError as error:
        raise PlanError(f"{path} is not a plan: it is nested too deeply; {AGAIN}") from error
    except ValueError as error:
        raise PlanError(f"{path} is not a plan: it is no JSON that can be read ({error}); {AGAIN}") from error


def without_schema(data: Any, schema: str) -> dict[str, Any]:
    """What a plan holds beside its schema; raises PlanError where that is another."""
    if not isinstance(data, Mapping):
        raise PlanError(f"it is not a plan, for it holds {shown(data)} and no object; {AGAIN}")
    if (found := data.get("schema")) != schema:
        said = "it names no schema" if found is None else f"its schema is {shown(found)}"
        raise PlanError(f"it is not a plan that this version can read: {said}, and must be {schema!r}; {AGAIN}")
    return {name: value for name, value in data.items() if name != "schema"}


def built(kind: Any, data: Any, at: str = "") -> Any:
    """The dataclass ``kind`` of what JSON holds ``at`` a place in the file; raises PlanError, naming the place."""
    if not isinstance(data, Mapping):
        raise PlanError(_other(at, data, "an object"))
    if said := strange(data, kind, at, AGAIN):
        raise PlanError(said)
    hints = hints_of(kind)
    return kind(**{name: _value(hints[name], value, place(at, name)) for name, value in data.items()})


def _value(hint: Any, value: Any, at: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:  # of something and None
        return None if value is None else _value(inner[0], value, at)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise PlanError(_other(at, value, "a list"))
        return tuple(_value(inner[0], entry, place(at, i)) for i, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise PlanError(_other(at, value, "an object"))
        return {name: _value(inner[1], entry, place(at, name)) for name, entry in value.items()}
    if is_dataclass(hint):
        return built(hint, value, at)
    return _member(hint, value, at) if issubclass(hint, StrEnum) else value


def _member(kind: type[StrEnum], value: Any, at: str) -> StrEnum:
    if not isinstance(value, str) or value not in list(kind):
        *others, last = map(repr, map(str, kind))
        raise PlanError(_other(at, value, f"{', '.join(others)} or {last}"))
    return kind(value)


def _other(at: str, value: Any, words: str) -> str:
    return f"{at} is {shown(value)}; it must be {words}"
