import pytest
import torch
from torch import nn

from profiler import ProfilerError
from profiler.contract import default_loss, loss_of
from profiler.events import PHASES
from profiler.measure import measure_step
from tests.profiler_models import mean_square


def forward(model, batch):
    return loss_of(model, batch, mean_square)


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(512, 512)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_cuda_device_a_sentence_says_so():
    with pytest.raises(ProfilerError, match="only be measured on a CUDA device"):
        measure_step(nn.Linear(2, 2), torch.randn(3, 2), forward)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnADevice:
    @pytest.mark.parametrize("precision", ["fp32", "amp", "amp-fp16", "bf16"])
    def test_every_phase_has_a_peak_and_the_optimizer_state_comes_in_the_first_step(self, precision):
        model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024))
        measured = measure_step(model, torch.randn(64, 1024), forward, precision, clip=True, timed_steps=2)
        assert tuple(measured.first_bytes) == tuple(measured.steady_bytes) == PHASES
        state = 2 * sum(p.nbytes for p in model.parameters())
        assert measured.steady_bytes["forward"] - measured.first_bytes["forward"] >= state
        assert measured.overall_bytes <= measured.reserved_bytes
        assert measured.step_seconds > 0

    def test_a_model_that_returns_its_loss_has_no_loss_phase(self):
        measured = measure_step(
            WithLoss(), torch.randn(8, 512), lambda m, b: loss_of(m, b, lambda outputs, _: default_loss(outputs))
        )
        assert tuple(measured.steady_bytes) == ("forward", "backward", "step")

    def test_a_model_on_the_meta_device_is_refused(self):
        with pytest.raises(ProfilerError, match="no values"):
            measure_step(nn.Linear(2, 2, device="meta"), torch.randn(3, 2), forward)

    def test_running_out_of_memory_is_said_in_a_sentence(self):
        with pytest.raises(ProfilerError, match="does not fit on"):
            measure_step(nn.Linear(1, 1 << 18), torch.zeros(1 << 22, 1), forward)
