"""Numbers as people read them; only the edge of the program formats."""

from collections.abc import Sequence

BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
COUNT_UNITS = ("", "K", "M", "B", "T")
FLOP_UNITS = ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")


def format_bytes(count: float) -> str:
    """``37.2 MiB``."""
    return _scaled(count, 1024, BYTE_UNITS)


def format_count(count: float) -> str:
    """``3.21 B``: parameters, tokens."""
    return _scaled(count, 1000, COUNT_UNITS)


def format_flops(flops: float) -> str:
    """``1.2 TFLOP``."""
    return _scaled(flops, 1000, FLOP_UNITS)


def format_seconds(seconds: float) -> str:
    """``12.3 ms``, ``1.24 s``, ``2 h 05 min``."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02} min"
    if seconds >= 99.95:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60:02} s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns" if seconds else "0 s"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    power = 0
    # What would be rounded up to the next unit is written in it: 1023.99 KiB is 1 MiB.
    while abs(value) >= base - 0.5 and power < len(units) - 1:
        value /= base
        power += 1
    return f"{_three_digits(value) if power else f'{value:.0f}'} {units[power]}".rstrip()


def _three_digits(value: float) -> str:
    """Three significant digits, whole numbers above that."""
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
