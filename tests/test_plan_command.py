"""``memplan plan`` from files to files: profiles in place of models, other engines, calibrations, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memplan.configs.files import NAMES
from memplan.inputs import saved_profile
from memplan.plan_command import rates_for
from memplan.quick_rates import REFERENCE
from memplan.rates import Rates
from offload.plan import MomentFormat, OptimizerKind, Plan, Target, Tier
from profiler.errors import ProfileError
from profiler.profile import ModelProfile
from profiler.run import profile_source
from profiler.source import load_source
from tests.commands import Command, command_in
from tests.synthetic_profiles import RATES, machine_of, transformer

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x

def build_model():
    return Net()

def example_batch(batch_size):
    return torch.randn(batch_size, 64)

def loss(outputs, batch):
    return outputs.square().mean()
"""
TWO_GPUS = ("--machine", "h100-80gb", "--gpus", 2, "--host-memory", "64GiB")
HERE = ("--gpu-memory", "64MiB", "--host-memory", "64MiB")
ENGINES_FILES = {
    "memplan": {"ds_config.json", "accelerate-fsdp2.yaml", "torchtitan_config.py"},
    "deepspeed": {"ds_config.json", "accelerate-deepspeed.yaml", "huggingface-deepspeed.json"},
    "fsdp2": {"accelerate-fsdp2.yaml", "huggingface-fsdp2.json", "torchtitan_config.py"},
}


