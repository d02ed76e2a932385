"""Weights from safetensors files: the same numbers, tensor by tensor, and a sentence where they can not be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import memplan
from offload.engine import Engine
from offload.errors import WeightsError
from offload.on_meta import on_meta
from offload.plan import Precision
from offload.weight_files import INDEX, WHOLE
from tests.models import GPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, counted, plan_for
from tests.test_engine_odd_models import AWAY, plan_of


def save(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 3) -> Path:
    """The tensors as a folder with shards and an index, as Hugging Face has it."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    files = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n].contiguous().clone() for n in names if files[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a safetensors file of the model has: a tied parameter once."""
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def on_meta_model(kind: Any) -> nn.Module:
    with on_meta():
        return kind()


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("kind", [GPT, TiedGPT])
@pytest.mark.parametrize("shift", range(len(EVERY_TIER)))
def test_shards_give_their_numbers_to_the_bit_in_every_placement(
    kind: type[GPT], precision: Precision, shift: int, tmp_path: Path
) -> None:
    source = kind()
    folder = save(saved(source), tmp_path / "weights")
    for model in (on_meta_model(kind), kind()):
        plan = plan_for(model, EVERY_TIER[shift:] + EVERY_TIER[:shift], tmp_path, precision)
        with Engine(model, plan, weights=folder) as engine:
            found = engine.state_dict()
        assert all(torch.equal(found[name], p) for name, p in source.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_files_in_other_types_fill_fp32_masters(dtype: torch.dtype, tmp_path: Path) -> None:
    source = GPT().to(dtype)
    save_file(saved(source), tmp_path / "one.safetensors")
    model = on_meta_model(GPT)
    with Engine(
        model, plan_for(model, (AWAY,), precision=Precision.BF16), weights=tmp_path / "one.safetensors"
    ) as engine:
        found = engine.state_dict()
    assert all(torch.equal(found[name], p.float()) for name, p in source.named_parameters())


def test_a_folder_may_be_named_as_a_string(tmp_path: Path) -> None:
    source, model = GPT(), GPT()
    folder = save(saved(source), tmp_path / "weights")
    with Engine(model, plan_for(model, (AWAY,)), weights=str(folder)) as engine:
        found = engine.state_dict()
    assert all(torch.equal(found[name], p) for name, p in source.named_parameters())


def test_training_goes_on_from_them(tmp_path: Path) -> None:
    source = GPT()
    save_file(saved(source), tmp_path / WHOLE)
    losses = []
    for model, weights in ((source, None), (on_meta_model(GPT), tmp_path)):
        engine, *_ = memplan.initialize(model, counted(plan_for(model, EVERY_TIER, tmp_path), model), weights=weights)
        losses.append([])
        for tokens in batches(3):
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
            losses[-1].append(loss.item())
        engine.close()
    assert losses[0] == losses[1]


class Odd(nn.Module):
    """A buffer that is saved, one that is not, integers that are a parameter, and one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)
        self.none = nn.Parameter(torch.zeros(0, 3))


def test_buffers_and_parameters_that_no_unit_owns_are_read_too(tmp_path: Path) -> None:
    source = Odd()
    source.norm.running_mean += 3
    source.norm.num_batches_tracked += 5
    source.table.data *= 7
    # What a model computes for itself is not read, though files of other versions have it.
    save_file({**saved(source), "frequencies": torch.zeros(9), "norm.frequencies": torch.zeros(9)}, tmp_path / WHOLE)
    del source.frequencies
    with on_meta():
        model = Odd()
    model.table, model.none = (nn.Parameter(p.to("meta"), p.requires_grad) for p in (model.table, model.none))
    with Engine(model, plan_of(model, {"linear": AWAY}), weights=tmp_path) as engine:
        found = {**dict(model.named_buffers()), **engine.state_dict()}
    assert all(torch.equal(found[name], tensor) for name, tensor in source.state_dict().items())
    assert torch.equal(found["frequencies"], torch.arange(4.0))


def changed(how: str, folder: Path) -> Path:
    """Files of a GPT with one thing wrong."""
    tensors = saved(GPT())
    if how == "missing":
        del tensors["h.0.up.bias"]
    elif how == "unexpected":
        tensors["extra.weight"] = torch.zeros(3)
    elif how == "another size":
        tensors["h.1.up.bias"] = torch.zeros(3)
    elif how == "quantised":
        tensors["h.1.up.weight"] = tensors["h.1.up.weight"].to(torch.float8_e4m3fn)
    folder = save(tensors, folder)
    shard = folder / "model-00002-of-00003.safetensors"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif how == "no safetensors":
        shard.write_text("<html>")
    elif how == "a shard is missing":
        shard.unlink()
    elif how == "no index":
        (folder / INDEX).write_text("{}")
    elif how == "nothing there":
        (folder / INDEX).unlink()
    elif how == "no such file":
        return folder / "gone.safetensors"
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "lacks 1 of its tensors (h.0.up.bias)"),
        ("unexpected", "has 1 that it does not (extra.weight)"),
        ("another size", "h.1.up.bias is [3], the model's is [128]"),
        ("quantised", "h.1.up.weight is of type F8_E4M3; quantised"),
        ("truncated", "model-00002-of-00003.safetensors can not be read"),
        ("no safetensors", "model-00002-of-00003.safetensors can not be read"),
        ("a shard is missing", "lacks model-00002-of-00003.safetensors, one of 3 files"),
        ("no index", "is no index of safetensors files"),
        ("nothing there", "holds neither model.safetensors nor"),
        ("no such file", "gone.safetensors can not be read"),
    ],
)
def test_what_can_not_be_read_is_refused_before_anything_changes(how: str, words: str, tmp_path: Path) -> None:
    folder = changed(how, tmp_path / "weights")
    model = GPT()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(WeightsError) as refused:
        Engine(model, plan_for(model, (AWAY,)), weights=folder)
    assert words in str(refused.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_file_with_two_values_for_what_the_model_ties_is_refused(tmp_path: Path) -> None:
    tensors = saved(GPT())
    for same in (True, False):
        if same:
            tensors["head.weight"] = tensors["wte.weight"].clone()
        else:
            tensors["head.weight"] = tensors["head.weight"] + 1
        save_file(tensors, tmp_path / WHOLE)
        model = on_meta_model(TiedGPT)
        if same:
            Engine(model, plan_for(model, (AWAY,)), weights=tmp_path).close()
        else:
            with pytest.raises(WeightsError, match="different numbers for wte"):
                Engine(model, plan_for(model, (AWAY,)), weights=tmp_path)


FAMILIES = {
    "LlamaForCausalLM": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "GPT2LMHeadModel": {},
    "BertForMaskedLM": {},
}


@pytest.mark.parametrize("context", [on_meta, lambda: torch.device("meta")], ids=["ours", "torch's"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_is_read_as_transformers_reads_it(name: str, context: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = cls.config_class(vocab_size=96, **sizes, **FAMILIES[name])
    source = cls(config)
    source.save_pretrained(tmp_path / "all", max_shard_size="30KB")
    with context():
        model = cls(config)
    with Engine(model, plan_of(model, {}), weights=tmp_path / "all") as engine:
        found = {**dict(model.named_buffers()), **engine.state_dict()}
    for tensors in (source.named_parameters(), source.named_buffers()):
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors)


def test_the_body_of_a_transformers_model_alone_has_names_without_its_own(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)
    source = transformers.GPT2LMHeadModel(config)
    source.transformer.save_pretrained(tmp_path)  # as on the hub: "wte.weight", not "transformer.wte.weight"
    with on_meta():
        model = transformers.GPT2LMHeadModel(config)
    with Engine(model, plan_of(model, {"transformer.h.0": RESIDENT}), weights=tmp_path) as engine:
        found = engine.state_dict()
    assert all(torch.equal(found[name], p) for name, p in source.named_parameters())


def test_what_transformers_itself_loads_on_the_way_stays(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4))
    source.save_pretrained(tmp_path)
    with on_meta():
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    with Engine(model, plan_of(model, {"transformer.h.0": AWAY})) as engine:
        found = engine.state_dict()
    assert all(torch.equal(found[name], p) for name, p in source.named_parameters())
