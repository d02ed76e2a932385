"""The contract with a model file: what is found, and what is said when something is missing."""

import pickle
import sys
from itertools import islice
from textwrap import dedent

import pytest
import torch
from torch import nn

from profiler import SourceError, call_model, load_source, profile_source

LINEAR = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)
"""
BATCH = """
def example_batch(batch_size):
    return torch.ones(batch_size, 4)
"""
LOSS = """
def loss(outputs, batch):
    return outputs.square().mean()
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(*parts: str, name: str = "model.py"):
        (tmp_path / name).write_text("".join(dedent(part) for part in parts))
        return load_source(tmp_path / name)

    return write


def test_the_single_class_that_constructs_without_arguments_is_the_model(source):
    found = source(LINEAR, "class Head(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n")
    assert type(found.build()).__name__ == "Net"
    assert found.name == "model"


def test_build_model_wins_over_a_module_level_model_and_that_over_classes(source):
    both = source(LINEAR, "model = nn.Linear(2, 3)\ndef build_model():\n    return nn.Linear(1, 1)\n")
    assert both.build().in_features == 1
    level = source(LINEAR, "model = nn.Linear(2, 3)\n", name="other.py")
    assert level.build() is level.build()
    assert level.build().in_features == 2


def test_abstract_models_take_no_memory_and_fall_back_where_building_needs_values(source):
    assert source(LINEAR).build_abstract().layer.weight.is_meta
    needs_values = source(
        LINEAR,
        "def build_model():\n    rates = torch.linspace(0, 1, 3)\n    nn.Dropout(rates[1].item())\n    return Net()\n",
    )
    assert not needs_values.build_abstract().layer.weight.is_meta


def test_the_file_runs_as_a_script_with_its_folder_on_the_path_and_without_its_main(source, tmp_path):
    (tmp_path / "neighbour.py").write_text("width = 7\n")
    found = source(
        """
        import sys
        from neighbour import width
        from torch import nn
        arguments = list(sys.argv)
        model = nn.Linear(width, 1)
        if __name__ == "__main__":
            raise SystemExit("training")
        """
    )
    assert found.build().in_features == 7
    assert found.module.arguments == [str(tmp_path / "model.py")]
    assert not list(tmp_path.glob("__pycache__/model*"))


def test_its_classes_pickle(source):
    model = source(LINEAR).build()
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_batches_spread_by_their_type():
    assert call_model(lambda *a, **k: (a, k), {"x": 1}) == ((), {"x": 1})
    assert call_model(lambda *a, **k: (a, k), (1, 2)) == ((1, 2), {})
    assert call_model(lambda *a, **k: (a, k), 5) == ((5,), {})


def test_train_batches_are_the_files_own_or_the_example_again_and_again(source):
    plain = source(LINEAR, BATCH)
    assert not plain.has_train_batches
    assert [b.shape for b in islice(plain.train_batches(3), 2)] == [(3, 4), (3, 4)]
    own = source(
        LINEAR, BATCH, "def train_batches(n):\n    yield torch.zeros(n, 4)\n    yield torch.ones(n, 4)\n", name="own.py"
    )
    assert own.has_train_batches
    assert [float(b.sum()) for b in own.train_batches(2)] == [0.0, 8.0]


def test_the_loss_is_a_scalar_output_or_its_loss_attribute_or_key(source):
    found = source(LINEAR)
    scalar = torch.ones((), requires_grad=True)

    class Output:
        loss = scalar

    for outputs in (scalar, Output(), {"loss": scalar}):
        assert found.loss(outputs, None) is scalar
    own = source(LINEAR, LOSS, name="own.py")
    assert own.loss(torch.ones(2, requires_grad=True), None).ndim == 0


def test_a_file_profiles_from_one_end_to_the_other(source):
    profile = profile_source(source(LINEAR, BATCH, LOSS), 8, "bf16", "sgd")
    assert (profile.model, profile.batch_size, profile.precision, profile.optimizer) == ("model", 8, "bf16", "sgd")
    assert profile.parameter_elements == 20
    assert [(p.batch_size, p.recompute) for p in profile.activations] == [(8, False), (1, False)]