@pytest.fixture
def memplan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, in an empty directory."""
    return command_in(tmp_path, monkeypatch, capsys)


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    path = tmp_path / "rates.json"
    replace(RATES, device_bytes_per_second=1e12).save(path)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A profile in bf16 of a batch of 4."""
    path = tmp_path / "profile.json"
    transformer(3, precision="bf16").save(path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return path


def test_a_profile_stands_in_place_of_its_model(memplan: Command, model: Path, rates: Path) -> None:
    assert memplan("profile", model, "--batch-size", 4, "--json", "p.json").code == 0
    for words, out in (((model, "-b", 4, "--precision", "fp32"), "a"), (("p.json",), "b")):
        done = memplan("plan", *words, *HERE, "--calibration", rates, "--out", out)
        assert done.code == 0, done.err
    of_model, of_profile = (Plan.load(Path(out) / "plan.json") for out in "ab")
    assert of_model == of_profile


def test_a_profile_is_planned_with_its_batch_on_every_gpu(memplan: Command, saved: Path) -> None:
    done = memplan("plan", saved, *TWO_GPUS)
    assert done.code == 0, done.err
    plan = Plan.load(Path("plan.json"))
    assert (plan.gpus, plan.micro_batch_size * plan.gradient_accumulation_steps) == (2, 4)


def test_the_optimizer_can_be_named(memplan: Command, saved: Path) -> None:
    done = memplan("plan", saved, *TWO_GPUS, "--optimizer", "sgd-momentum")
    assert done.code == 0, done.err
    assert "sgd-momentum" in done.out
    assert Plan.load(Path("plan.json")).optimizer is OptimizerKind.SGD_MOMENTUM
    refused = memplan("plan", saved, *TWO_GPUS, "--optimizer", "sgd", "--engine", "fsdp2", "--out", "other")
    assert refused.code == 2
    assert "plans for fsdp2 count the state of AdamW; leave --optimizer sgd out" in refused.err


def test_moments_in_fewer_bits_are_named_and_said_wherever_the_plan_goes(memplan: Command, saved: Path) -> None:
    done = memplan("plan", saved, *TWO_GPUS, "--moments", "8bit")
    assert done.code == 0, done.err
    assert "adamw with moments in 8bit" in done.out
    assert "training makes other numbers" in " ".join(done.out.split())
    assert Plan.load(Path("plan.json")).moments is MomentFormat.EIGHT_BIT
    assert "the plan stores them in 8bit" in Path("NOTES.md").read_text()
    refused = memplan("plan", saved, *TWO_GPUS, "--moments", "bf16", "--engine", "deepspeed", "--out", "other")
    assert refused.code == 2
    assert "plans for deepspeed count moments in fp32; leave --moments bf16 out" in refused.err


@pytest.mark.parametrize("engine", ENGINES_FILES)
def test_each_engine_gets_its_plan_and_its_files(memplan: Command, saved: Path, engine: str) -> None:
    done = memplan("plan", saved, "--engine", engine, *TWO_GPUS, "--out", "made/here", "-b", 8)
    assert done.code == 0, done.err
    written = {path.name for path in Path("made/here").iterdir()}
    assert written >= {"plan.json", "NOTES.md", "launch.sh"} | ENGINES_FILES[engine]
    others = set().union(*ENGINES_FILES.values()) - ENGINES_FILES[engine]
    assert engine == "memplan" or not written & others
    plan = Plan.load(Path("made/here/plan.json"))
    assert (plan.target, plan.gpus, plan.device) == (Target(engine), 2, "cuda")
    assert plan.budget.host_bytes == 64 << 30
    assert all(name in done.out for name in written)
    if "ds_config.json" in written:
        assert json.loads(Path("made/here/ds_config.json").read_text())["train_batch_size"] == 8


@pytest.mark.parametrize("engine", ENGINES_FILES)
def test_the_timeline_is_told_for_every_engine(memplan: Command, saved: Path, engine: str) -> None:
    done = memplan("plan", saved, "--engine", engine, *TWO_GPUS, "--explain", "--html", "page.html")
    assert done.code == 0, done.err
    assert "<html" in Path("page.html").read_text()


@pytest.mark.parametrize("engine", ENGINES_FILES)
def test_a_calibration_is_what_the_plan_is_made_with(memplan: Command, saved: Path, rates: Path, engine: str) -> None:
    done = memplan("plan", saved, "--engine", engine, *TWO_GPUS, "--calibration", rates)
    assert done.code == 0, done.err
    assert any(RATES.source in reason for reason in Plan.load(Path("plan.json")).reasons)


@pytest.mark.parametrize("engine", ENGINES_FILES)
def test_what_fits_nowhere_ends_with_exit_code_3_and_no_plan(memplan: Command, tmp_path: Path, engine: str) -> None:
    transformer(3, 900_000_000, precision="bf16").save(tmp_path / "p.json")
    small = ("--machine", "h100-80gb", "--gpus", 2, "--gpu-memory", "8GiB", "--host-memory", "1GiB")
    done = memplan("plan", "p.json", "--engine", engine, *small)
    assert done.code == 3
    assert done.err.startswith("memplan: Nothing fits")
    assert "--host-memory" in done.err
    assert not Path("plan.json").exists()


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_engines_for_gpus_are_not_planned_on_the_cpu(memplan: Command, saved: Path, engine: str) -> None:
    done = memplan("plan", saved, "--engine", engine, *HERE)
    assert done.code == 2
    assert "planned for GPUs only" in done.err


def test_a_calibration_of_another_version_is_refused(memplan: Command, saved: Path, rates: Path) -> None:
    rates.write_text(rates.read_text().replace("memplan.rates/1", "memplan.rates/0"))
    done = memplan("plan", saved, *TWO_GPUS, "--calibration", rates)
    assert done.code == 2
    assert "rates.json is not a calibration that this version can read" in done.err
    assert "memplan calibrate" in done.err


def test_a_profile_of_another_version_is_refused(memplan: Command, saved: Path) -> None:
    data = json.loads(saved.read_text())
    saved.write_text(json.dumps({**data, "schema": "memplan.profile/1"}, indent=1))
    done = memplan("plan", saved, *TWO_GPUS)
    assert done.code == 2
    assert "profile.json is not a profile that this version can read" in done.err
    assert "memplan.profile/1" in done.err


@pytest.mark.parametrize("wish", [("--precision", "fp32"), ("--precision", "amp")])
def test_another_precision_than_the_profiles_is_refused(memplan: Command, saved: Path, wish: tuple[str, str]) -> None:
    done = memplan("plan", saved, *TWO_GPUS, *wish)
    assert done.code == 2
    assert "the profile is in bf16" in done.err
    assert memplan("plan", saved, *TWO_GPUS, "--precision", "bf16").code == 0


def test_fp16_is_trained_in_but_not_planned_for_yet(memplan: Command, saved: Path) -> None:
    done = memplan("plan", saved, *TWO_GPUS, "--precision", "fp16")
    assert done.code == 2
    assert "plans in fp16 are not made yet" in done.err.replace("\n", " ")


def test_a_sequence_length_beside_a_profile_is_refused(memplan: Command, saved: Path) -> None:
    done = memplan("plan", saved, *TWO_GPUS, "--seq", 128)
    assert done.code == 2
    assert "--seq" in done.err


@pytest.mark.parametrize("extra", [(), ("--from", "ds.json")])
def test_a_precision_that_no_engine_trains_in_is_a_sentence(memplan: Command, tmp_path: Path, extra: tuple) -> None:
    replace(transformer(3), precision="amp-fp16").save(tmp_path / "p.json")
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8}')
    done = memplan("plan", "p.json", *TWO_GPUS, *extra)
    assert done.code == 2
    assert "amp-fp16" in done.err


