"""Who updates what of the host's state, and what comes to the device ahead of it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from offload.allotment import Allotment, Reach, allot
from offload.residency import UPDATE_RING

units_of = st.lists(st.integers(0, 50).map(lambda n: 64 * n), min_size=1, max_size=8).map(
    lambda sizes: [Reach("" if i == 0 else f"b{i}", size) for i, size in enumerate(sizes)]
)
shares, pieces, slots = st.floats(0, 1), st.integers(1, 20).map(lambda n: 64 * n), st.integers(UPDATE_RING, 30)


def ahead_of(found: Allotment) -> int:
    return sum(piece.elements for _, piece in found.ahead())


@given(units_of, shares, pieces, slots, st.sampled_from([None, [""], []]))
def test_every_element_behind_an_edge_is_in_one_piece_and_none_before_it(units, share, piece, count, late):
    found = allot(units, share, piece, count, late)
    assert found.edges.keys() == found.pieces.keys()
    for unit in units:
        if unit.name not in found.edges:
            continue
        spans = [(p.start, p.stop) for p in found.pieces[unit.name]]
        assert spans[0][0] == found.edges[unit.name]
        assert spans[-1][1] == unit.elements
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert all(0 < b - a <= piece for a, b in spans)
        assert found.edges[unit.name] % 64 == 0


@given(units_of, shares, pieces, slots, st.sampled_from([None, [""], []]))
def test_pieces_that_come_ahead_have_slots_of_their_own_and_leave_three(units, share, piece, count, late):
    found = allot(units, share, piece, count, late)
    taken = [p.slot for _, p in found.ahead()]
    assert taken == list(range(len(taken)))
    assert len(taken) <= count - UPDATE_RING
    if late is not None:
        assert {name for name, _ in found.ahead()} <= set(late)


@given(units_of, shares, pieces, slots)
def test_the_device_never_gets_more_than_its_share_but_for_alignment(units, share, piece, count):
    found = allot(units, share, piece, count)
    given_elements = sum(u.elements - found.edges[u.name] for u in units if u.name in found.edges)
    assert given_elements <= round(share * sum(u.elements for u in units)) + 64 * len(units)


@given(units_of, pieces)
def test_with_room_for_everything_all_of_it_comes_ahead_in_the_order_of_forward(units, piece):
    found = allot(units, 1.0, piece, 10_000)
    assert ahead_of(found) == sum(u.elements for u in units)
    assert list(found.pieces) == [u.name for u in units if u.elements]


def test_the_first_units_are_whole_on_the_device_and_the_others_share_what_is_left():
    units = [Reach(name, 6400) for name in "abcd"]
    found = allot(units, 0.75, 640, UPDATE_RING + 10)
    assert found.edges == {"a": 0, "b": 6400 // 3 // 64 * 64 + 64, "c": 2176, "d": 2176}
    assert ahead_of(found) == 6400
    assert allot(units, 0.5, 640, UPDATE_RING).edges == dict.fromkeys("abcd", 3200)


def test_the_device_begins_where_it_takes_every_other_unit():
    units = [Reach(name, 6400) for name in "abcd"]
    assert allot(units, 0.5, 6400, UPDATE_RING).edges == {"a": 0, "c": 0}
    root = Reach("", 64)
    assert allot([root, *units], 0.5, 6400, UPDATE_RING).edges == {"a": 0, "c": 0}
    smaller = allot([root, *units], 0.5, 8000, UPDATE_RING)
    assert smaller.edges == {"a": 0, "c": 0}, "units that are less than a piece"
    late = allot(units, 0.5, 6400, UPDATE_RING, late=[])
    assert late.edges == {"b": 0, "d": 0}