FAULTS = {
    "an import that fails": ("import nowhere_at_all\n", "raises when it is run: ModuleNotFoundError", "import nowhere"),
    "a syntax error": ("def (:\n", "raises when it is run: SyntaxError", "model.py"),
    "a script that parses arguments": (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--data', required=True)\n"
        "parser.parse_args()\n",
        "it exits (2)",
        "parser.parse_args()",
    ),
    "no model": ("x = 1\n", "add build_model()", ""),
    "several models": (
        LINEAR + "class Other(Net):\n    pass\n",
        "several that could be meant (Net, Other): add build_model()",
        "",
    ),
    "build_model that raises": (
        "def build_model():\n    return 1 / 0\n",
        "build_model() of model.py raises: ZeroDivisionError",
        "return 1 / 0",
    ),
    "build_model that returns no module": ("def build_model():\n    return 3\n", "returned an int", ""),
    "no example batch": (LINEAR, "add example_batch(batch_size)", ""),
    "an example batch that raises": (
        LINEAR + "def example_batch(n):\n    return missing\n",
        "example_batch(2) of model.py raises: NameError",
        "return missing",
    ),
    "an example batch of the wrong type": (
        LINEAR + "def example_batch(n):\n    return [torch.ones(n, 4)]\n",
        "example_batch(2) of model.py is a list",
        "",
    ),
    "a forward that fails": (
        LINEAR + "def example_batch(n):\n    return torch.ones(n, 5)\n" + LOSS,
        "the forward pass of model.py fails on the example batch: RuntimeError",
        "return self.layer(x)",
    ),
    "a batch with a wrong key": (
        LINEAR + "def example_batch(n):\n    return {'y': torch.ones(n, 5)}\n" + LOSS,
        "the forward pass of model.py fails on the example batch: TypeError",
        "TypeError",
    ),
    "an output that is no loss": (LINEAR + BATCH, "add loss(outputs, batch) to model.py", ""),
    "a loss that raises": (
        LINEAR + BATCH + "def loss(outputs, batch):\n    return outputs['logits']\n",
        "loss(outputs, batch) of model.py raises",
        "return outputs['logits']",
    ),
    "a loss that is not one number": (
        LINEAR + BATCH + "def loss(outputs, batch):\n    return outputs\n",
        "returned a tensor of shape (2, 4); the loss must be a tensor with one element",
        "",
    ),
    "a loss that nothing leads to": (
        LINEAR + BATCH + "def loss(outputs, batch):\n    return outputs.detach().sum()\n",
        "no trainable parameter leads to",
        "",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_the_file_is_said_in_a_sentence_with_only_its_own_lines(fault, source):
    text, sentence, line = FAULTS[fault]
    with pytest.raises(SourceError) as error:
        profile_source(source(text), 2)
    message, lines = str(error.value), error.value.traceback
    assert sentence in message
    assert line in lines
    frames = [text for text in lines.splitlines() if text.lstrip().startswith("File ")]
    assert all("model.py" in frame for frame in frames)
    if "add " in message:
        assert len(message.splitlines()) == 4


def test_missing_files_folders_and_other_kinds_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path, sentence in (
        (tmp_path / "absent.py", "does not exist"),
        (tmp_path, "is a folder without config.json"),
        (tmp_path / "notes.txt", "is neither a Python file nor"),
    ):
        with pytest.raises(SourceError, match=sentence):
            load_source(path)


def test_a_failed_load_leaves_no_module_behind(source):
    before = set(sys.modules)
    with pytest.raises(SourceError):
        source("raise ValueError('no')\n")
    assert set(sys.modules) == before


def test_interrupts_pass_through(source):
    with pytest.raises(KeyboardInterrupt):
        source("raise KeyboardInterrupt\n")


def test_the_model_of_a_source_is_left_real_for_whoever_builds_it_next(source):
    found = source(LINEAR, BATCH, LOSS)
    profile_source(found, 2)
    model = found.build()
    assert isinstance(model.layer.weight, nn.Parameter)
    assert not model.layer.weight.is_meta
