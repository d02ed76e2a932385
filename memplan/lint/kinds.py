"""Types of values as a configuration has them, and what a value of the wrong type can only mean."""

import re
from collections.abc import Callable
from typing import Any

WHOLE = re.compile(r"\s*[+-]?\d+(_\d+)*(\.0*)?\s*", re.ASCII)
TRUE_WORDS = ("true", "t", "yes", "y", "on", "1")
FALSE_WORDS = ("false", "f", "no", "n", "off", "0")
KINDS: dict[str, Callable[[Any], bool]] = {
    "any": lambda _: True,
    "null": lambda value: value is None,
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: is_number(value) and (isinstance(value, int) or value.is_integer()),
    "float": lambda value: is_number(value),
    "str": lambda value: isinstance(value, str),
    "list": lambda value: isinstance(value, list),
    "dict": lambda value: isinstance(value, dict),
    "section": lambda value: isinstance(value, dict),
}
KIND_NAMES = {
    "null": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "list": "a list",
    "dict": "a section in braces",
    "section": "a section in braces",
}


def is_number(value: Any) -> bool:
    """Whether a value is a number, true and false left out."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def meant_by(types: tuple[str, ...], value: Any) -> Any:
    """The value of the right type that this one can only mean; ``None`` if there is none."""
    if "bool" in types:
        word = value.lower() if isinstance(value, str) else str(int(value)) if value in (0, 1) else ""
        if word in TRUE_WORDS or word in FALSE_WORDS:
            return word in TRUE_WORDS
    if isinstance(value, bool) and {"int", "float"} & set(types):
        return int(value)
    if isinstance(value, str) and {"int", "float"} & set(types):
        try:
            number = float(value)
        except ValueError:
            return None
        if number.is_integer():
            return int(number)
        return number if "float" in types else None
    return None


def is_read(types: tuple[str, ...], value: Any) -> bool:
    """Whether a section that is checked reads this value as what it means; whole numbers in digits only."""
    if meant_by(types, value) is None:
        return False
    return not isinstance(value, str) or bool({"bool", "float"} & set(types)) or WHOLE.fullmatch(value) is not None


def shown(value: Any) -> str:
    """A value as it stands in the file."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, dict):
        return "a section in braces"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
