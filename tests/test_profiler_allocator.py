"""The allocator's model, against its rules and an independent check of every layout."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.allocator import CachingAllocator, segment_bytes

MIB = 1 << 20
SIZES = st.one_of(
    st.integers(1, 4096), st.integers(1, 2 * MIB), st.integers(1, 24 * MIB), st.sampled_from([0, 512, MIB, 10 * MIB])
)
# A size allocates; an index frees one of those alive.
ACTIONS = st.lists(st.one_of(SIZES.map(lambda n: ("allocate", n)), st.integers(0).map(lambda n: ("free", n))))


def overlapping(spans: list[tuple[int, int]]) -> bool:
    ordered = sorted(spans)
    return any(a + n > b for (a, n), (b, _) in pairwise(ordered))


@settings(deadline=None)
@given(ACTIONS)
def test_blocks_never_overlap_and_everything_allocated_is_reserved(actions):
    allocator, alive = CachingAllocator(), {}
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
    for key in alive:
        allocator.free(key)
    assert allocator.allocated_bytes == 0


@settings(deadline=None)
@given(st.lists(SIZES))
def test_a_second_round_of_the_same_requests_reserves_nothing_more(sizes):
    allocator = CachingAllocator()
    for _ in range(2):
        for key, size in enumerate(sizes):
            allocator.allocate(key, size)
        reserved = allocator.reserved_bytes
        for key in range(len(sizes)):
            allocator.free(key)
        assert allocator.reserved_bytes == reserved
    first = CachingAllocator()
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


def test_a_key_that_is_in_use_is_refused():
    allocator = CachingAllocator()
    allocator.allocate("a", 1)
    with pytest.raises(ValueError, match="allocated already"):
        allocator.allocate("a", 1)
