"""Sizes and rates as people write them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import MachineError
from memplan.sizes import is_rate, is_size, parse_bytes, parse_rate

UNITS = {
    "": 1, "B": 1, "K": 2**10, "KiB": 2**10, "KB": 10**3, "M": 2**20, "MiB": 2**20, "MB": 10**6,
    "G": 2**30, "GiB": 2**30, "GB": 10**9, "T": 2**40, "TiB": 2**40, "TB": 10**12, "PiB": 2**50, "PB": 10**15,
}  # fmt: skip


@given(st.integers(0, 1000), st.integers(0, 999), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_a_size_means_its_number_times_its_unit(whole, thousandths, unit, space):
    exact = Fraction(whole * 1000 + thousandths, 1000) * UNITS[unit]
    assert parse_bytes(f"{whole}.{thousandths:03}{space}{unit}") == exact.numerator // exact.denominator


@given(st.integers(0, 1000), st.sampled_from([unit for unit in UNITS if unit]))
def test_a_size_may_be_written_small(number, unit):
    assert parse_bytes(f"{number}{unit.lower()}") == parse_bytes(f"{number}{unit}")


@given(st.integers(1, 1000), st.sampled_from(sorted(UNITS)), st.sampled_from(["/s", "ps", "/S"]))
def test_a_rate_is_a_size_a_second(number, unit, end):
    assert parse_rate(f"{number}{unit}{end}") == number * UNITS[unit]
    assert is_rate(f"{number}{unit}{end}")
    assert not is_size(f"{number}{unit}{end}")


def test_rates_are_read_as_the_issue_writes_them():
    assert parse_rate("7GB/s") == parse_rate("7000MB/s") == 7e9
    assert parse_rate("7GiB/s") == 7 * 2**30
    assert parse_rate("3.5 GB/s") == 3.5e9


@pytest.mark.parametrize(
    ("text", "instead"),
    [("56Gb/s", "7GB/s"), ("56Gbit/s", "7GB/s"), ("56Gbps", "7GB/s"), ("100 gb/s", "12.5GB/s"), ("8 bits/s", "1B/s")],
)
def test_bits_are_refused_with_the_same_rate_in_bytes(text, instead):
    assert is_rate(text)
    with pytest.raises(MachineError, match=f"--nvme is '{text}', which counts bits; write bytes: {instead}$"):
        parse_rate(text, "--nvme")


@given(st.integers(1, 10**5), st.sampled_from(["K", "M", "G", "T"]))
def test_the_advice_about_bits_is_an_eighth(number, prefix):
    with pytest.raises(MachineError) as caught:
        parse_rate(f"{8 * number}{prefix}b/s")
    assert parse_rate(str(caught.value).rpartition(" ")[2]) == pytest.approx(number * UNITS[prefix + "B"], rel=1e-5)


@pytest.mark.parametrize("text", ["", "7", "7GB", "GB/s", "-7GB/s", "7furlongs/s", "/data/s", "2maps", "7GB/h"])
def test_what_is_no_rate_is_refused_with_an_example(text):
    assert not is_rate(text)
    with pytest.raises(MachineError, match="write a rate such as 7GB/s"):
        parse_rate(text)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(MachineError, match="nothing could ever be moved"):
        parse_rate("0GB/s")
