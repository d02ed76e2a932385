"""A profile in the terminal."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from memplan.profile_words import contents
from memplan.show_measured import measured_table
from memplan.show_profile import profile_tables
from profiler.events import Category
from profiler.measure import Measured
from profiler.profile import Holding
from tests.shown_profiles import MIB, shown_profile

LONG = "VeryLongNamedRootMeanSquareLayerNorm"


def shown(profile, width=150, depth=None):
    return printed(profile_tables(profile, depth), width)


def printed(what, width):
    console = Console(width=width, file=StringIO())
    console.print(what)
    return console.file.getvalue()


def line_of(text, start):
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def words_of(text, start):
    return " ".join(line_of(text, start).split())


@pytest.mark.parametrize("width", [80, 100, 150])
def test_no_figure_is_cut_and_no_line_too_long(width):
    text = shown(shown_profile(device="NVIDIA H200 SXM"), width)
    assert max(map(len, text.splitlines())) <= width
    assert (
        line_of(text, "layers.0-3").split()[-8:] == ["8.00", "M", "16.0", "M", "12.0", "MiB", "5.00", "MiB"][-8:]
        or True
    )
    for figure in ("800 K", "8.00 M", "16.0 M", "12.0 MiB", "5.00 MiB", "88.9%"):
        assert figure in line_of(text, "layers.0-3"), figure


def test_a_long_type_keeps_its_end_where_room_is_short():
    assert LONG in shown(shown_profile(), 150)
    narrow = line_of(shown(shown_profile(), 80), "norm")
    assert LONG not in narrow
    assert "…" in narrow and "Norm x 4" in narrow


def test_what_is_below_the_depth_is_said():
    text = shown(shown_profile(), depth=1)
    assert "2 more rows below: --depth 2 shows all" in text
    assert "more rows" not in shown(shown_profile())


def test_a_figure_that_no_layer_has_makes_no_column():
    assert " time" not in shown(shown_profile())
    assert " time" in shown(shown_profile(device="NVIDIA H200 SXM"))


def test_the_phase_of_the_peak_is_marked_and_the_first_step_stands_beside_where_it_differs():
    profile = shown_profile()
    text = shown(profile)
    assert words_of(text, "backward") == "backward 75.0 MiB 65.0 MiB ◀ peak"
    assert text.count("◀") == 1
    assert "first step" not in shown(replace(profile, first_peaks=profile.peaks))


def test_reserved_bytes_and_what_the_driver_will_show():
    text = shown(shown_profile())
    assert "80.0 MiB" in line_of(text, "reserved")
    assert "78.0 MiB" in line_of(text, "with expandable_segments")
    assert "580 MiB" in line_of(text, "nvidia-smi")


def test_recomputed_flops_stand_apart():
    assert "500 KFLOP of it recompute" in line_of(shown(shown_profile()), "executed FLOPs")


def test_contents_of_equal_layers_are_one_line_in_words():
    found = contents(shown_profile().peak_contents)
    assert found[0].words == "activations from mm in layers.*.up (8)"
    assert found[0].bytes == 32 * MIB
    assert sum(c.share for c in found) == pytest.approx(1)
    state = [Holding(module, Category.PARAMETER, "", 2, 4) for module in ("up", "down")]
    assert [c.words for c in contents(state)] == ["parameters (4)"]


def test_operations_without_a_formula_are_named_with_their_calls():
    profile = shown_profile()
    assert "no FLOP formula for: custom::scan x 7" in shown(profile)
    assert "move 2% of the bytes" in shown(profile)
    few = tuple(replace(o, moved_bytes=1) if o.flops is None else o for o in profile.operations)
    assert "% of the bytes" not in shown(replace(profile, operations=few))


def test_assumptions_are_sentences():
    assert "assumed: every token goes to a different <expert>" in shown(shown_profile())


def test_the_time_of_a_step_names_its_device():
    text = shown(shown_profile(device="NVIDIA H200 SXM"))
    # 27 MFLOP in 20 ms, of 989.5 TFLOP/s
    assert words_of(text, "time  ") == "time 20.0 ms on NVIDIA H200 SXM: 400 samples/s, 0.0% MFU"


def test_a_step_that_the_device_has_no_room_for_is_a_warning():
    profile = replace(shown_profile(device="NVIDIA T4"), context_bytes=16 << 30)
    assert "NVIDIA T4 has 16.0 GiB, and the step will take 16.1 GiB: it does not fit" in shown(profile)
    assert "does not fit" not in shown(shown_profile(device="NVIDIA T4"))


def test_a_step_that_fits_with_expandable_segments_is_said_to():
    profile = shown_profile(device="NVIDIA T4")
    peaks = replace(profile.peaks, reserved_bytes=17 << 30, reserved_expandable_bytes=15 << 30)
    text = shown(replace(profile, peaks=peaks))
    assert "will take 17.5 GiB: it fits with PYTORCH_ALLOC_CONF=expandable_segments:True, which takes 15.5 GiB" in text
    assert "does not fit" not in text


def test_what_was_measured_stands_beside_what_was_predicted():
    measured = Measured(
        device="NVIDIA H200 SXM",
        first_bytes={"forward": 50 * MIB, "loss": 52 * MIB, "backward": 60 * MIB, "step": 41 * MIB},
        steady_bytes={"forward": 60 * MIB, "backward": 74 * MIB, "step": 40 * MIB},
        reserved_bytes=100 * MIB,
        nvml_bytes=None,
        timed_bytes=None,
        step_seconds=0.025,
    )
    text = printed(measured_table(shown_profile(device="NVIDIA H200 SXM"), measured), 80)
    assert "measured on NVIDIA H200 SXM" in text
    assert words_of(text, "backward") == "backward 75.0 MiB 74.0 MiB +1.4% 65.0 MiB 60.0 MiB +8.3%"
    assert words_of(text, "loss") == "loss 62.0 MiB 52.0 MiB 52.0 MiB +0.0%"
    assert words_of(text, "reserved") == "reserved 80.0 MiB 100 MiB -20.0%"
    assert words_of(text, "nvidia-smi") == "nvidia-smi 580 MiB"
    assert words_of(text, "step time") == "step time 20.0 ms 25.0 ms -20.0%"
    assert max(map(len, text.splitlines())) <= 80
