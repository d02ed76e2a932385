"""The commands as a person runs them: what they print, write, and end with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.commands import PATHS, ROOT, Command, command_in

GOOD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True) for _ in range(12))
        self.head = nn.Linear(64, 50)
    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

def build_model():
    return Net()

def example_batch(batch_size):
    return torch.randint(0, 50, (batch_size, 12))

def loss(outputs, batch):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), batch.flatten())
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
TIERS = ("--gpu-memory", "6MiB", "--host-memory", "4MiB")


def memplan(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memplan", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The same in this process, which has imported torch: for what is one sentence of many."""
    return command_in(tmp_path, monkeypatch, capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "swap").mkdir()
    path = tmp_path / "net.py"
    path.write_text(GOOD)
    return path


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_profile_prints_layers_and_writes_its_files(model: Path, tmp_path: Path) -> None:
    files = ("--json", "p.json", "--html", "p.html", "--flamegraph", "p.speedscope.json")
    done = memplan("profile", model, "--batch-size", 4, *files, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "TransformerEncoderLayer x 12" in done.stdout
    found = json.loads((tmp_path / "p.json").read_text())
    assert {"schema", "model", "layers", "totals", "uncounted_ops", "peaks", "first_peaks"} <= found.keys()
    assert all(found["peaks"][f"{phase}_bytes"] > 0 for phase in ("forward", "backward", "step"))
    assert found["peaks"]["reserved_bytes"] >= found["totals"]["peak_bytes"]
    assert found["totals"]["parameters"] == 606_258
    assert "<html" in (tmp_path / "p.html").read_text()
    assert json.loads((tmp_path / "p.speedscope.json").read_text())["profiles"]


def test_profile_takes_every_precision_and_optimizer_that_the_profiler_knows(model: Path, tmp_path: Path) -> None:
    wishes = ("--precision", "amp-fp16", "--optimizer", "lion", "--clip", "--depth", 1)
    done = memplan("profile", model, *wishes, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "amp-fp16, lion with clipping" in done.stdout
    assert "clipping  " in done.stdout
    assert "more rows below: --depth 3 shows all" in done.stdout
    for words, names in ((("--precision", "fp8"), "fp32, amp"), (("--optimizer", "adam"), "adamw, adamw-fused")):
        done = memplan("profile", model, *words, folder=tmp_path)
        assert done.returncode == 2
        assert f"it must be one of {names}" in done.stderr


def test_measuring_without_a_gpu_is_a_sentence_at_once(model: Path, tmp_path: Path) -> None:
    done = memplan("profile", model, "--measure", folder=tmp_path)
    assert done.returncode == 2
    assert "CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measuring_prints_what_was_predicted_beside_what_was_measured(model: Path, tmp_path: Path) -> None:
    with_gpus = {name: value for name, value in ENVIRONMENT.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-m", "memplan", "profile", str(model), "--measure", "--clip"]
    done = subprocess.run(command, cwd=tmp_path, env=with_gpus, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    below = done.stdout.split("measured on ")[1]
    for row in ("forward", "backward", "clipping", "step (adamw)", "peak", "reserved", "nvidia-smi", "step time"):
        assert row in below


def test_calibrating_a_disk_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    done = memplan("calibrate", "--nvme", "gone", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("memplan: the NVMe directory gone does not exist")
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_stands_in_place_of_the_file_and_seq_sets_its_length(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 96, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flops = []
    for length in (16, 32):
        done = memplan("profile", ".", "-b", 2, "--seq", length, "--json", "p.json", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        flops.append(json.loads((tmp_path / "p.json").read_text())["totals"]["forward_flops"])
    assert flops[1] > 2 * flops[0]


def test_plan_train_resume_report_through_every_tier(model: Path, tmp_path: Path) -> None:
    nvme = ("--nvme", f"{tmp_path / 'swap'}:64MiB")
    done = memplan("plan", model, *TIERS, *nvme, "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    keys = {"schema", "zero_stage", "placements", "buckets", "micro_batch_size", "gradient_accumulation_steps"}
    assert keys | {"recompute", "prediction", "reasons", "alternatives"} <= plan.keys()
    prediction = {"gpu_peak_bytes", "host_bytes", "pinned_bytes", "nvme_bytes", "step_seconds", "bottleneck"}
    assert prediction <= plan["prediction"].keys()
    assert plan["reasons"]
    assert plan["alternatives"]
    assert {tier for p in plan["placements"] for tier in p.values()} >= {"gpu", "nvme"}
    config = json.loads((tmp_path / "out" / "ds_config.json").read_text())
    assert config["train_batch_size"] == 8

    words = ("train", model, "--plan", "out/plan.json", "--no-tui", "--out", "run")
    done = memplan(*words, "--steps", 4, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [e for e in events(tmp_path / "run") if e["event"] == "step"]
    assert [e["step"] for e in steps] == [1, 2, 3, 4]
    assert steps[-1]["memory_bytes"]["host"] == plan["prediction"]["host_bytes"]
    assert steps[-1]["memory_bytes"]["nvme"] == plan["prediction"]["nvme_bytes"]
    assert steps[-1]["peak_bytes"]["gpu"] <= plan["budget"]["gpu_bytes"]
    assert list((tmp_path / "swap").iterdir()) == []

    assert "holds a run" in memplan(*words, "--steps", 8, folder=tmp_path).stderr, "a run is never overwritten"
    done = memplan(*words, "--steps", 6, "--resume", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = [e for e in events(tmp_path / "run") if e["event"] == "step"]
    assert [e["step"] for e in again] == [1, 2, 3, 4, 5, 6]
    beyond = memplan(*words, "--steps", 3, "--resume", folder=tmp_path)
    assert beyond.returncode == 2
    assert "has come to step 6, beyond --steps 3" in beyond.stderr

    done = memplan(*words[:-1], "undisturbed", "--steps", 6, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    undisturbed = [e["loss"] for e in events(tmp_path / "undisturbed") if e["event"] == "step"]
    assert [e["loss"] for e in again] == pytest.approx(undisturbed, rel=1e-5)

    assert memplan("report", "run", folder=tmp_path).returncode == 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_plan_explains_its_step_in_the_terminal_and_on_a_page(model: Path, tmp_path: Path) -> None:
    done = memplan("plan", model, *TIERS, "--nvme", f"{tmp_path / 'swap'}:64MiB", "--explain", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("The bottleneck is ", "share its cores", "what would move it", "with a CPU twice as fast: "):
        assert text in done.stdout
    machine = ("--gpus", 1, "--gpu-memory", "2GiB", "--host-memory", "1GiB")
    done = memplan("plan", model, *machine, "--explain", "--html", "step.html", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("forward", "╵0 ", "▶ compute", "The bottleneck is compute", "written: step.html"):
        assert text in done.stdout
    assert "Memory by phase" in (tmp_path / "step.html").read_text()


def test_nothing_fits_ends_with_3_and_the_change_it_names_makes_it_fit(model: Path, tmp_path: Path) -> None:
    done = memplan("plan", model, "--gpu-memory", "60KiB", "--host-memory", "8MiB", folder=tmp_path)
    assert done.returncode == 3
    assert "short" in done.stderr
    assert "gpu" in done.stderr
    size = done.stderr.split("--gpu-memory ")[1].split()[0].rstrip(".,;)")
    done = memplan("plan", model, "--gpu-memory", size, "--host-memory", "8MiB", folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        ("import torch\nraise KeyError('weights')\n", "KeyError", "raise KeyError"),
        ("x = 1\n", "build_model", ""),
        (GOOD.replace("def example_batch", "def other"), "example_batch", ""),
        (GOOD.replace("x = layer(x)", "x = layer(x[..., :7])"), "forward", "x[..., :7]"),
        (GOOD.replace("def loss", "def other"), "loss(outputs, batch)", ""),
    ],
)
def test_a_bad_model_file_ends_with_2_and_the_persons_own_line(
    text: str, says: str, line: str, model: Path, tmp_path: Path, here: Command
) -> None:
    model.write_text(text)
    for command in (("profile", model), ("plan", model), ("train", model, "--no-tui", "--out", "run")):
        done = here(*command)
        assert done.code == 2, done.err
        assert says in done.err
        assert line in done.err
        assert str(ROOT) not in done.err, "no line of memplan's own code"
    assert not (tmp_path / "run" / "events.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--plan", "missing.json"), "missing.json"),
        (("--nvme", "nowhere:1GiB"), "nowhere"),
        (("--gpu-memory", "lots"), "--gpu-memory"),
        (("--resume",), "--out"),
        (("--resume", "--out", "nowhere"), "no checkpoint"),
    ],
)
def test_a_persons_mistake_is_a_sentence(words: tuple, says: str, model: Path, here: Command) -> None:
    done = here("train", model, "--no-tui", *words)
    assert done.code == 2
    assert says in done.err


def test_a_plan_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    assert memplan("plan", model, folder=tmp_path).returncode == 0
    model.write_text(GOOD.replace("nn.Embedding(50, 64)", "nn.Embedding(60, 64)"))
    done = memplan("train", model, "--plan", "plan.json", "--no-tui", folder=tmp_path)
    assert done.returncode == 2
    assert "embed.weight is [50, 64] in the plan and [60, 64] in the model" in done.stderr


def test_an_error_in_the_persons_data_ends_training_with_their_line(model: Path, tmp_path: Path) -> None:
    model.write_text(GOOD + "\ndef train_batches(n):\n    yield example_batch(n)\n    yield 1 / 0\n")
    done = memplan("train", model, "--no-tui", "--out", "run", folder=tmp_path)
    assert done.returncode in (1, 2)
    assert "1 / 0" in done.stderr
    assert events(tmp_path / "run")[-1]["reason"] == "failed"


def test_ctrl_c_saves_a_checkpoint_frees_the_disk_and_ends_with_130(model: Path, tmp_path: Path) -> None:
    words = ["train", model, *TIERS, "--nvme", f"{tmp_path / 'swap'}:64MiB", "--no-tui", "--out", "run"]
    command = [sys.executable, "-m", "memplan", *map(str, words), "--steps", "100000"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "run" / "events.jsonl"
        for _ in range(600):
            if log.exists() and '"step"' in log.read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert list((tmp_path / "swap").iterdir()) == []
    last = events(tmp_path / "run")[-1]
    assert last["reason"] == "interrupted"
    done = memplan("train", model, "--no-tui", "--out", "run", "--resume", "--steps", last["step"] + 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_plan_can_be_made_for_a_cluster_that_is_described(model: Path, tmp_path: Path) -> None:
    words = ("--machine", "h100-80gb", "--gpus", 8, "--nodes", 4, "--host-memory", "1TiB", "--nvme", "7GB/s")
    done = memplan("plan", model, "--batch-size", 32, *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32 x cuda" in done.stdout
    assert "Nobody said how large the disk is" in done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["gpus"] == 32


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--machine", "h1000"), "the nearest names are NVIDIA H100 SXM"),
        (("--machine", "h100", "--gpus", 0), "--gpus is 0"),
        (("--nodes", 2), "--machine NAME"),
        (("--nvme", "7GB/s"), "names a rate"),
        (("--machine", "h100", "--nvme", "56Gb/s"), "write bytes: 7GB/s"),
        (("--machine", "old.json"), "a machine file from another version: memplan.machine/0"),
    ],
)
def test_a_machine_that_can_not_be_is_a_sentence(
    words: tuple, says: str, model: Path, tmp_path: Path, here: Command
) -> None:
    (tmp_path / "old.json").write_text('{"schema": "memplan.machine/0"}')
    done = here("plan", model, *words)
    assert done.code == 2
    assert says in done.err


def test_doctor_says_what_it_found(tmp_path: Path) -> None:
    done = memplan("doctor", "--nvme", tmp_path, folder=tmp_path)
    assert done.returncode in (0, 1)
    assert "PyTorch" in done.stdout


def test_commands_without_a_page_or_a_dashboard_load_neither_plotly_nor_textual() -> None:
    code = "import sys, memplan.cli; print(sorted({'plotly', 'textual'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
