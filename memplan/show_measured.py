"""A step's prediction beside its measurement, for a terminal."""

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.formatting import format_bytes, format_seconds
from memplan.profile_words import phase_name
from profiler.measure import Measured
from profiler.profile import ModelProfile


def measured_table(profile: ModelProfile, measured: Measured) -> RenderableType:
    """Peaks by phase of a steady step and of the first, then reserve, driver and time; errors as shares of what was."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("")
    for name in (
        "every step:\npredicted",
        "\nmeasured",
        "\noff by",
        "first step:\npredicted",
        "\nmeasured",
        "\noff by",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in profile.peaks.by_phase:
        pairs = (
            (profile.peaks.by_phase, measured.steady_bytes),
            (profile.first_peaks.by_phase, measured.first_bytes),
        )
        cells = [cell for ours, theirs in pairs for cell in _beside(ours.get(phase), theirs.get(phase))]
        table.add_row(f" {phase_name(profile, phase)}", *cells)
    table.add_row(" peak", *_beside(profile.peaks.overall_bytes, measured.overall_bytes), style="bold")
    table.add_section()
    table.add_row(" reserved", *_beside(profile.peaks.reserved_bytes, measured.reserved_bytes))
    table.add_row(" nvidia-smi", *_beside(profile.device_bytes, measured.nvml_bytes))
    table.add_row(" step time", *_beside(profile.step_seconds, measured.step_seconds, format_seconds))
    return Group(Text(f"\nmeasured on {measured.device}", style="bold"), table)


def _beside(predicted: float | None, measured: float | None, text: Callable[[float], str] = format_bytes) -> list[str]:
    cells = ["" if figure is None else text(figure) for figure in (predicted, measured)]
    return [*cells, f"{predicted / measured - 1:+.1%}" if predicted is not None and measured else ""]
