"""Work without Python's search for cycles, and what that leaves to the search after it."""

import gc

from profiler.uncollected import uncollected


def generations_of(thing: object) -> list[int]:
    return [g for g in (0, 2) if any(other is thing for other in gc.get_objects(generation=g))]


def test_what_was_made_counts_as_old_afterwards() -> None:
    gc.unfreeze()  # what commands in this process have frozen
    with uncollected():
        assert not gc.isenabled()
        made = [object()]
        assert generations_of(made) == [0]
    assert gc.isenabled()
    assert generations_of(made) == [2]


def test_work_inside_of_other_such_work_leaves_it_to_the_outer_one() -> None:
    with uncollected():
        with uncollected():
            made = [object()]
        assert not gc.isenabled()
        assert generations_of(made) == [0]
    assert gc.isenabled()


def test_what_somebody_else_has_frozen_stays_frozen() -> None:
    frozen = [object()]
    gc.freeze()
    try:
        with uncollected():
            pass
        assert generations_of(frozen) == []
    finally:
        gc.unfreeze()
