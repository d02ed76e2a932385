"""Flame graphs in speedscope's file format: https://github.com/jlfwong/speedscope/wiki/Importing-from-custom-sources."""

import json

import pytest

from profiler.flamegraph import flamegraph, write_flamegraph
from tests.shown_profiles import shown_profile

UNITS = {"none", "nanoseconds", "microseconds", "milliseconds", "seconds", "bytes"}


@pytest.fixture
def graph(tmp_path):
    write_flamegraph(shown_profile(device="H200"), tmp_path / "net.speedscope.json")
    return json.loads((tmp_path / "net.speedscope.json").read_text())


def stacks(graph, number):
    frames = [frame["name"] for frame in graph["shared"]["frames"]]
    drawn = graph["profiles"][number]
    samples = [";".join(frames[i] for i in sample) for sample in drawn["samples"]]
    return dict(zip(samples, drawn["weights"], strict=True))


def test_the_file_has_what_the_format_asks_for(graph):
    assert graph["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    frames = len(graph["shared"]["frames"])
    for drawn in graph["profiles"]:
        assert drawn["type"] == "sampled"
        assert drawn["unit"] in UNITS
        assert isinstance(drawn["name"], str)
        assert len(drawn["samples"]) == len(drawn["weights"])
        assert all(0 <= i < frames for sample in drawn["samples"] for i in sample)
        assert drawn["endValue"] - drawn["startValue"] == pytest.approx(sum(drawn["weights"]))


def test_each_graph_adds_up_to_the_models_figure(graph):
    model = shown_profile(device="H200").layers[0]
    wholes = [drawn["endValue"] for drawn in graph["profiles"]]
    flops = model.forward_flops + model.backward_flops
    assert wholes == pytest.approx(
        [model.activation_bytes, model.parameter_bytes, flops, model.moved_bytes, model.seconds]
    )


def test_frames_are_modules_from_the_model_down_in_the_order_of_their_calls(graph):
    assert list(stacks(graph, 1)) == [
        *(f"Net;layers (ModuleList);{i} (FullBlock);up (Linear)" for i in range(4)),
        "Net;head (Linear)",
    ]


def test_a_profile_without_seconds_has_no_graph_of_them():
    assert "seconds" not in {drawn["unit"] for drawn in flamegraph(shown_profile())["profiles"]}
