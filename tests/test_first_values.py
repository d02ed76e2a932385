"""What training starts from: a folder's weights, random ones, and how the model is built for that."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from memplan.first_values import has_room, start_of, whole_bytes
from memplan.problem import Problem
from memplan.start import StartBytes, room_bytes
from memplan.train import TrainingOptions, train
from offload.errors import WeightsError
from offload.plan import Budget, Plan, Precision, Tier
from offload.residency import UnitShape
from offload.shards import Shards
from profiler import load_source
from profiler.contract import ModelSource
from tests.plans import counted
from tests.test_engine_odd_models import AWAY, plan_of
from tests.test_profiler_huggingface import MODELS

MODEL_FILE = """
import torch
from torch import nn

def build_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    if {reads}:
        model[0].weight.sum().item()
    return model

def example_batch(batch_size):
    return torch.ones(batch_size, 8)
"""


def llama(folder: Path, *, weights: bool) -> Path:
    """A downloaded folder."""
    pytest.importorskip("transformers")
    kind, config, _ = MODELS["LlamaForCausalLM"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    if weights:
        torch.manual_seed(9)
        load_source(folder).build().save_pretrained(folder, max_shard_size="30KB")
    return folder


def plan_for_source(source: ModelSource, budget_bytes: int = 1 << 40) -> Plan:
    model = source.build()
    units = {n: AWAY for n, _ in model.named_modules() if n.startswith("model.layers.") and n.count(".") == 2}
    plan = replace(plan_of(model, units), micro_batch_size=2)
    plan = replace(plan, budget=Budget(budget_bytes // 2, budget_bytes - budget_bytes // 2, 0))
    return counted(plan, model)


def test_a_folder_with_weights_is_started_from_and_its_configuration_alone_is_random(tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama", weights=True)
    source = load_source(folder)
    start = start_of(source, plan_for_source(source), resume=False)
    assert start.weights == folder
    assert start.remark == f"starting from the weights in {folder}"
    assert start.model.lm_head.weight.is_meta
    for path, why in (
        (folder / "config.json", "config.json has none; name its folder"),
        (llama(tmp_path / "bare", weights=False), "bare has no weights in safetensors files"),
    ):
        source = load_source(path)
        start = start_of(source, plan_for_source(source), resume=False)
        assert start.weights is None
        assert "starting from random weights" in start.remark
        assert why in start.remark
        assert not any(p.is_meta for p in start.model.parameters())


def test_a_resumed_run_reads_no_weights(tmp_path: Path) -> None:
    source = load_source(llama(tmp_path / "llama", weights=True))
    start = start_of(source, plan_for_source(source), resume=True)
    assert (start.weights, start.remark) == (None, None)


@pytest.mark.parametrize("reads", [False, True])
def test_a_model_that_the_host_has_no_room_for_is_built_without_memory_where_it_can_be(
    reads: bool, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(MODEL_FILE.format(reads=reads))
    source = load_source(tmp_path / "net.py")
    plan = plan_for_source(source)
    assert whole_bytes(plan) == (64 + 8 + 8 + 8) * 4
    assert start_of(source, plan, resume=False).remark is None
    small = plan_for_source(source, whole_bytes(plan) - 1)
    assert room_bytes(small.budget, small.device, processes=1) == whole_bytes(plan) - 1
    start = start_of(source, small, resume=False)
    assert start.model[0].weight.is_meta is not reads
    assert "the model, 352 B in fp32, is too large for the host: " in start.remark
    assert ("it is built there all the same, for its code reads numbers" in start.remark) is reads
    assert ("it is made unit by unit" in start.remark) is not reads


def test_room_is_needed_for_the_model_of_every_process_of_a_node(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL_FILE.format(reads=False))
    source = load_source(tmp_path / "net.py")
    room = Budget(0, 8 * (64 + 8 + 8 + 8) * 4, 0)
    plan = replace(plan_for_source(source), device="cuda", gpus=8, budget=room)
    assert has_room(plan)
    assert has_room(replace(plan, gpus=16, nodes=2))
    short = replace(plan, budget=replace(room, host_bytes=room.host_bytes - 1))
    assert not has_room(short)
    start = start_of(source, short, resume=False)
    assert start.model[0].weight.is_meta
    assert start.remark == (
        "the model of each of 8 processes, 352 B in fp32, is too large for the host: it is made unit by unit"
    )
    assert not has_room(replace(plan, gpus=16))
    assert has_room(replace(plan, gpus=16, device="cpu", budget=replace(room, gpu_bytes=room.host_bytes // 16)))


def test_a_model_is_built_on_meta_where_the_plan_says_so(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL_FILE.format(reads=False))
    source = load_source(tmp_path / "net.py")
    start = start_of(source, replace(plan_for_source(source), on_meta=True), resume=False)
    assert start.model[0].weight.is_meta


def trained(folder: Path, out: Path) -> str:
    """One step by the command's own loop; what it prints."""
    source = load_source(folder, 16)
    out.mkdir()
    text = StringIO()
    options = TrainingOptions(1, 0.0, 1.0, 0, resume=False, dashboard=False)
    assert train(source, plan_for_source(source), out, options, Console(file=text)) == 0
    return text.getvalue()


def test_training_begins_with_the_loss_of_the_folders_weights(tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama", weights=True)
    text = trained(folder, tmp_path / "run")
    assert f"starting from the weights in {folder}" in text.replace("\n", "")
    source = load_source(folder, 16)
    torch.manual_seed(0)
    whole = type(source.build()).from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # as the loop draws its first batch
        batch = next(source.train_batches(2))
    expected = whole(**batch).loss.item()
    event = next(e for e in map(json.loads, (tmp_path / "run/events.jsonl").read_text().splitlines()) if "loss" in e)
    assert event["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_folder_of_other_weights_is_a_sentence_that_names_the_way_around(tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama", weights=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match=r"lacks 9 of its tensors .*config.json to start from random weights"):
        trained(folder, tmp_path / "run")


def test_what_taking_over_takes_is_counted_unit_by_unit_where_the_host_can_not_hold_the_models() -> None:
    shapes = (UnitShape.of("", [64]), UnitShape.of("a", [1 << 20]), UnitShape.of("b", [1 << 18]))
    elements = sum(shape.elements for shape in shapes)
    model, largest = 4 * elements, 4 << 20
    for processes in (1, 8):
        room = processes * (model + 2 * largest)
        budget, profile = Budget(0, room, 0), SimpleNamespace(parameter_elements=elements)
        problem = Problem(profile, shapes, "cuda", processes, 1, budget, None, Precision.BF16, 1)
        assert not problem.on_meta
        assert problem.attach_bytes(100) == model + 2 * largest
        assert problem.attach_bytes(2 * model) == 2 * model + 2 * largest
        smaller = problem.with_budget(Tier.HOST, room - 1)
        root = 4 * shapes[0].padded(Shards(3, processes)).elements
        assert smaller.on_meta
        assert smaller.attach_bytes(100) == 100 + root + 2 * largest
        assert replace(smaller, device="cpu").attach_bytes(100) == 100


def test_a_root_unit_that_is_the_largest_is_made_once_and_on_its_way_once() -> None:
    start = StartBytes.of(1000, (UnitShape.of("", [640]), UnitShape.of("a", [64])))
    assert (start.model_bytes, start.passing_bytes, start.made_bytes) == (4000, 2 * 4 * 640, 2 * 4 * 640)
    alike = StartBytes.of(1000, (UnitShape.of("", [640]), UnitShape.of("a", [640])))
    assert alike.made_bytes == 3 * 4 * 640
