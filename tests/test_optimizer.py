"""The arithmetic of the update, against integers and against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.optimizer import join_master, split_master_, update_in_torch
from offload.plan import Precision, StateFormat
from offload.rules import AdamWStep
from offload.state import carve_state

BITS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split_master_(master, weight, remainder)
    return weight, remainder


@given(BITS)
def test_weight_and_remainder_are_the_master_to_the_last_bit(bits: list[int]) -> None:
    master = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    again = join_master(*split(master))
    assert torch.equal(again.isnan(), master.isnan())
    assert torch.equal(again[~again.isnan()].view(torch.int32), master[~master.isnan()].view(torch.int32))


@given(BITS)
def test_the_weight_is_the_nearest_bf16_and_ties_go_away_from_zero(bits: list[int]) -> None:
    master = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    master = master[master.isfinite()]
    weight, _ = split(master)
    nearest_even = master.bfloat16()
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie].view(torch.int16), nearest_even[~tie].view(torch.int16))
    # The same rule in Python's integers, sign and magnitude apart.
    expected = [(((b & 0x7FFFFFFF) + 0x8000) >> 16) | ((b >> 16) & 0x8000) for b in master.view(torch.int32).tolist()]
    assert weight.view(torch.int16).tolist() == np.array(expected, np.uint16).astype(np.int16).tolist()


def test_infinities_stay_and_no_nan_becomes_a_number() -> None:
    bits = [0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1]  # the last but one is what CUDA makes
    weight, _ = split(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
    assert weight[:2].tolist() == [torch.inf, -torch.inf]
    assert weight[2:].isnan().all()


@settings(max_examples=30)
@given(
    st.integers(1, 5000), st.floats(1e-5, 1e-1), st.floats(0, 0.99), st.floats(0, 0.999), st.floats(0, 0.5),
    st.integers(1, 9),
)  # fmt: skip
def test_the_update_is_torchs(elements: int, lr: float, beta1: float, beta2: float, decay: float, steps: int) -> None:
    torch.manual_seed(elements)
    master = torch.randn(elements)
    plain = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([plain], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    exp_avg, exp_avg_sq = torch.zeros(elements), torch.zeros(elements)
    for step in range(1, steps + 1):
        plain.grad = torch.randn(elements)
        AdamWStep(lr, beta1, beta2, 1e-8, decay, step).update_(master, plain.grad.clone(), (exp_avg, exp_avg_sq))
        optimizer.step()
    torch.testing.assert_close(master, plain.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_an_update_in_pieces_is_the_update_in_one(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    elements, dtype = 1000, torch.float32 if precision is Precision.FP32 else torch.bfloat16
    weight, gradient = torch.randn(elements).to(dtype), torch.randn(elements).to(dtype)
    found = []
    for at_once in (7, 1 << 16):
        monkeypatch.setattr("offload.optimizer.CPU_ELEMENTS", at_once)
        state = carve_state(
            torch.zeros(elements * (10 if precision is Precision.BF16 else 8), dtype=torch.uint8),
            elements,
            StateFormat(precision),
        )
        w = weight.clone()
        update_in_torch(w, gradient, state, AdamWStep(1e-2, 0.9, 0.95, 1e-8, 0.1, 3), 0.7)
        found.append((w, *state.tensors()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
