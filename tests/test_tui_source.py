"""Reading events while they are written."""

import json
from itertools import pairwise

from tests.fake_run import make_events
from hypothesis import given, settings
from hypothesis import strategies as st

from tui.source import Tail


def encoded(events):
    return "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in events).encode()


def test_a_file_that_does_not_exist_yet_has_no_events_and_then_has(tmp_path):
    tail = Tail(tmp_path / "events.jsonl")
    assert list(tail.poll()) == []
    (tmp_path / "events.jsonl").write_bytes(encoded([{"event": "note"}]))
    assert list(tail.poll()) == [{"event": "note"}]
    assert list(tail.poll()) == []


EVENTS = [*make_events(done=1, end="finished"), {"event": "note", "message": "größer → ∞"}]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, len(encoded(EVENTS))), max_size=5))
def test_a_file_that_grows_by_any_bytes_gives_the_same_events(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("run") / "events.jsonl"
    data, tail, found = encoded(EVENTS), Tail(path), []
    edges = [0, *sorted(cuts), len(data)]
    with path.open("wb", buffering=0) as file:
        for start, stop in pairwise(edges):
            file.write(data[start:stop])
            found += tail.poll()
    assert found == EVENTS


def test_a_line_that_is_no_event_is_passed_over(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "a"}\nnot json\n\xff\xfe\n[1, 2]\n' + b"[" * 100_000 + b'\n\n{"event": "b"}\n')
    assert list(Tail(path).poll()) == [{"event": "a"}, {"event": "b"}]


def test_a_file_that_was_cut_short_is_read_from_its_start(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(encoded([{"event": "old", "n": i} for i in range(5)]))
    tail = Tail(path)
    assert len(list(tail.poll())) == 5
    path.write_bytes(encoded([{"event": "new"}]))
    assert list(tail.poll()) == [{"event": "new"}]


def test_a_file_that_was_replaced_by_a_longer_one_is_read_from_its_start(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(encoded([{"event": "old"}]))
    tail = Tail(path)
    list(tail.poll())
    (tmp_path / "other").write_bytes(encoded([{"event": "new", "n": i} for i in range(9)]))
    (tmp_path / "other").replace(path)
    assert len(list(tail.poll())) == 9
