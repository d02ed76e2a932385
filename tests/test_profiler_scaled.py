"""A profile of another batch is the profile that would have been made of it."""

import pytest
import torch
from torch import nn

from profiler import ModelProfile, ProfileError, profile_model
from profiler.resize import resized, sequence_length
from tests.profiler_models import GPT, mean_square, next_token_loss, tokens


@pytest.mark.parametrize("change", [{"batch": 7}, {"seq": 48}, {"batch": 1, "seq": 16}, {}])
def test_a_scaled_profile_is_that_of_a_fresh_trace(change):
    model = GPT(layers=6)
    found = profile_model(model, tokens(3, 32), loss=next_token_loss, optimizer="sgd", clip=True).scaled(**change)
    batch, seq = change.get("batch", 3), change.get("seq", 32)
    fresh = profile_model(model, tokens(batch, seq), loss=next_token_loss, optimizer="sgd", clip=True)
    for figure in ("peaks", "first_peaks", "layers", "operations", "timeline", "peak_contents", "batch_size"):
        assert getattr(found, figure) == getattr(fresh, figure)
    assert found.activations == fresh.activations[:1]


def test_a_profile_can_be_scaled_again():
    once = profile_model(GPT(), tokens(2, 32), loss=next_token_loss).scaled(batch=4)
    assert once.scaled(batch=2, seq=16).forward_flops * 4 < once.forward_flops
    assert once.scaled(batch=8).batch_size == 8


def test_a_profile_from_a_file_says_why_it_can_not_be_scaled(tmp_path):
    profile_model(GPT(), tokens(), loss=next_token_loss).save(tmp_path / "profile.json")
    with pytest.raises(ProfileError, match="profile the model again"):
        ModelProfile.load(tmp_path / "profile.json").scaled(batch=2)


def test_a_batch_without_tokens_has_no_sequence_length_and_none_is_changed_below_one():
    profile = profile_model(nn.Linear(4, 4), torch.randn(2, 4), loss=mean_square)
    assert profile.scaled(batch=6).batch_size == 6
    with pytest.raises(ProfileError, match="no sequences"):
        profile.scaled(seq=8)
    with pytest.raises(ProfileError, match="at least 1"):
        profile.scaled(batch=0)


def test_only_dimensions_of_samples_and_of_tokens_change_and_numbers_repeat():
    batch = {"ids": torch.arange(6).view(2, 3), "mask": torch.ones(2, 1, 3, 3), "classes": torch.tensor([5, 6]), "k": 2}
    assert sequence_length(batch) == 3
    found = resized(batch, (2, 3), (3, 4))
    assert found["ids"].tolist() == [[0, 1, 2, 0], [3, 4, 5, 3], [0, 1, 2, 0]]
    assert found["mask"].shape == (3, 1, 4, 4)
    assert found["classes"].tolist() == [5, 6, 5]
    assert found["k"] == 2
    assert sequence_length(torch.ones(2, 3)) is None
