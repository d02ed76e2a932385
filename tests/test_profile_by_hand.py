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
        (("batch_size",), 0, "batch_size is 0; it must be at least 1"),
        (("batch_size",), 10**30, f"batch_size is {10**30}; it must be below 2^63"),
        (("layers",), [], "layers is empty; it must have entries"),
        (("layers", 0, "path"), "h", "layers[0].path is 'h'; the first layer must be the model itself, ''"),
        (("layers", 1, "speed"), 1, "layers[1].speed is nothing that this version knows"),
        (("again",), 1, "again is nothing that this version knows"),
        (("peaks",), {}, "peaks.forward_bytes is missing"),
        (("parameters", 0), "w", "parameters[0] is 'w'; it must be an object"),
        (
            ("activations", 0, "scratch_moments"),
            [[1]],
            "activations[0].scratch_moments[0] has 1 entries; it must have 2",
        ),
        (("schema",), "memplan.profile/4", "its schema is 'memplan.profile/4', and must be 'memplan.profile/5'"),
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


def test_a_profile_that_is_nested_too_deeply_or_is_none_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for text, says in (("[" * 100_000, "it is nested too deeply"), ("[]", "it holds no object"), ("{", "Expecting")):
        path.write_text(text)
        with pytest.raises(ProfileError) as caught:
            ModelProfile.load(path)
        assert str(caught.value).startswith(f"{path} is not a profile that this version can read ({says}")
        assert str(caught.value).endswith(AGAIN)
    with pytest.raises(ProfileError, match=r"gone.json does not exist; memplan profile --json writes one"):
        ModelProfile.load(tmp_path / "gone.json")
