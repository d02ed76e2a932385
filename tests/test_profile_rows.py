"""Layers folded into rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.rows import SUMS, fold
from profiler.profile import LayerProfile
from tests.shown_profiles import shown_profile


def labels(root, depth=None):
    return [f"{'.' * level}{row.label}{row.times}" for level, row in root.walk(depth)]


def layer(path, kind, order=0, parameters=0, saved=0):
    return LayerProfile(path, kind, order, 1, parameters, 4 * parameters, 0, 0, saved)


def test_equal_blocks_are_one_row_in_the_place_of_the_list_that_holds_them():
    root = fold(shown_profile(blocks=4).layers)
    assert labels(root) == ["(model)", ".layers.0-3 x 4", "..up x 4", "..norm x 4", ".head"]
    assert root.below[0].total("parameters") == 800_000
    assert root.below[0].transient_bytes == 5 << 20, "they run one after the other"


def test_alternating_blocks_are_a_row_a_kind():
    root = fold(shown_profile(blocks=8, alternating=True).layers)
    assert labels(root, 1) == ["(model)", ".layers.0, 2 … 6 x 4", ".layers.1, 3 … 7 x 4", ".head"]


def test_siblings_with_names_are_only_taken_together_when_they_follow_each_other():
    names = {"q": 5, "k": 3, "v": 3, "o": 5}
    layers = [layer("", "Net", 0, 16), *(layer(n, "Linear", i + 1, p) for i, (n, p) in enumerate(names.items()))]
    assert labels(fold(layers)) == ["(model)", ".q", ".k, v x 2", ".o"]


def test_a_layer_that_costs_nothing_has_no_row():
    layers = [layer("", "Net", 0, 3), layer("drop", "Dropout", 1), layer("head", "Linear", 2, 3)]
    assert labels(fold(layers)) == ["(model)", ".head"]


@pytest.mark.parametrize(("depth", "rows"), [(0, 1), (1, 3), (2, 5), (9, 5)])
def test_rows_end_at_the_depth_that_was_asked_for(depth, rows):
    assert len(labels(fold(shown_profile().layers), depth)) == rows


def test_the_depth_that_fits_is_the_deepest_with_so_many_rows():
    root = fold(shown_profile().layers)
    assert [root.fitting_depth(rows) for rows in (1, 3, 4, 5, 99)] == [1, 1, 1, 2, 2]


@st.composite
def trees(draw):
    """Layers of any shape whose figures add up."""
    names = st.sampled_from(["0", "1", "2", "up", "down"])
    paths = draw(st.lists(st.lists(names, min_size=1, max_size=4).map(".".join), max_size=30))
    known = dict.fromkeys(
        p for path in paths for p in (path[: i or None] for i, c in enumerate(path + ".") if c == ".")
    )
    known = {"": None, **known}
    own = {path: draw(st.integers(0, 2)) for path in known}
    order = {path: draw(st.sampled_from([None, 1])) for path in known}

    def total(path):
        return sum(own[p] for p in known if p == path or p.startswith(path + ".") or not path)

    # In the order of named_modules: a parent before its children.
    return [layer(p, "Kind", order[p], total(p), total(p)) for p in sorted(known)]


@given(trees())
def test_rows_own_figures_add_up_to_the_models(layers):
    root = fold(layers)
    for figure in SUMS:
        assert sum(row.own(figure) for _, row in root.walk()) == getattr(layers[0], figure)
    assert all(row.own(figure) >= 0 for _, row in root.walk() for figure in SUMS)
