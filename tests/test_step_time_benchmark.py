"""The benchmark of step times: its figures and its lines."""

from benchmarks.step_time import line, summary


def row(name, error, held_out=False, bound="compute"):
    return {
        "name": name,
        "architecture": name[:1],
        "held_out": held_out,
        "measured_seconds": 0.1,
        "predicted_seconds": 0.1 * (1 + error),
        "error": error,
        "bound": bound,
        "by_bound": {bound: 0.1 * (1 + error)},
    }


def test_errors_are_summed_up_by_set_by_bound_and_by_architecture():
    rows = [row("a1", -0.1), row("a2", 0.3, bound="launch"), row("b1", 0.2), row("c1", 0.5, held_out=True)]
    failed = {"name": "d", "architecture": "d", "held_out": False, "measured_seconds": 0.1, "failed": "no"}
    lines = summary([*rows, failed])
    assert "Tuning set: median  20.0%   95th percentile  30.0%   worst  30.0%   mean +13.3%   (3)" in lines
    assert "Held-out set: median  50.0%   95th percentile  50.0%   worst  50.0%   mean +50.0%   (1)" in lines
    assert [x.split()[0] for x in lines if x.startswith("  ")] == ["compute", "launch", "a", "b", "compute", "c"]
    assert "no" in line(failed)


def test_a_line_says_both_times_and_how_long_the_device_waits():
    text = line(row("a", 0.5, bound="launch"))
    assert "measured   100.0 ms   predicted   150.0 ms" in text
    assert "the device waits 100%" in text
