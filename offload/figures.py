"""What the values of a file that a person may edit must be: pure, standard library only.

Types are asked for too: where a number belongs JSON may hold ``"8"``, ``true`` or ``null``; and NaN passes comparisons.
"""

from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be."""

    holds: Callable[[Any], bool]
    words: str
    """What completes "it must be"."""
    inner: "Rule | None" = None
    """Of each value in an object."""


def whole(least: int, unit: str = "", most: int | None = None) -> Rule:
    """A whole number that is not below ``least``, nor above ``most`` where there is one."""
    return Rule(
        lambda value: (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value >= least
            and (most is None or value <= most)
        ),
        f"a whole number{unit and ' of '}{unit}, at least {least}" + ("" if most is None else f" and at most {most}"),
    )


def number(least: float = 0, most: float = inf) -> Rule:
    """A finite number from ``least`` to ``most``."""
    return Rule(
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and isfinite(value)
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


BYTES = whole(0, "bytes")
POSITIVE = Rule(lambda value: number().holds(value) and value > 0, "a number above 0")
YES_OR_NO = Rule(lambda value: isinstance(value, bool), "true or false")
TEXT = Rule(lambda value: isinstance(value, str), "a string")


def wrong(values: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = "") -> str | None:
    """What is wrong with the first value that is not what it must be, with its name behind ``prefix``."""
    for name, rule in rules.items():
        if name not in values:
            continue
        value = values[name]
        if not rule.holds(value):
            return f"{prefix}{name} is {value!r}; it must be {rule.words}"
        if rule.inner is not None and (said := wrong(value, dict.fromkeys(value, rule.inner), f"{prefix}{name}.")):
            return said
    return None