@pytest.mark.parametrize("words", [("--gpus", 0), ("--gpus", -1), ("--nodes", 0)])
def test_a_machine_without_gpus_or_nodes_is_refused(memplan: Command, saved: Path, words: tuple) -> None:
    done = memplan("plan", saved, "--machine", "h100-80gb", "--host-memory", "64GiB", *words)
    assert done.code == 2
    assert f"{words[0]} is {words[1]}; it must be at least 1" in done.err


def test_what_joins_the_nodes_is_said_by_an_option_or_remarked_on(memplan: Command, saved: Path) -> None:
    one = ("--machine", "h100-80gb", "--host-memory", "64GiB")
    refused = memplan("plan", saved, *one, "--network", "50GB/s")
    assert refused.code == 2
    assert "--network 50GB/s joins several nodes, and this is one" in refused.err
    assumed = memplan("plan", saved, *one, "--nodes", 2, "-b", 8)
    assert assumed.code == 0 and "25 GB/s a GPU are assumed" in assumed.err
    said = memplan("plan", saved, *one, "--nodes", 2, "-b", 8, "--network", "50GB/s")
    assert said.code == 0 and "assumed" not in said.err


def test_a_batch_that_gpus_can_not_divide_is_refused(memplan: Command, saved: Path) -> None:
    done = memplan("plan", saved, *TWO_GPUS, "-b", 5)
    assert done.code == 2
    assert "divided evenly over 2 GPUs" in done.err


@pytest.mark.parametrize("wish", [("--batch-size", 8), ("--precision", "bf16"), ("--engine", "fsdp2")])
def test_what_a_configuration_says_is_not_said_beside_it(memplan: Command, saved: Path, wish: tuple) -> None:
    Path("ds.json").write_text('{"train_batch_size": 8, "bf16": {"enabled": true}}')
    assert memplan("plan", saved, *TWO_GPUS, "--from", "ds.json").code == 0
    done = memplan("plan", saved, *TWO_GPUS, "--from", "ds.json", *wish)
    assert done.code == 2
    assert wish[0] in done.err
    assert "--from" in done.err


def test_a_saved_profile_is_told_from_other_files(tmp_path: Path) -> None:
    profile = transformer(2)
    path = tmp_path / "p.json"
    profile.save(path)
    assert saved_profile(path) == profile
    path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")))
    assert saved_profile(path) == profile, "whatever the spaces"
    for name, text in (("config.json", '{"model_type": "llama"}'), ("net.py", MODEL), ("a.json", "\xff\x00")):
        (tmp_path / name).write_text(text)
        assert saved_profile(tmp_path / name) is None
    assert saved_profile(tmp_path) is None
    assert saved_profile(tmp_path / "gone.json") is None
    (tmp_path / "cut.json").write_text('{"schema": "memplan.profile/2", "model":')
    with pytest.raises(ProfileError, match=r"cut\.json is not a profile"):
        saved_profile(tmp_path / "cut.json")


def test_a_profile_keeps_everything_on_its_way_through_a_file(model: Path, tmp_path: Path) -> None:
    found = profile_source(load_source(model), 4, "bf16")
    found.save(tmp_path / "p.json")
    assert saved_profile(tmp_path / "p.json") == found == ModelProfile.load(tmp_path / "p.json")


def test_a_described_disk_is_named_in_the_plan(memplan: Command, tmp_path: Path) -> None:
    transformer(3, 100_000_000, precision="bf16").save(tmp_path / "p.json")
    small = ("--machine", "h100-80gb", "--gpu-memory", "4GiB", "--host-memory", "6GiB", "--nvme", "7GB/s:1TiB")
    done = memplan("plan", "p.json", "--engine", "deepspeed", *small)
    assert done.code == 0, done.err
    plan = Plan.load(Path("plan.json"))
    assert plan.uses(Tier.NVME)
    assert plan.nvme_dir == "/mnt/nvme"


