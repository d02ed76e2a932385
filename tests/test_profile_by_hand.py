"""A profile that somebody changed with an editor."""

import json
from pathlib import Path
from typing import Any

import pytest

from profiler.errors import ProfileError
from profiler.profile import ModelProfile
from tests.synthetic_profiles import transformer

AGAIN = "make it again: memplan profile --json"


def read(data: dict[str, Any], path: Path) -> ModelProfile:
    path.write_text(json.dumps(data))
    return ModelProfile.load(path)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    profile = transformer(3)
    assert read(profile.to_dict(), tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("batch_size",), "8", "batch_size is '8'; it must be a whole number, at least 0"),
        (("batch_size",), True, "batch_size is True; it must be a whole number, at least 0"),
        (("precision",), None, "precision is None; it must be a string"),
        (("step_seconds",), "1 s", "step_seconds is '1 s'; it must be a number, at least 0"),
        (("blocks",), [7], "blocks[0] is 7; it must be a string"),
        (
            ("activations", 1, "on_cpu_bytes"),
            "1GiB",
            "activations[1].on_cpu_bytes is '1GiB'; it must be a whole number, at least 0",
        ),
        (
            ("activations", 0, "phase_bytes"),
            {"loss": 1.5},
            "activations[0].phase_bytes.loss is 1.5; it must be a whole number, at least 0",
        ),
    ],
)
def test_a_value_of_another_type_is_named(place: tuple[Any, ...], value: Any, says: str, tmp_path: Path) -> None:
    data: Any = json.loads(json.dumps(transformer(3).to_dict()))
    part = data
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    path = tmp_path / "profile.json"
    with pytest.raises(ProfileError) as caught:
        read(data, path)
    assert str(caught.value) == f"{path} is not a profile that this version can read ({says}); {AGAIN}"
