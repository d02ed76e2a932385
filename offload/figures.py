"""What the values of a file that a person may edit must be: pure, standard library only.

Types are asked for too: where a number belongs JSON may hold ``"8"``, ``true`` or ``null``; and NaN passes comparisons.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from math import inf
from reprlib import Repr
from sys import float_info
from typing import Any, NamedTuple

MOST_WHOLE = (1 << 63) - 1
"""Of a whole number that is believed: arithmetic in 64 bits would overflow, and a float can not hold any size."""
_LONGEST = 120


class Rule(NamedTuple):
    """What a value must be."""

    holds: Callable[[Any], bool]
    words: str
    """What completes "it must be"."""
    inner: "Rule | None" = None
    """Of each value in an object."""


def whole(least: int, unit: str = "", most: int | None = None) -> Rule:
    """A whole number that is not below ``least``, nor above ``most``, which is ``MOST_WHOLE`` if not given."""
    return Rule(
        lambda value: (
            isinstance(value, int)
            and not isinstance(value, bool)
            and least <= value <= (MOST_WHOLE if most is None else most)
        ),
        f"a whole number{unit and ' of '}{unit}, at least {least}" + ("" if most is None else f" and at most {most}"),
    )


def number(least: float = 0, most: float = inf) -> Rule:
    """A finite number from ``least`` to ``most``."""
    return Rule(
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            # Compared, and not asked for isfinite: that makes a float of a whole number, which may be too large for it.
            and -float_info.max <= value <= float_info.max
            and least <= value <= most
        ),
        f"a number, at least {least:g}" if most == inf else f"a number between {least:g} and {most:g}",
    )


def or_none(rule: Rule) -> Rule:
    """The same, or nothing: what is not known."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.words}, or null")


def each(rule: Rule) -> Rule:
    """By name, each as ``rule`` says."""
    return Rule(lambda value: isinstance(value, Mapping), "an object", rule)


def list_of(rule: Rule, words: str) -> Rule:
    """Several, each as ``rule`` says; ``words`` are for many of them. Dataclasses keep a list as a tuple."""
    return Rule(lambda value: isinstance(value, list | tuple) and all(map(rule.holds, value)), f"a list of {words}")


BYTES = whole(0, "bytes")
POSITIVE = Rule(lambda value: number().holds(value) and value > 0, "a number above 0")
YES_OR_NO = Rule(lambda value: isinstance(value, bool), "true or false")
TEXT = Rule(lambda value: isinstance(value, str), "a string")
TEXTS = list_of(TEXT, "strings")


def wrong(values: Mapping[str, Any], rules: Mapping[str, Rule], inside: str = "") -> str | None:
    """What is wrong with the first value that is not what it must be, with its place ``inside`` the file."""
    for name, rule in rules.items():
        if name not in values:
            continue
        value = values[name]
        if not rule.holds(value):
            # What would do if it were smaller is told so; the words need not speak of it everywhere.
            large = isinstance(value, int) and value > MOST_WHOLE and rule.holds(MOST_WHOLE)
            return f"{place(inside, name)} is {shown(value)}; it must be {'below 2^63' if large else rule.words}"
        if rule.inner is not None and (said := wrong(value, dict.fromkeys(value, rule.inner), place(inside, name))):
            return said
    return None


def strange(values: Mapping[str, Any], of: type, inside: str, again: str) -> str | None:
    """What is wrong with the first name that lacks, or that ``of``, a dataclass, has no field for.

    ``again`` says what makes such a file.
    """
    for field in fields(of):
        needed = field.default is MISSING and field.default_factory is MISSING
        if needed and field.name not in values:
            return f"{place(inside, field.name)} is missing; {again}"
    known = {field.name for field in fields(of)}
    unknown = next((name for name in values if name not in known), None)
    return unknown and f"{place(inside, unknown)} is nothing that this version knows; take it out"


def place(inside: str, name: str | int) -> str:
    """Where a value is in its file, like ``placements[3].optimizer``; what is no plain name is quoted."""
    if isinstance(name, str) and name.isidentifier() and len(name) <= _LONGEST:
        return f"{inside}.{name}" if inside else name
    return f"{inside}[{shown(name)}]"


def shown(value: Any) -> str:
    """A value in a few words of one line, whatever is in it: what is nested without end, or long, is cut."""
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


_SHORT = Repr()
_SHORT.maxlevel = 4
_SHORT.maxstring = _SHORT.maxother = _LONGEST
