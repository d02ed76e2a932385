"""The schedule of weights, against an independent player that moves units as it says and checks the rules."""

from hypothesis import given
from hypothesis import strategies as st

from offload.schedule import Fetch, expected_order, schedule


def play(order: tuple, ring_of: dict, capacity: dict, plan: tuple) -> int:
    """Follow the schedule; returns how many uses found their unit absent (fetched on demand). Checks every rule."""
    rings: dict[int, set[str]] = {ring: set() for ring in capacity}
    demanded = 0
    for unit, fetches in zip(order, plan, strict=True):
        if unit in ring_of and unit not in rings[ring_of[unit]]:
            demanded += 1
            ring = rings[ring_of[unit]]
            if len(ring) == capacity[ring_of[unit]]:
                rest = order[list(order).index(unit) :]
                ring.discard(max(sorted(ring), key=lambda u: rest.index(u) if u in rest else len(rest)))
            ring.add(unit)
        for fetch in fetches:
            ring = rings[ring_of[fetch.unit]]
            assert fetch.unit not in ring, "fetched what is there"
            assert fetch.evict != unit, "evicted the unit that computes"
            if fetch.evict is not None:
                assert fetch.evict in ring, "evicted what is not there"
                ring.discard(fetch.evict)
            ring.add(fetch.unit)
            assert len(ring) <= capacity[ring_of[fetch.unit]], "more units than slots"
    return demanded


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    units = [f"u{i}" for i in range(draw(st.integers(1, 8)))]
    forward = tuple(draw(st.lists(st.sampled_from(units), min_size=1, max_size=16)))
    rings = draw(st.integers(1, 3))
    ring_of = {u: draw(st.integers(0, rings - 1)) for u in units if draw(st.booleans())}
    capacity = {r: draw(st.integers(1, 4)) for r in range(rings)}
    return expected_order(forward, training=draw(st.booleans())), ring_of, capacity, draw(st.integers(0, 3))


@given(problems())
def test_no_slot_is_taken_twice_and_none_from_the_computing_unit(problem: tuple) -> None:
    order, ring_of, capacity, depth = problem
    if len(set(order)) == len(order):  # the player's own demand eviction is only exact without repeats
        play(order, ring_of, capacity, schedule(order, ring_of, capacity, depth))
    for position, fetches in enumerate(schedule(order, ring_of, capacity, depth)):
        assert all(f.unit in order[position + 1 :] for f in fetches), "fetched what is never used"


@given(st.integers(2, 30), st.integers(1, 4))
def test_with_one_slot_more_than_the_depth_only_the_first_unit_is_waited_for(layers: int, depth: int) -> None:
    forward = tuple(f"u{i}" for i in range(layers))
    order = expected_order(forward, training=True)
    ring_of, capacity = dict.fromkeys(forward, 0), {0: min(layers, depth + 1)}
    plan = schedule(order, ring_of, capacity, depth)
    there = {forward[0]}
    for unit, fetches in zip(order, plan, strict=True):
        assert unit in there
        for fetch in fetches:
            there.discard(fetch.evict)
            there.add(fetch.unit)
        assert len(there) <= capacity[0]


def test_the_last_layers_are_still_there_when_backward_begins() -> None:
    order = expected_order(("a", "b", "c", "d"), training=True)
    plan = schedule(order, dict.fromkeys("abcd", 0), {0: 2}, 1)
    assert plan[order.index("d")] == (), "c is still in its slot"
    assert plan[order.index("d") + 1] == (Fetch("b", "d"),)
