"""Sizes and rates as people write them: ``24GiB``, ``7GB/s``."""

import re

from memplan.errors import MachineError
from offload.plan import Tier

_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_SIZE = re.compile(_NUMBER + r"(?:([kmgtp])(i?b)?|b)?\s*", re.IGNORECASE | re.ASCII)
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?\s*(?:[kmgtp]i?)?(?:b|bits?)?)(?:/s|ps)\s*", re.IGNORECASE | re.ASCII)
_BITS = re.compile(_NUMBER + r"((?:[kmgtpKMGTP]i?)?)(?:b|[bB]its?)\s*", re.ASCII)
OPTIONS = {Tier.GPU: "--gpu-memory {}", Tier.HOST: "--host-memory {}", Tier.NVME: "--nvme DIR:{}"}
"""What says the size of each tier."""

MOST_BYTES = 1 << 60
"""Of a size that is believed: with larger ones arithmetic in 64 bits would overflow."""
MOST_COUNT = 100_000
"""Of GPUs, or nodes, for the same reason."""
MOST_PARAMETERS = MOST_BYTES >> 6
"""Of a model, for the same reason: that is more than the bytes of one with its state."""
MOST_SAMPLES = 1_000_000_000
"""Of a step."""


def parse_bytes(text: str | int, what: str = "size") -> int:
    """Bytes from ``24GiB`` (2^30 each), ``24G`` (the same, as tools of the field mean it), ``24GB`` (10^9), ``24``.

    Fractions are cut to whole bytes. Raises MachineError, naming ``what``.
    """
    size = text if isinstance(text, int) else _parsed(text, what)
    if size < 0:
        raise MachineError(f"{what} is {text}; a size can not be negative")
    if size > MOST_BYTES:
        raise MachineError(f"{what} is {text}; no machine has more than {MOST_BYTES >> 60} EiB, so write what there is")
    return size


def _parsed(text: str, what: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise MachineError(f"{what} is {text!r}; write a size such as 24GiB, 24GB, 512MiB or a number of bytes")
    number, prefix, suffix = match.groups()
    power = " kmgtp".index(prefix.lower()) if prefix else 0
    unit = (1000 if suffix is not None and suffix.lower() == "b" else 1024) ** power
    whole, _, fraction = number.partition(".")
    return (int(whole + fraction) * unit) // 10 ** len(fraction)


def is_size(text: str) -> bool:
    """Whether ``parse_bytes`` reads it."""
    return _SIZE.fullmatch(text) is not None


def is_rate(text: str) -> bool:
    """Whether it is written as a rate, though perhaps one that ``parse_rate`` refuses."""
    return _RATE.fullmatch(text) is not None


def parse_rate(text: str, what: str = "rate") -> float:
    """Bytes per second from ``7GB/s``, ``7GiB/s``, ``7000MB/s``: a size of ``parse_bytes`` and ``/s``.

    A small b means bits, as networks and links are sold (``56Gb/s``, ``56Gbps``). Those are refused with the same rate
    in bytes: the two are too easily mistaken for each other. Raises MachineError, naming ``what``.
    """
    match = _RATE.fullmatch(text)
    if match is None:
        raise MachineError(f"{what} is {text!r}; write a rate such as 7GB/s, 7GiB/s or 7000MB/s")
    amount = match.group(1)
    if bits := _BITS.fullmatch(amount):
        number, prefix = bits.groups()
        instead = f"{float(number) / 8:g}{prefix[:1].upper()}{prefix[1:]}B/s"
        raise MachineError(f"{what} is {text!r}, which counts bits; write bytes: {instead}")
    rate = parse_bytes(amount, what)
    if rate == 0:
        raise MachineError(f"{what} is {text!r}; nothing could ever be moved at that rate")
    return float(rate)


def grain_of(size: int) -> int:
    """Of sizes that a person would write: about four digits."""
    return 1 << 10 if size < 1 << 24 else 1 << 20 if size < 1 << 36 else 1 << 30


def size_text(size: int) -> str:
    """The exact size in the largest unit that divides it."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size % (1 << power) == 0:
            return f"{size >> power}{unit}"
    return str(size)
