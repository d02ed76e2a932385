"""What export writes, transformers reads: the same numbers, in bf16 or fp32, in one file or in many."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import memplan.export
from memplan.errors import RunDirectoryError
from memplan.export import Dtype, export, keep_config
from offload.engine import Engine
from offload.errors import CheckpointError
from offload.plan import Precision
from profiler.source import load_source
from tests.loops import losses_of
from tests.models import GPT, FrozenGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, plan_for
from tests.test_checkpoint import engine_for
from tests.test_engine_odd_models import AWAY, plan_of

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def saved_run(model: nn.Module, run_dir: Path, precision: Precision) -> dict[str, torch.Tensor]:
    """A run of one step with its checkpoint; returns what the model has then."""
    with engine_for(model, plan_for(model, EVERY_TIER, run_dir, precision)) as engine:
        losses_of(engine, batches(1))
        engine.save_checkpoint(run_dir / "checkpoints").wait()
        return engine.state_dict()


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("kind", [GPT, TiedGPT, FrozenGPT])
def test_every_parameter_is_there_once_and_exact(kind: type[GPT], precision: Precision, tmp_path: Path) -> None:
    model = kind()
    expected = saved_run(model, tmp_path, precision)
    export(tmp_path, tmp_path / "out", Dtype.FP32)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_bf16_is_what_training_in_bf16_computes_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memplan.export, "PIECE_ELEMENTS", 1000)
    model = GPT()
    with engine_for(model, plan_for(model, EVERY_TIER, tmp_path, Precision.BF16)) as engine:
        losses_of(engine, batches(1))
        engine.save_checkpoint(tmp_path / "checkpoints").wait()
        with engine.gathered(model) as parameters:
            computed = {name: p.clone() for name, p in parameters.items()}
    written = export(tmp_path, tmp_path / "out")
    assert written.dtype is Dtype.BF16
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, computed[name]) for name, tensor in found.items())


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
@pytest.mark.parametrize("tied", [True, False])
def test_from_pretrained_reads_shards_an_index_and_the_configuration(tied: bool, dtype: Dtype, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    config = transformers.LlamaConfig(vocab_size=96, tie_word_embeddings=tied, **SIZES)
    (tmp_path / "tiny" / "config.json").write_text(config.to_json_string())
    source = load_source(tmp_path / "tiny")
    model = source.build()
    with Engine(
        model, plan_of(model, {"model.layers.0": AWAY, "lm_head": AWAY} if not tied else {"model.layers.0": AWAY})
    ) as engine:
        engine.backward(source.forward(engine, source.example_batch(2)))
        engine.step()
        engine.save_checkpoint(tmp_path / "run" / "checkpoints").wait()
        keep_config(source, model, tmp_path / "run")
        expected = engine.state_dict()
    written = export(tmp_path / "run", tmp_path / "out", dtype, shard_bytes=15_000)
    assert len(written.files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(written.files)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(again) is type(model)
    assert again.config.use_cache, "what training switched off is as it was"
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == dtype.of_torch
        torch.testing.assert_close(tensor.float(), expected[name].to(dtype.of_torch).float(), rtol=1e-2, atol=0)
        assert dtype is Dtype.BF16 or torch.equal(tensor, expected[name])


def test_a_folder_that_is_not_empty_is_left_alone_and_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    model = GPT(layers=1)
    with engine_for(model, plan_for(model, ((*AWAY,),))) as engine:
        for _ in range(2):
            losses_of(engine, batches(1))
            engine.save_checkpoint(tmp_path / "checkpoints").wait()
    with pytest.raises(RunDirectoryError, match="not empty"):
        export(tmp_path, tmp_path / "checkpoints")
    for number, name in ((2, "step-1"), (1, "")):
        (tmp_path / "checkpoints" / f"step-{number}" / "rank-0.safetensors").unlink()
        if name:
            written = export(tmp_path, tmp_path / "out")
            assert written.checkpoint.path.name == name
            assert "step-2" in written.damaged[0]
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*step-2.*step-1"):
        export(tmp_path, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
