"""Whether what was read from a file has the types that its dataclasses name: standard library only.

JSON puts a string, a truth value or nothing where a number belongs, and a dataclass takes it.
"""

from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
hints_of = cache(get_type_hints)


def mistyped(value: Any, hint: Any, name: str) -> str | None:
    """What is wrong with the first value, in ``value`` or inside of it, that is not as its type says."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        found = [mistyped(value, kind, name) for kind in inner]
        return found[0] if all(found) else None
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, hint):
        parts = ((f"{name}.{part}".lstrip("."), vars(value)[part], kind) for part, kind in hints_of(hint).items())
        return next((said for part, held, kind in parts if (said := mistyped(held, kind, part))), None)
    if origin is tuple and isinstance(value, tuple):
        return next((said for i, held in enumerate(value) if (said := mistyped(held, inner[0], f"{name}.{i}"))), None)
    if origin is dict and isinstance(value, Mapping):
        return next((said for key in value if (said := mistyped(value[key], inner[1], f"{name}.{key}"))), None)
    if hint in WORDS:
        return None if _holds(value, hint) else f"{name} is {value!r}; it must be {WORDS[hint]}"
    return f"{name} is {value!r}; it must hold several" if origin in (tuple, dict) else None


def _holds(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