def test_a_file_that_no_plan_wrote_is_never_written_over(memplan: Command, saved: Path, tmp_path: Path) -> None:
    mine = tmp_path / "ds_config.json"
    mine.write_text('{"train_batch_size": 8}')
    done = memplan("plan", saved, *TWO_GPUS)
    assert done.code == 2
    assert "ds_config.json" in done.err
    assert "--out" in done.err
    assert mine.read_text() == '{"train_batch_size": 8}'
    assert memplan("plan", saved, *TWO_GPUS, "--out", "new").code == 0
    assert memplan("plan", saved, *TWO_GPUS, "--out", "new").code == 0, "what a plan wrote may be written anew"


def test_every_file_that_is_written_is_one_that_is_looked_for(memplan: Command, saved: Path, tmp_path: Path) -> None:
    for engine in ENGINES_FILES:
        assert memplan("plan", saved, *TWO_GPUS, "--engine", engine, "--out", engine).code == 0
        assert {p.name for p in (tmp_path / engine).iterdir()} <= {"plan.json", *NAMES}


@pytest.mark.parametrize(
    "words",
    [
        ("--host-memory", "99999999999TiB"),
        ("--gpu-memory", "99999999999TiB"),
        ("--nvme", "7GB/s:99999999999TiB"),
        ("--gpus", 10**20),
        ("--batch-size", 10**20),
    ],
)
def test_an_absurd_size_or_count_ends_in_a_sentence(memplan: Command, saved: Path, words: tuple) -> None:
    done = memplan("plan", saved, *TWO_GPUS, *words)
    assert done.code == 2
    assert done.err.startswith("memplan: ") and done.err.count("\n") == 1
    assert "no machine has more than 1 EiB" in done.err or "can be planned for" in done.err


def test_without_a_batch_size_each_gpu_takes_the_profiles_and_help_says_so(
    memplan: Command, saved: Path, tmp_path: Path
) -> None:
    assert memplan("plan", saved, *TWO_GPUS).code == 0
    batch = ModelProfile.load(saved).batch_size
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.micro_batch_size * plan.gradient_accumulation_steps == batch
    assert "of a profile its own on each GPU" in " ".join(memplan("plan", "--help").out.replace("│", " ").split())


def test_files_of_the_plan_before_do_not_stay_beside_those_of_another_engine(
    memplan: Command, saved: Path, tmp_path: Path
) -> None:
    assert memplan("plan", saved, *TWO_GPUS, "--engine", "fsdp2").code == 0
    (tmp_path / "mine.py").write_text("mine = 1")
    done = memplan("plan", saved, *TWO_GPUS, "--engine", "deepspeed")
    assert done.code == 0
    assert "removed from the plan before: accelerate-fsdp2.yaml, huggingface-fsdp2.json, lightning_fsdp2.py" in done.out
    assert (tmp_path / "mine.py").exists()
    assert not any((tmp_path / name).exists() for name in NAMES if "fsdp2" in name or "torchtitan" in name)


def measured_on(device: str, gpu_name: str | None, path: Path) -> Path:
    """A calibration of such a machine."""
    machine = {"device": device, "gpu_name": gpu_name}
    replace(REFERENCE, spread=0.1, machine=machine).save(path)
    return path


@pytest.mark.parametrize(
    ("device", "words", "said"),
    [
        ("cpu", TWO_GPUS, "was measured on a machine without a GPU, and the plan is for a machine with a GPU"),
        ("cuda", HERE, "was measured on a machine with a GPU, and the plan is for a machine without a GPU"),
    ],
)
def test_a_calibration_of_another_kind_of_machine_is_refused(
    device: str, words: tuple, said: str, memplan: Command, saved: Path, tmp_path: Path
) -> None:
    rates = measured_on(device, None, tmp_path / "rates.json")
    done = memplan("plan", saved, *words, "--calibration", rates)
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(("gpu_name", "spread"), [("NVIDIA H100 80GB HBM3", 0.1), ("NVIDIA A100", REFERENCE.spread)])
def test_a_calibration_of_another_gpu_predicts_as_a_reference_does(
    gpu_name: str, spread: float, tmp_path: Path
) -> None:
    path = measured_on("cuda", gpu_name, tmp_path / "rates.json")
    machine = replace(machine_of(1 << 36, 1 << 36, device="cuda"), gpu_name="NVIDIA H100 SXM")
    assert rates_for(Rates.load(path), machine, path).spread == spread
