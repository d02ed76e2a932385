"""The allocator's model, against its rules and an independent check of every layout."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.allocator import ALIGNMENT_BYTES, CachingAllocator, ExpandableAllocator, round_up, segment_bytes

MIB = 1 << 20
SIZES = st.one_of(
    st.integers(1, 4096), st.integers(1, 2 * MIB), st.integers(1, 24 * MIB), st.sampled_from([0, 512, MIB, 10 * MIB])
)
# A size allocates; an index frees one of those alive.
ACTIONS = st.lists(st.one_of(SIZES.map(lambda n: ("allocate", n)), st.integers(0).map(lambda n: ("free", n))))


def overlapping(spans: list[tuple[int, int]]) -> bool:
    ordered = sorted(spans)
    return any(a + n > b for (a, n), (b, _) in pairwise(ordered))


@pytest.mark.parametrize("kind", [CachingAllocator, ExpandableAllocator])
@settings(deadline=None)
@given(ACTIONS)
def test_blocks_never_overlap_and_everything_allocated_is_reserved(kind, actions):
    allocator, alive = kind(), {}
    for number, (what, value) in enumerate(actions):
        reserved = allocator.reserved_bytes
        if what == "allocate":
            allocator.allocate(number, value)
            alive[number] = value
        elif alive:
            key = list(alive)[value % len(alive)]
            del alive[key]
            allocator.free(key)
        layout = allocator.layout()
        assert not overlapping(list(layout.values()))
        assert {k for k, n in alive.items() if n} == set(layout)
        assert all(layout[k][1] >= n for k, n in alive.items() if n)
        assert allocator.allocated_bytes == sum(n for _, n in layout.values()) <= allocator.reserved_bytes
        assert allocator.reserved_bytes >= reserved
        if kind is ExpandableAllocator:
            assert allocator.allocated_bytes == sum(round_up(n, ALIGNMENT_BYTES) for n in alive.values())
    for key in alive:
        allocator.free(key)
    assert allocator.allocated_bytes == 0


@pytest.mark.parametrize("kind", [CachingAllocator, ExpandableAllocator])
@settings(deadline=None)
@given(SIZES, st.integers(0, 20))
def test_a_second_round_of_equal_requests_reserves_nothing_more(kind, size, count):
    """Of different sizes it may: the first request may then take the one free block that the last one needs."""
    allocator, sizes = kind(), [size] * count
    for _ in range(2):
        for key, size in enumerate(sizes):
            allocator.allocate(key, size)
        reserved = allocator.reserved_bytes
        for key in range(len(sizes)):
            allocator.free(key)
        assert allocator.reserved_bytes == reserved
    first = kind()
    for key, size in enumerate(sizes):
        first.allocate(key, size)
    assert reserved == first.reserved_bytes


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [(512, 2 * MIB), (MIB, 2 * MIB), (MIB + 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB + 1, 12 * MIB)],
)
def test_segments_have_the_sizes_that_pytorch_asks_of_the_driver(request_bytes, expected):
    assert segment_bytes(request_bytes) == expected


def test_a_large_block_is_split_only_when_more_than_a_mebibyte_remains():
    allocator = CachingAllocator()
    allocator.allocate("a", 19 * MIB + 512)
    assert allocator.allocated_bytes == 20 * MIB
    allocator.free("a")
    allocator.allocate("a", 5 * MIB)
    assert allocator.allocated_bytes == 5 * MIB
    allocator.allocate("b", 9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_freed_neighbours_join_and_serve_a_larger_request():
    allocator = CachingAllocator()
    for key in "abcd":
        allocator.allocate(key, 5 * MIB)
    allocator.free("b")
    allocator.free("c")
    allocator.allocate("e", 9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_an_expandable_segment_grows_by_pages_and_takes_its_free_end_first():
    allocator = ExpandableAllocator()
    allocator.allocate("a", 30 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.allocate("b", 25 * MIB)  # 10 MiB are free at the end
    assert allocator.reserved_bytes == 60 * MIB
    allocator.free("a")
    allocator.allocate("c", 28 * MIB)
    allocator.allocate("d", 2 * MIB)  # what "a" left, not the end
    assert allocator.reserved_bytes == 60 * MIB
    assert allocator.layout()["d"][0] - allocator.layout()["c"][0] == 28 * MIB
    allocator.allocate("e", 1)
    assert allocator.reserved_bytes == 62 * MIB


@settings(deadline=None)
@given(ACTIONS)
def test_an_expandable_segment_is_no_larger_than_what_was_ever_in_use_with_its_gaps(actions):
    allocator, alive, top = ExpandableAllocator(), [], 0
    for number, (what, value) in enumerate(actions):
        if what == "allocate":
            allocator.allocate(number, value)
            alive.append(number)
        elif alive:
            allocator.free(alive.pop(value % len(alive)))
        ends = dict.fromkeys((True, False), 0)
        for address, size in allocator.layout().values():
            small = address < 1 << 60
            ends[small] = max(ends[small], address % (1 << 60) + size)
        top = max(top, sum(ends.values()))
    assert top <= allocator.reserved_bytes <= top + 22 * MIB + (22 * MIB if actions else 0)


def test_a_key_that_is_in_use_is_refused():
    allocator = CachingAllocator()
    allocator.allocate("a", 1)
    with pytest.raises(ValueError, match="allocated already"):
        allocator.allocate("a", 1)
