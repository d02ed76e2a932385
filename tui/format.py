"""Numbers as people read them; unknown is a dash."""

import math

UNKNOWN = "\N{EN DASH}"


def bytes_text(count: float | None) -> str:
    """Bytes in binary units with three significant digits or so: ``37.2 MiB``; at most 8 characters."""
    if count is None or not math.isfinite(count):
        return UNKNOWN
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1023.5:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 99.95 else f"{value:.1f} {unit}"


def bytes_of(part: float | None, whole: float | None) -> str:
    """Bytes out of bytes, a common unit once: ``37.2 of 96.0 MiB``."""
    a, b = bytes_text(part), bytes_text(whole)
    return f"{a.split()[0]} of {b}" if a.split()[1:] == b.split()[1:] else f"{a} of {b}"


def rate_text(bytes_per_second: float | None) -> str:
    """Bytes a second: ``140 MiB/s``."""
    return UNKNOWN if bytes_per_second is None else f"{bytes_text(bytes_per_second)}/s"


def count_text(count: float | None) -> str:
    """A count in powers of a thousand: ``10.8 M``, ``3.21 G``."""
    if count is None or not math.isfinite(count):
        return UNKNOWN
    value, unit = float(count), ""
    for larger in (" k", " M", " G", " T"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{unit}" if not unit or abs(value) >= 99.95 else f"{value:.3g}{unit}"


def seconds_text(seconds: float | None) -> str:
    """A short span: ``840 µs``, ``412 ms``, ``1.24 s``, from two minutes on as a clock."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds >= 120:
        return clock_text(seconds)
    if seconds >= 0.9995:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.0015 else f"{seconds * 1e6:.0f} µs"


def clock_text(seconds: float | None) -> str:
    """A long span: ``1:23``, ``2:05:09``, ``3 d 04:05``."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def number_text(value: float | None) -> str:
    """A plain measurement with four significant digits, small ones with a power of ten: ``0.8312``, ``2.30e-04``."""
    if value is None:
        return UNKNOWN
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
