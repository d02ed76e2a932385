"""JSON with one place that somebody, or something, spoiled, for the readers of such files."""

import json
from collections.abc import Iterator
from functools import cache, reduce
from operator import getitem
from typing import Any

from hypothesis import strategies as st

Place = tuple[str | int, ...]
_DEEP = "what is nested deeply goes here"
DEPTHS = (600, 100_000)
"""Of which JSON's reader takes the first."""
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    7,
    0.5,
    -0.5,
    1 << 62,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "gpu",
    "hbm\n\u2028",
    [],
    [None],
    [[1]],
    {},
    {"a": 1},
    {"not a\nname": {"a": []}},
)
NUMBERS = (0, 1, 7, 0.5, 1e-9, 1 << 30, 1 << 62)
STRANGE_KEY = "not a\nname \ud800"


def places_in(data: Any, at: Place = ()) -> Iterator[Place]:
    """Of everything in it, itself first."""
    yield at
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, value in entries:
        yield from places_in(value, (*at, name))


def spoiled(text: str, place: Place, how: str, value: Any = None) -> str:
    """The JSON with the value at ``place`` replaced, removed, beside another, or nested."""
    data = {"": json.loads(text)}  # so that the whole has a place in something too
    *before, last = ("", *place)
    part: Any = data
    for name in before:
        part = part[name]
    if how == "remove":
        del part[last]
    elif how == "add":
        part[last] = {**part[last], STRANGE_KEY: value} if isinstance(part[last], dict) else [part[last], value]
    elif how == "nest":
        part[last] = _DEEP
    else:
        part[last] = value
    if "" not in data:
        return ""
    nested = "[" * value + "]" * value if how == "nest" else ""
    return json.dumps(data[""], indent=1).replace(json.dumps(_DEEP), nested)


@cache
def _places(text: str) -> tuple[Place, ...]:
    return tuple(places_in(json.loads(text)))


@cache
def _numbers(text: str) -> tuple[Place, ...]:
    data = json.loads(text)
    return tuple(place for place in _places(text) if type(reduce(getitem, place, data)) in (int, float))


def spoiled_texts(text: str) -> st.SearchStrategy[str]:
    """JSON, each time with another place spoiled in another way."""
    values, depths = st.sampled_from(VALUES), st.sampled_from(DEPTHS)
    ways = st.one_of(
        st.tuples(st.just("replace"), values),
        st.tuples(st.just("remove"), st.none()),
        st.tuples(st.just("add"), values),
        st.tuples(st.just("nest"), depths),
    )
    return st.builds(lambda place, way: spoiled(text, place, *way), st.sampled_from(_places(text)), ways)


def other_numbers(text: str) -> st.SearchStrategy[str]:
    """JSON with another number in the place of one: many can be read, and say what can not be."""
    places, values = st.sampled_from(_numbers(text)), st.sampled_from(NUMBERS)
    return st.builds(lambda place, value: spoiled(text, place, "replace", value), places, values)
