"""Seconds in a profile."""

from pathlib import Path

import pytest
import torch

from profiler.calibration import ASSUMED
from profiler.errors import ProfilerError
from profiler.run import profile_model
from tests.profiler_models import GPT, mlp, next_token_loss, tokens


def gpt_on(device: str | None = None, calibration: Path | None = None):
    return profile_model(GPT(), tokens(), loss=next_token_loss, device=device, calibration=calibration)


def test_without_a_device_there_are_no_seconds() -> None:
    profile = gpt_on()
    assert (profile.device, profile.step_seconds) == (None, None)
    assert all(x.seconds is None for x in (*profile.layers, *profile.operations))


def test_layers_and_operations_take_what_the_step_takes_without_the_optimizer() -> None:
    profile = gpt_on("h100 sxm")
    assert profile.device == "NVIDIA H100 SXM"
    model, *below = profile.layers
    assert profile.step_seconds is not None and model.seconds is not None
    assert 0 < model.seconds < profile.step_seconds
    assert sum(o.seconds or 0 for o in profile.operations) == pytest.approx(model.seconds)
    block = next(x for x in below if x.path == "blocks.0")
    inside = sum(x.seconds or 0 for x in below if x.path.startswith("blocks.0."))
    assert inside <= (block.seconds or 0) <= model.seconds


def test_a_faster_device_takes_less() -> None:
    batch = torch.zeros(4096, 100)
    slow, fast = (profile_model(mlp(), batch, loss=lambda y, _: y.sum(), device=d) for d in ("T4", "H200 SXM"))
    assert slow.step_seconds and fast.step_seconds
    assert fast.step_seconds < slow.step_seconds


def test_what_times_stand_on_is_an_assumption() -> None:
    assert any("a calibration measures them" in s for s in gpt_on("H200 SXM").assumptions)


def test_a_calibration_names_its_device(tmp_path: Path) -> None:
    from dataclasses import replace

    replace(ASSUMED, device="NVIDIA H200").save(tmp_path / "rates.json")
    own = gpt_on(calibration=tmp_path / "rates.json")
    assert own.device == "NVIDIA H200 SXM"
    assert not any("rates" in s for s in own.assumptions)
    other = gpt_on("T4", tmp_path / "rates.json")
    assert any("NVIDIA T4 reach the same shares of its rates as on NVIDIA H200" in s for s in other.assumptions)


def test_an_unknown_device_is_a_sentence_with_the_nearest() -> None:
    with pytest.raises(ProfilerError, match=r"no device 'H20000'; the nearest names are NVIDIA H200"):
        gpt_on("H20000")
