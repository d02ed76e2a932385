"""Batches that are larger than those the plan was made for are told of, once for each size."""

import io
from pathlib import Path

import torch
from rich.console import Console

from memplan.batches import token_count
from memplan.described import find_machine
from memplan.plan_command import planned_for
from memplan.train import TrainingOptions, prepare_run, train
from profiler.source import load_source
from tests.test_cli import events

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)

    def forward(self, ids):
        return nn.functional.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), ids.flatten())

def build():
    return Net()

def batch(n, length):
    return {"ids": torch.randint(0, 20, (n, length))}

def example_batch(n):
    return batch(n, 8)

def train_batches(n):
    for length in (8, 5, 12, 10, 12, 16, 8):
        yield batch(n, length)
"""


def test_tokens_are_the_elements_of_the_first_integers_or_the_samples() -> None:
    assert token_count({"labels": torch.zeros(2), "ids": torch.zeros(2, 7, dtype=torch.int64)}) == 14
    assert token_count((torch.zeros(3, 8),)) == 3


def test_batches_with_longer_sequences_than_planned_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    plan = planned_for(load_source(path), find_machine(), 4, None).plan
    assert plan.prediction.made_for is not None
    assert plan.prediction.made_for.batch_elements == 8 * plan.micro_batch_size
    each = plan.micro_batch_size
    options = TrainingOptions(7 // plan.gradient_accumulation_steps, 1e-2, 1.0, 0, False, dashboard=False)
    prepare_run(tmp_path / "run", resume=False)
    said = io.StringIO()
    assert train(load_source(path), plan, tmp_path / "run", options, Console(file=said, width=300)) == 0
    told = [e["message"] for e in events(tmp_path / "run") if e["event"] == "warning"]
    assert [m.split(": longer")[0] for m in told] == [
        f"a micro-batch has {12 * each} elements, and the plan was made for {8 * each}",
        f"a micro-batch has {16 * each} elements, and the plan was made for {8 * each}",
    ]
    assert f"warning: {told[0]}" in said.getvalue()
