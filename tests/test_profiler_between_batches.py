"""The peak of a batch between two profiled ones: the line between them with its bend, beside a trace of just that."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from memplan.activations import ACTIVATION_MARGIN, FIXED_MARGIN_BYTES, Way, activations_of
from profiler.allocator import ExpandableAllocator
from profiler.replay import peaks_by_phase, replay, training_loop
from profiler.run import profile_model
from profiler.trace import trace_step
from tests.models import GPT

MOST = 64


@dataclass(frozen=True)
class Training:
    """A network and a batch of a size for it."""

    network: nn.Module
    batch: Callable[[int], torch.Tensor]


def rows(network: nn.Module, *shape: int) -> Training:
    return Training(network, lambda size: torch.zeros(size, *shape))


def rectifiers(width: int, depth: int) -> nn.Sequential:
    """The gradients of biases are summed in buffers that soon grow no more."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU())]
    return nn.Sequential(*layers)


class Mean(nn.Module):
    """Its sum has so many outputs in a large batch that no two blocks share one, and far fewer in a smaller one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean(1))


def encoder() -> nn.Module:
    """Keeps copies of what is turned, which one sample does without."""
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True, norm_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


TRAININGS = {
    "wide layers with biases": rows(rectifiers(1024, 6), 197, 1024),
    "narrow layers with biases": rows(rectifiers(96, 12), 1024, 96),
    "convolutions": rows(
        nn.Sequential(*[nn.Sequential(nn.Conv2d(64, 64, 3), nn.GELU()) for _ in range(6)]), 64, 56, 56
    ),
    "one sample that is not half of two": rows(encoder(), 512, 256),
    "a language model": Training(GPT(layers=4, width=256), lambda size: torch.zeros(size, 16, dtype=torch.int64)),
}


def loss_of(outputs: torch.Tensor, _: object) -> torch.Tensor:
    return outputs.square().mean()


@pytest.mark.parametrize("name", TRAININGS)
def test_no_batch_between_two_profiled_ones_has_a_peak_above_the_line_with_its_bend(name: str) -> None:
    training = TRAININGS[name]
    profile = profile_model(training.network, training.batch(MOST), loss=loss_of, precision="bf16")
    most_scratch = max((scratch for point in profile.activations for scratch, _ in point.scratch_moments), default=0)
    for size in (2, 3, 5, 8, 13, 21, 34, 55, MOST):
        alone = profile_model(training.network, training.batch(size), loss=loss_of, precision="bf16")
        exact = activations_of(alone, Way(size), "cuda")
        found = activations_of(profile, Way(size), "cuda")
        assert exact is not None and found is not None
        given = next(p.given_bytes for p in alone.activations if p.batch_size == size)
        without_margins = (
            found.upper_bytes - FIXED_MARGIN_BYTES["cuda"] - int(found.peak_bytes * (ACTIVATION_MARGIN - 1))
        )
        rounded = 1 << 16
        assert exact.peak_bytes <= without_margins - given + rounded, size
        assert without_margins - given <= exact.peak_bytes * 1.07 + most_scratch, size


def test_a_sum_that_no_blocks_share_in_a_large_batch_counts_with_what_they_share_in_a_smaller_one() -> None:
    network = Mean(1024)
    profile = profile_model(network, torch.empty(300, 1024, 1024, device="meta"), loss=loss_of, precision="bf16")
    for size in (200, 263):
        batch = torch.empty(size, 1024, 1024, device="meta")
        alone = activations_of(profile_model(network, batch, loss=loss_of, precision="bf16"), Way(size), "cuda")
        found = activations_of(profile, Way(size), "cuda")
        assert alone is not None and found is not None
        bare = found.upper_bytes - FIXED_MARGIN_BYTES["cuda"] - int(found.peak_bytes * (ACTIVATION_MARGIN - 1))
        given = size * 1024 * 1024 * 4
        assert found.peak_bytes < alone.peak_bytes <= bare - given


@pytest.mark.parametrize("name", TRAININGS)
def test_peaks_by_phase_are_those_of_an_allocator_that_grows_its_segments(name: str) -> None:
    training = TRAININGS[name]
    trace = trace_step(training.network, training.batch(3), lambda m, b: loss_of(m(b), b), "bf16")
    loop = training_loop(trace, "adamw")
    _, steady = replay(loop, ExpandableAllocator())
    assert peaks_by_phase(loop, leave_out=()) == steady.allocated_bytes


def test_layer_norm_keeps_what_it_knows_of_every_row_in_fp32_where_its_input_is_narrower() -> None:
    norm, size, length = nn.LayerNorm(64), 4096, 16
    points = {
        precision: profile_model(norm, torch.zeros(size, length, 64), loss=loss_of, precision=precision).activations[0]
        for precision in ("fp32", "bf16")
    }
    statistics = 2 * 4 * size * length
    of_tensors = {precision: point.held_bytes - statistics for precision, point in points.items()}
    assert of_tensors["fp32"] == pytest.approx(2 * of_tensors["bf16"], abs=2048)
