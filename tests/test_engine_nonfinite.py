"""Gradients with NaN or infinity in them do what they do in plain PyTorch, and are counted."""

import copy
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from memplan.train import TrainingOptions, prepare_run, train
from offload.engine import Engine
from profiler.source import load_source
from tests.models import GPT, batches
from tests.plans import EVERY_TIER, RESIDENT, plan_for
from tui.source import Tail
from tui.view import RunView, fold

STEPS, BAD = 5, 2


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER])
def test_one_step_with_them_ends_where_plain_pytorch_does(
    placements: tuple, poison: float, max_norm: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    data = batches(STEPS)

    def poisoned(step: int):
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            if step == BAD:
                gradient[3] = poison
            return gradient

        return hook

    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with Engine(
        model, plan_for(model, placements, tmp_path), torch.optim.AdamW(model.parameters(), lr=1e-2), None, max_norm
    ) as engine:
        for step, tokens in enumerate(data):
            handles = [m.h[1].down.bias.register_hook(poisoned(step)) for m in (model, plain)]
            engine.backward(engine(tokens))
            engine.step()
            plain(tokens).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            for handle in handles:
                handle.remove()
            if step <= BAD:
                assert engine.gradient_norm == pytest.approx(norm, rel=1e-5, nan_ok=True)
            if step == BAD:
                assert not math.isfinite(norm)
        found = engine.state_dict()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(8, 8)])
    def forward(self, x):
        return self.h[0](x)

def build_model():
    return Net()

def example_batch(batch_size):
    return torch.ones(batch_size, 8)

def train_batches(batch_size):
    for factor in (1.0, 1.0, float("inf"), 1.0):
        yield torch.ones(batch_size, 8) * factor

def loss(outputs, batch):
    return outputs.square().mean()
"""


def test_a_run_counts_them_in_its_events_and_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    source = load_source(tmp_path / "net.py", None)
    model = source.build()
    plan = replace(
        plan_for(GPT(), (RESIDENT,)), parameter_shapes={n: tuple(p.shape) for n, p in model.named_parameters()}
    )
    plan = replace(plan, placements=plan.placements[:1])
    plan = replace(plan, prediction=replace(plan.prediction, gpu_peak_bytes=1 << 30, gpu_upper_bytes=1 << 30))
    prepare_run(tmp_path / "run", resume=False)
    console = Console(file=io.StringIO(), width=200)
    options = TrainingOptions(4, 1e-2, 1.0, 0, resume=False, dashboard=False)
    assert train(source, plan, tmp_path / "run", options, console) == 0
    log = tmp_path / "run" / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    # What such a step leaves in the weights makes the next one like it, as in plain PyTorch.
    assert [e["nonfinite_steps"] for e in events if e["event"] == "step"] == [0, 0, 1, 2]
    assert [e["skipped_steps"] for e in events if e["event"] == "step"] == [0, 0, 0, 0]
    notes = [e["message"] for e in events if e["event"] == "note" and "not finite" in e["message"]]
    assert len(notes) == 1
    assert "the gradients of step 3 are not finite" in notes[0]
    assert "2 steps had gradients that are not finite" in console.file.getvalue()
    view = RunView()
    for event in Tail(log).poll():
        view = fold(view, event)
    assert len(view.steps) == 4
    assert any("step 3 are not finite" in note.message for note in view.notes)
