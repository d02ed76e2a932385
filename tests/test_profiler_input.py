"""What people give by mistake, or in another form than the contract's, and models that memory does not hold."""

import sys
import warnings
from collections import UserDict
from textwrap import dedent

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from profiler import ProfilerError, SourceError, load_source, profile_model, profile_source
from profiler.abstract import built_without_memory, memory_guarded
from profiler.contract import checked_batch, default_loss, plain_model
from profiler.errors import SourceError as Refusal
from profiler.hints import hint

HEAD = "import torch\nfrom torch import nn\n"
LOSS = "def loss(outputs, batch):\n    return outputs.float().square().mean()\n"
BATCH = "def example_batch(batch_size):\n    return torch.ones(batch_size, 4)\n"
HUGE = 1 << 20
"""Rows of a matrix of 64 GiB."""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(*parts: str, seq: int | None = None):
        (tmp_path / "model.py").write_text(HEAD + "".join(dedent(part) for part in parts))
        return load_source(tmp_path / "model.py", seq)

    return write


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (TensorDataset(torch.ones(2, 4)), r"is a TensorDataset; it must give one batch of it(.|\n)*next\(iter\("),
        (DataLoader(TensorDataset(torch.ones(2, 4))), "is a DataLoader; it must give one batch"),
        (Dataset, "is a class Dataset; it must give one batch"),
        (iter([1]), "is a list_iterator; it must give one batch"),
        ([torch.ones(2, 4)], r"is a list; .* return tuple\(batch\) if its members are the model's arguments"),
        (None, "is None; it must be a dict of keyword arguments"),
        ({1: torch.ones(2)}, "is a dict; it must be a dict of keyword arguments"),
        ({"x": np.ones(3)}, r"has a numpy ndarray at \['x'\]; .* torch.as_tensor"),
        ((torch.ones(2), [np.float32(1)]), r"has a numpy float32 at \[1\]\[0\]"),
    ],
)
def test_what_is_no_batch_is_refused_with_what_to_write(batch, sentence):
    with pytest.raises(SourceError, match=sentence):
        checked_batch(batch, "the batch")


def test_any_mapping_is_a_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x).sum()

    assert profile_model(Net(), UserDict(x=torch.ones(3, 4))).batch_size == 3


def test_the_one_scalar_of_a_tuple_is_the_loss():
    loss = torch.ones((), requires_grad=True)
    assert default_loss((torch.ones(2, 3), loss)) is loss
    with pytest.raises(SourceError, match="the model returns a tuple, which is no loss"):
        default_loss((loss, loss))


