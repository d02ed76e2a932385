"""Files with one place that is not as it was written: what reads them takes them, or says where and what is wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memplan.described import load_machine
from memplan.errors import MachineError
from memplan.rates import Rates
from offload.errors import PlanError
from offload.plan import Plan
from profiler.calibration import Calibration, Rate
from profiler.errors import ProfileError, ProfilerError
from profiler.profile import ModelProfile
from tests.commands import Command, command_in
from tests.fake_run import make_events, write_run
from tests.spoiled import other_numbers, spoiled, spoiled_texts
from tests.synthetic_profiles import RATES, machine_of, transformer
from tests.test_plan_by_hand import planned
from tests.test_plan_command import MODEL, TWO_GPUS

KERNELS = Calibration("NVIDIA H200", {"matmul/bfloat16": Rate(((1.0, 4.0),), (0.5, None))}, {"call": 1e-6})
MACHINE = machine_of(1 << 40, 1 << 40, 1 << 40)
MEASURED = replace(
    RATES,
    device_bytes_per_second=1e12,
    kernels=KERNELS,
    machine=MACHINE.to_dict(),
    facts={"torch": "2"},
    tables={"link": (("a", "b"), ("1", "2"))},
    skipped=("this: that",),
)
PROFILE = transformer(2, inputs=0.1, precision="bf16")
LONGEST_SENTENCE = 500
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
commands = settings(in_one_folder, max_examples=15)


def written(save: Callable[[Path], None], folder: Path) -> str:
    save(folder / "whole.json")
    return (folder / "whole.json").read_text()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each kind of file, as it is written."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        "plan": written(planned().save, folder),
        "profile": written(PROFILE.save, folder),
        "rates": written(MEASURED.save, folder),
        "kernels": written(KERNELS.save, folder),
        "machine": json.dumps(MACHINE.to_dict()),
    }


@pytest.mark.parametrize(
    ("kind", "load", "error"),
    [
        ("plan", Plan.load, PlanError),
        ("profile", ModelProfile.load, ProfileError),
        ("rates", Rates.load, MachineError),
        ("kernels", Calibration.load, ProfilerError),
        ("rates", Calibration.load, ProfilerError),
        ("machine", load_machine, MachineError),
        ("rates", load_machine, MachineError),
    ],
)
@in_one_folder
@given(data=st.data())
def test_a_file_with_one_spoiled_place_is_read_or_refused_in_one_sentence_that_names_it(
    kind: str, load: Callable[[Path], Any], error: type[Exception], texts: dict[str, str], tmp_path: Path, data: Any
) -> None:
    path = tmp_path / "spoiled.json"
    path.write_text(data.draw(spoiled_texts(texts[kind])))
    try:
        load(path)
    except error as caught:
        said = str(caught)
        assert str(path) in said
        assert len(said.encode().splitlines()) == 1, "and a terminal can show it"
        assert len(said) < LONGEST_SENTENCE + len(str(path))


@pytest.fixture
def memplan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, in an empty directory; an error that gets out of it fails the test."""
    return command_in(tmp_path, monkeypatch, capsys)


def changed(text: str) -> st.SearchStrategy[str]:
    return spoiled_texts(text) | other_numbers(text)


@commands
@given(data=st.data())
def test_report_of_a_run_with_a_spoiled_plan_is_written_or_refused(memplan: Command, tmp_path: Path, data: Any) -> None:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    write_run(run, make_events(done=2))
    plan = run / "plan.json"
    plan.write_text(data.draw(changed(plan.read_text())))
    done = memplan("report", run)
    assert done.code in (0, 2)
    assert done.code == 0 or "plan.json" in done.err


@commands
@given(data=st.data())
def test_training_by_a_spoiled_plan_goes_well_or_is_refused(memplan: Command, tmp_path: Path, data: Any) -> None:
    whole = tmp_path / "out" / "plan.json"
    if not whole.exists():
        (tmp_path / "net.py").write_text(MODEL)
        assert memplan("plan", "net.py", "--gpu-memory", "64MiB", "--host-memory", "64MiB", "--out", "out").code == 0
    (tmp_path / "plan.json").write_text(data.draw(changed(whole.read_text())))
    run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
    done = memplan("train", "net.py", "--plan", "plan.json", "--steps", 1, "--no-tui", "--out", run)
    assert done.code in (0, 2)
    assert done.code == 0 or done.err.startswith("memplan: ")


@pytest.mark.parametrize("engine", ["memplan", "deepspeed"])
@commands
@given(data=st.data())
def test_a_plan_of_a_spoiled_profile_is_made_or_refused(
    engine: str, memplan: Command, texts: dict[str, str], tmp_path: Path, data: Any
) -> None:
    (tmp_path / "p.json").write_text(data.draw(changed(texts["profile"])))
    done = memplan("plan", "p.json", *TWO_GPUS, "--engine", engine, "--explain")
    assert done.code in (0, 2, 3)
    assert done.code != 2 or "memplan: " in done.err


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("rates", ("--calibration", "spoiled.json", *TWO_GPUS)),
        ("rates", ("--machine", "spoiled.json")),
        ("machine", ("--machine", "spoiled.json")),
    ],
)
@commands
@given(data=st.data())
def test_a_plan_for_a_spoiled_machine_or_its_rates_is_made_or_refused(
    kind: str, words: tuple[Any, ...], memplan: Command, texts: dict[str, str], tmp_path: Path, data: Any
) -> None:
    PROFILE.save(tmp_path / "p.json")
    (tmp_path / "spoiled.json").write_text(data.draw(changed(texts[kind])))
    done = memplan("plan", "p.json", *words)
    assert done.code in (0, 2, 3)
    assert done.code != 2 or "memplan: " in done.err


@pytest.mark.parametrize("depth", [900, 5_000, 200_000])
def test_what_is_nested_thousands_of_levels_deep_is_a_sentence_for_every_command(
    memplan: Command, texts: dict[str, str], tmp_path: Path, depth: int
) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    run = tmp_path / "run"
    run.mkdir()
    write_run(run, make_events(done=1))
    for kind, command in (
        ("plan", ("train", "net.py", "--no-tui", "--plan", "run/plan.json")),
        ("plan", ("report", "run")),
        ("profile", ("plan", "profile.json")),
        ("rates", ("plan", "net.py", "--calibration", "rates.json")),
        ("rates", ("profile", "net.py", "--calibration", "rates.json")),
        ("machine", ("plan", "net.py", "--machine", "machine.json")),
    ):
        name = {"plan": "model", "profile": "blocks", "rates": "kernels", "machine": "remarks"}[kind]
        for place in ((name,), ()):
            folder = run if kind == "plan" else tmp_path
            (folder / f"{kind}.json").write_text(spoiled(texts[kind], place, "nest", depth))
            done = memplan(*command)
            assert done.code == 2
            assert f"{kind}.json" in done.err
