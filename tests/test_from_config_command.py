"""``memplan plan --from`` as a command: whose step is shown, what is written, and wishes beside an "auto"."""

import json
from pathlib import Path

import pytest

from memplan.changes import effective
from memplan.lint.document import read_document
from memplan.lint.view import View
from offload.plan import Plan
from tests.commands import Command, command_in
from tests.synthetic_profiles import transformer

Z = "zero_optimization"
MACHINE = ("--machine", "h100-80gb", "--gpus", 2, "--host-memory", "256GiB")
SLOW = {
    "train_batch_size": 8,
    "bf16": {"enabled": True},
    "gradient_clipping": 0.3,
    Z: {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
FAST = {"train_batch_size": 8, "bf16": {"enabled": True}, Z: {"stage": 3, "stage3_max_live_parameters": 900_000_000}}


@pytest.fixture
def memplan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, in a directory with a profile of 3.6e8 parameters."""
    transformer(6, 40_000_000, 60_000_000, precision="bf16").save(tmp_path / "p.json")
    return command_in(tmp_path, monkeypatch, capsys)


def given(config: dict) -> str:
    Path("mine.json").write_text(json.dumps(config))
    return "mine.json"


def test_a_persons_own_step_is_shown_first_and_each_says_whose_it_is(memplan: Command) -> None:
    done = memplan("plan", "p.json", *MACHINE, "--from", given(SLOW), "--explain", "--out", "out", "--html", "s.html")
    assert done.code == 0, done.err
    titles = [line for line in done.out.splitlines() if "one step, " in line]
    assert [title.partition(":")[0] for title in titles] == ["mine.json", "best for DeepSpeed"]
    assert done.out.count("The bottleneck is") == 2
    assert done.out.count("what would move it") == 1
    page = Path("s.html").read_text()
    assert page.index("mine.json, one step: ") < page.index("best for DeepSpeed, one step: ")
    assert page.count("<h2>What would move it</h2>") == page.count("<h2>Why this plan</h2>") == 1
    seconds = next(line for line in done.out.splitlines() if line.lstrip().startswith("mine.json  ")).split()[1]
    assert titles[0].startswith(f"mine.json: one step, {seconds} ")


def test_where_nothing_is_better_only_that_step_is_shown(memplan: Command) -> None:
    done = memplan("plan", "p.json", *MACHINE, "--from", given(FAST), "--explain", "--out", "out")
    assert done.code == 0, done.err
    assert "There is nothing to change." in done.out
    assert done.out.count("one step, ") == done.out.count("mine.json: one step, ") == 1


def test_where_nothing_fits_the_step_is_shown_all_the_same(memplan: Command) -> None:
    small = ("--machine", "h100-80gb", "--gpus", 2, "--host-memory", "1MiB", "--gpu-memory", "800MiB")
    done = memplan("plan", "p.json", *small, "--from", given(SLOW), "--explain", "--out", "out")
    assert done.code == 3
    assert done.out.count("mine.json: one step, ") == 1
    assert not list(Path("out").iterdir())


def test_the_files_of_the_better_one_have_a_persons_numbers(memplan: Command) -> None:
    assert memplan("plan", "p.json", *MACHINE, "--from", given(SLOW), "--out", "out").code == 0
    config = json.loads(Path("out/ds_config.json").read_text())
    assert config["gradient_clipping"] == 0.3
    assert config[Z]["stage"] == Plan.load(Path("out/plan.json")).zero_stage
    assert effective(View(read_document(Path("out/ds_config.json"))), f"{Z}.offload_optimizer.device") == "none"


def test_a_file_with_auto_takes_batch_and_precision_from_the_command(memplan: Command) -> None:
    auto = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, Z: {"stage": 2}}
    refused = memplan("plan", "p.json", *MACHINE, "--from", given(auto))
    assert refused.code == 2
    assert "say by --batch-size" in " ".join(refused.err.split())
    done = memplan("plan", "p.json", *MACHINE, "--from", "mine.json", "-b", 8, "--precision", "bf16", "--out", "out")
    assert done.code == 0, done.err
    assert "bf16.enabled true" in " ".join(done.out.split())
    assert "train_batch_size 8" in " ".join(done.out.split())


def test_a_batch_that_is_not_in_the_file_must_be_written_into_it(memplan: Command) -> None:
    config = given({"bf16": {"enabled": True}, Z: {"stage": 2}})
    done = memplan("plan", "p.json", *MACHINE, "--from", config, "--batch-size", 32)
    assert done.code == 2
    assert 'write "train_batch_size": 32 into it, and leave --batch-size out' in done.err


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
        ({"tensor_parallel": {"tp": {"tp_size": 2}}}, "tensor_parallel.tp.tp_size"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
    ],
)
def test_other_parallelism_than_of_data_is_refused_by_name(memplan: Command, config: dict, key: str) -> None:
    done = memplan("plan", "p.json", *MACHINE, "--from", given({**FAST, **config}))
    assert done.code == 2
    assert f"{key} is 2, and --from prices data parallelism only" in done.err


def test_a_stage_that_others_fill_in_must_be_given_as_a_number(memplan: Command) -> None:
    done = memplan("plan", "p.json", *MACHINE, "--from", given({**FAST, Z: {"stage": "auto"}}))
    assert done.code == 2
    assert 'zero_optimization.stage is "auto", which Accelerate or the Trainer fills in' in done.err


def test_a_ratio_that_is_no_share_is_a_sentence(memplan: Command) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 7}}
    done = memplan("plan", "p.json", *MACHINE, "--from", given({**FAST, Z: zero}))
    assert done.code == 2
    assert "offload_optimizer.ratio is 7; it is the share that the CPU updates: write 0 to 1" in done.err


def test_a_calibration_that_is_a_list_is_a_sentence(memplan: Command) -> None:
    Path("rates.json").write_text("[1]")
    done = memplan("plan", "p.json", *MACHINE, "--calibration", "rates.json")
    assert done.code == 2
    assert "rates.json is not a calibration that this version can read (it holds no object)" in done.err


def test_an_error_that_is_carried_over_is_among_what_to_change(memplan: Command) -> None:
    config = {**SLOW, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "max_grad_norm": 1.0}}}
    done = memplan("plan", "p.json", *MACHINE, "--from", given(config), "--out", "out")
    assert done.code == 0, done.err
    said = " ".join(done.out[done.out.index("optimizer.params.max_grad_norm", done.out.index(" better")) :].split())
    assert "still there" in said and "mended by you" in said
