"""The parts of the memory benchmark that need no GPU."""

import gzip
import json
import os
import time

import pytest

from benchmarks.allocations import LARGEST_RECORD_BYTES, compact, packed
from benchmarks.children import Failure, in_children
from benchmarks.prediction import errors, summary


def work(job, turn):
    if job == "raises":
        raise ValueError("as meant")
    if job == "dies":
        os._exit(3)
    if job == "hangs":
        time.sleep(60)
    turn()
    return job.upper()


# From Python 3.12 on, forking a process with threads warns; a child here runs nothing that another thread could hold.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_child_that_fails_dies_or_hangs_costs_only_its_own_row(at_once):
    jobs = ["first", "raises", "dies", "hangs", "last"]
    results = dict(in_children(jobs, work, at_once, preparing=2, seconds=1.5))
    assert results == {
        "first": "FIRST",
        "raises": Failure("ValueError: as meant"),
        "dies": Failure("the process ended with exit code 3"),
        "hangs": Failure("took more than 2 s to prepare"),
        "last": "LAST",
    }


def test_a_recorded_step_says_which_allocation_each_free_ends():
    entries = [
        {"action": "alloc", "addr": 10, "size": 100},
        {"action": "segment_alloc", "addr": 0, "size": 2048},
        {"action": "alloc", "addr": 20, "size": 200},
        {"action": "free_requested", "addr": 10, "size": 100},
        {"action": "free_completed", "addr": 10, "size": 100},
        {"action": "alloc", "addr": 10, "size": 300},
        {"action": "free_completed", "addr": 99, "size": 7},
        {"action": "free_completed", "addr": 10, "size": 300},
    ]
    events = compact(entries, [(0, "zero_grad"), (3, "forward"), (8, "backward"), (8, "step")])
    assert events == ["zero_grad", 100, ["segment", 2048], 200, "forward", -1, 300, [7], -3, "backward", "step"]


def test_a_record_that_is_too_long_keeps_its_beginning():
    events = [number * 7919 % 1_000_003 for number in range(200_000)]
    line = packed("long", events)
    name, kept = json.loads(gzip.decompress(line))
    assert len(line) <= LARGEST_RECORD_BYTES
    assert name == "long"
    assert kept[-1] == "cut short"
    assert kept[:1000] == events[:1000]


def row(predicted, measured, expandable=None):
    peaks = {"forward": 50, "backward": measured, "step": 10}
    return {
        "name": "one",
        "measured": {
            "steady_bytes": peaks,
            "first_bytes": peaks,
            "reserved_bytes": 200,
            "nvml_bytes": None,
            "step_seconds": None,
        },
        "expandable_reserved_bytes": expandable,
        "predicted": {
            "steady_bytes": {"forward": 50, "backward": predicted, "step": 10},
            "allocated_bytes": predicted,
            "reserved_bytes": 210,
            "expandable_reserved_bytes": 99,
        },
    }


def test_errors_are_given_for_what_was_both_measured_and_predicted():
    assert errors(row(101, 100)) == {"allocated_bytes": 0.01, "reserved_bytes": 0.05, "phase_right": True}
    assert errors(row(101, 100, expandable=110))["expandable_reserved_bytes"] == -0.1
    assert not errors(row(40, 100))["phase_right"]


def test_the_summary_counts_the_refused_apart():
    rows = [{**row(100 + error, 100), "name": str(error)} for error in range(20)]
    rows = [{**r, "errors": errors(r)} for r in rows]
    refused = {"name": "no", "predicted": {"error": "ProfilerError: cannot"}, "errors": {}}
    lines = "\n".join(summary([*rows, refused]))
    assert "median   9.50%   95th percentile  19.00%   worst  19.00%   (20)" in lines
    assert "right in 20 of 20" in lines
    assert "refused: no: ProfilerError: cannot" in lines