def test_wrappers_of_the_model_are_taken_off(source):
    plain = nn.Linear(4, 4)
    assert plain_model(torch.compile(plain)) is plain
    assert plain_model(nn.DataParallel(torch.compile(plain))) is plain
    found = source("def build_model():\n    return torch.compile(nn.Linear(4, 4))\n", BATCH, LOSS)
    assert [layer.path for layer in profile_source(found, 2).layers] == [""]
    inside = nn.Sequential(torch.compile(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert profile_model(inside, torch.ones(2, 4), loss=lambda y, _: y.sum()).forward_flops == 2 * 2 * 2 * 16 + 8


def test_lazy_modules_in_memory_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(4)
    with pytest.raises(SourceError, match="has lazy modules"):
        profile_model(lazy, torch.ones(2, 4))


SEQUENCE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
    def forward(self, tokens):
        return self.embed(tokens).mean()
"""


@pytest.mark.parametrize("name", ["seq_len", "sequence_length"])
def test_a_sequence_length_reaches_the_file(name, source):
    function = (
        f"def example_batch(batch_size, {name}=8):\n    return torch.zeros(batch_size, {name}, dtype=torch.long)\n"
    )
    assert source(SEQUENCE, function).example_batch(2).shape == (2, 8)
    found = source(SEQUENCE, function, function.replace("example", "train").replace("return", "yield"), seq=5)
    assert found.example_batch(2).shape == (2, 5)
    assert next(found.train_batches(2)).shape == (2, 5)
    assert profile_source(found, 2).batch_size == 2


def test_a_sequence_length_that_the_file_can_not_take_ends_in_what_to_write(source):
    found = source(SEQUENCE, BATCH, seq=5)
    with pytest.raises(SourceError, match=r"--seq 5 can not reach it: add a parameter seq_len\n +def example_batch\("):
        found.example_batch(2)


BUILDS = {
    "layers by numbers of a small tensor": """
        rates = torch.linspace(0, 0.5, 4).tolist()
        return nn.Sequential(*[nn.Dropout(r) for r in rates], nn.Linear({huge}, {huge}))""",
    "layers by a number": """
        nn.Dropout(torch.tensor(0.5).item())
        return nn.Linear({huge}, {huge}).to(torch.bfloat16).half()""",
    "weights from a small tensor of NumPy": """
        model = nn.Linear({huge}, {huge})
        model.register_buffer("table", torch.from_numpy(torch.arange(9.0).numpy()))
        return model""",
    "a mix of large and small": """
        torch.arange(3).tolist()
        model = nn.Linear({huge}, {huge}, bias=False)
        with torch.no_grad():
            model.weight *= torch.ones({huge})[:1]
            model.weight.copy_(torch.ones(1)).add_(torch.randn({huge}))
        return model""",
    "a device that is not here": """
        return nn.Linear({huge}, {huge}, device="cuda").cuda().to("cuda:0")""",
}


@pytest.mark.parametrize("what", BUILDS)
def test_a_model_larger_than_memory_is_built_without_it(what, source):
    build = BUILDS[what].format(huge=HUGE)
    model = source(f"def build_model():{build}\n").build_abstract()
    large = [p for p in model.parameters() if p.numel() >= HUGE]
    assert large
    assert all(p.is_meta for p in large)


def test_a_model_larger_than_memory_that_needs_its_numbers_is_refused_before_it_is_there(source):
    found = source(
        f"""
        def build_model():
            model = nn.Linear({HUGE}, {HUGE})
            model.scale = model.weight.abs().max().item()
            return model
        """
    )
    with pytest.raises(ProfilerError, match=r"model.py makes tensors of more than .* GiB.*call \.item\(\)"):
        found.build_abstract()
    with pytest.raises(ProfilerError, match=r"let build_model\(\)"):
        source(f"model = nn.Linear({HUGE}, {HUGE})\n")


def test_a_small_model_that_needs_its_numbers_is_real():
    def build() -> nn.Module:
        model = nn.Linear(1 << 10, 1 << 10)
        try:
            model.scale = model.weight.abs().max().item()
        except RuntimeError as error:
            raise Refusal(str(error)) from error
        return model

    model = built_without_memory(build, "model.py")
    assert not model.weight.is_meta
    assert model.scale == model.weight.abs().max().item()


def test_a_fault_of_the_file_is_met_twice_at_most():
    calls = []

    def build() -> nn.Module:
        calls.append(1)
        raise Refusal("no")

    with pytest.raises(Refusal):
        built_without_memory(build, "model.py")
    assert len(calls) == 2


def test_memory_that_was_given_back_does_not_count():
    guard = memory_guarded("here")
    guard._limit_bytes = 1 << 20
    with guard:
        for _ in range(5):
            torch.zeros(1 << 19, dtype=torch.uint8)
        kept = torch.zeros(1 << 19, dtype=torch.uint8)
        with pytest.raises(ProfilerError):
            torch.cat([kept, kept])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there CUDA is real")
def test_a_batch_on_a_device_that_is_not_here_profiles(source):
    cuda = 'def example_batch(n):\n    return torch.ones(n, 4, device="cuda").cuda()\n'
    assert profile_source(source("def build_model():\n    return nn.Linear(4, 4)\n", cuda, LOSS), 2).batch_size == 2


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn"), "compiled package; install it, or"),
        (ModuleNotFoundError("No module named 'triton'", name="triton.language"), "compiled package"),
        (OSError("CUDA_HOME environment variable is not set."), "it needs CUDA, or a compiler"),
        (RuntimeError("Error building extension 'fused'"), "it needs CUDA, or a compiler"),
        (AssertionError("Torch not compiled with CUDA enabled"), "it needs CUDA, or a compiler"),
        (RuntimeError("0 active drivers ([]). There should only be one."), "a Triton kernel asks for the memory"),
        (RuntimeError("x must be a CUDA tensor"), "a Triton kernel asks for the memory"),
        (ModuleNotFoundError("No module named 'mine'", name="mine"), "install it; if it is a compiled"),
        (ValueError("something else"), None),
    ],
)
def test_errors_of_compiled_code_come_with_what_to_do(error, advice):
    assert hint(error) is None if advice is None else advice in hint(error)


def test_a_file_whose_extension_can_not_be_compiled_says_what_to_do(source):
    with pytest.raises(SourceError, match=r"raises when it is run: ModuleNotFoundError.*take plain PyTorch"):
        source("import flash_attn\n")
