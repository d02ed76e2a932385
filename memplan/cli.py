"""The command line: reads words, calls the library, turns errors into sentences and exit codes.

Exit codes: 0 done, 1 training failed, 2 bad input, 3 nothing fits, 130 interrupted.
"""

import os
import sys
from dataclasses import replace
from datetime import datetime
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memplan import show
from memplan.api import plan as make_plan
from memplan.api import profile_for
from memplan.configs.deepspeed import ds_config
from memplan.doctor import checks
from memplan.errors import MemplanError, NothingFits, TrainingFailed
from memplan.explanation import explanation_of
from memplan.machine import Machine, describe, detect, parse_nvme
from memplan.profile_page import write_profile_page
from memplan.quick_rates import rates_of
from memplan.rates import Rates
from memplan.report import write_report
from memplan.show_measured import measured_table
from memplan.show_profile import profile_tables
from memplan.show_timeline import timeline_view
from memplan.timeline_page import write_timeline_page
from memplan.train import INTERRUPTED, TrainingOptions, default_precision, prepare_run
from memplan.train import train as run_training
from offload.errors import OffloadError, PlanError
from offload.plan import Plan, Precision
from profiler.calibrate import calibrate as measure_rates
from profiler.contract import ModelSource
from profiler.errors import ProfilerError
from profiler.flamegraph import write_flamegraph
from profiler.measure import check_measurable, measure_step
from profiler.optimizers import OPTIMIZERS
from profiler.profile import ModelProfile
from profiler.run import profile_source
from profiler.source import load_source
from profiler.trace import PRECISIONS
from tui import watch as watch_run
from tui.errors import RunError

TRAINING_FAILED, BAD_INPUT, NOTHING_FITS = 1, 2, 3
DEFAULT_BATCH_SIZE = 8

app = typer.Typer(
    help="Training models that do not fit: profile, plan, train with offload, watch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

SHOWN = {"rich_help_panel": "What is shown and written"}
TIMED = {"rich_help_panel": "On a GPU"}
PRECISIONS_HELP = "amp and amp-fp16: autocast to bf16 or fp16 over fp32 parameters; bf16: everything in bf16."

File = Annotated[Path, typer.Argument(help="A Python file with the model (docs/model-file.md), or a config.json.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Samples of one optimizer step.")]
Seq = Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence (or samples of audio) in the batch.")]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(help="fp32; amp: autocast to bf16 over fp32 parameters; bf16: bf16 weights with exact fp32 masters."),
]
Gpus = Annotated[int | None, typer.Option(help="GPUs to plan for, if not those of this machine.")]
GpuMemory = Annotated[str | None, typer.Option(help="Memory of one GPU that training may use, like 24GiB.")]
HostMemory = Annotated[str | None, typer.Option(help="Host memory that training may use, like 64GiB.")]
Nvme = Annotated[str | None, typer.Option(metavar="DIR[:SIZE]", help="A directory on a fast disk, and how much of it.")]


@app.command()
def profile(
    file: File,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    seq: Seq = None,
    precision: Annotated[str, typer.Option(metavar="|".join(PRECISIONS), help=PRECISIONS_HELP)] = "fp32",
    optimizer: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(OPTIMIZERS)}.")] = "adamw",
    clip: Annotated[bool, typer.Option("--clip", help="Clip the gradients by their norm.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Predict times on this GPU, like H100 or 'RTX 4090'.", **TIMED)
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Rates that `memplan calibrate` measured; without it usual ones.", **TIMED)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the step on this machine's GPU too, and print both.", **TIMED)
    ] = False,
    depth: Annotated[
        int | None, typer.Option(min=0, help="Levels of layers to print; what fits a screen if not given.", **SHOWN)
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts here.", **SHOWN)] = None,
    flamegraph: Annotated[Path | None, typer.Option(help="Write a flame graph for speedscope here.", **SHOWN)] = None,
    json: Annotated[Path | None, typer.Option(help="Write profile.json here.", **SHOWN)] = None,
) -> None:
    """What each layer costs, and the peak of a plain training step. Needs no GPU."""
    source = load_source(file, seq)
    if measure:
        check_measurable()
    found = profile_source(source, batch_size, precision, optimizer, clip, device, calibration)
    console.print(profile_tables(found, depth))
    writers = ((write_profile_page, html), (write_flamegraph, flamegraph), (ModelProfile.save, json))
    for write, path in writers:
        if path is not None:
            write(found, path)
            console.print(f"written: {path}", highlight=False)
    if measure:
        batch = source.example_batch(batch_size)
        measured = measure_step(source.build(), batch, source.forward, precision, optimizer, clip)
        console.print(measured_table(found, measured))


@app.command()
def plan(
    file: File,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    seq: Seq = None,
    gpus: Gpus = None,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    nvme: Nvme = None,
    precision: PrecisionOption = None,
    out: Annotated[Path, typer.Option(help="Where plan.json and ds_config.json go.")] = Path(),
    explain: Annotated[
        bool, typer.Option("--explain", help="Print a step as a timeline, and what would make it faster.", **SHOWN)
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the timeline here.", **SHOWN)] = None,
) -> None:
    """What to do about it on this machine, or on one you describe."""
    out.mkdir(parents=True, exist_ok=True)
    machine = describe(detect(), gpus, gpu_memory, host_memory, nvme)
    found, profiled, rates = _plan(load_source(file, seq), machine, batch_size, precision)
    found.save(out / "plan.json")
    config, notes = ds_config(found)
    (out / "ds_config.json").write_text(dumps(config, indent=2) + "\n")
    console.print(show.plan_tables(found))
    if explain or html is not None:
        shown = explanation_of(profiled, machine, rates, found)
        if explain:
            console.print(timeline_view(shown, console.width), highlight=False)
        if html is not None:
            write_timeline_page(shown, html)
            console.print(f"written: {html}", highlight=False)
    for note in notes:
        console.print(f"ds_config.json: {note}", highlight=False)
    console.print(f"written: {out / 'plan.json'}, {out / 'ds_config.json'}")


@app.command()
def train(
    file: File,
    plan: Annotated[Path | None, typer.Option(help="A plan.json; without it a plan is made.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of the last optimizer step.")] = 100,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="Samples of one optimizer step; 8 if not given.")
    ] = None,
    seq: Seq = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run; runs/NAME-TIME if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    no_tui: Annotated[bool, typer.Option("--no-tui", help="Progress lines instead of the dashboard.")] = False,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    nvme: Annotated[
        str | None,
        typer.Option(metavar="DIR[:SIZE]", help="A fast disk's directory; beside a plan, in place of its own."),
    ] = None,
    precision: PrecisionOption = None,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, constant.")] = 3e-4,
    clip: Annotated[float, typer.Option(help="Largest global norm of the gradients.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the model's initial weights and of dropout.")] = 0,
) -> None:
    """Train by a plan, with a live dashboard; writes plan.json, events.jsonl and a checkpoint into the run."""
    if resume and out is None:
        raise PlanError("--resume needs the run to go on with: name it by --out")
    source = load_source(file, seq)
    run_dir = out or Path("runs") / f"{source.name}-{datetime.now():%Y%m%d-%H%M%S}"
    prepare_run(run_dir, resume=resume)
    if plan is None and resume:
        plan = run_dir / "plan.json"
    if plan is not None:
        wishes = {
            "--batch-size": batch_size,
            "--gpu-memory": gpu_memory,
            "--host-memory": host_memory,
            "--precision": precision,
        }
        if given := [name for name, wish in wishes.items() if wish is not None]:
            raise PlanError(f"{given[0]} is for making a plan, and {plan} is one already; leave one of them out")
        chosen = Plan.load(plan)
        if nvme is not None:
            chosen = replace(chosen, nvme_dir=str(parse_nvme(nvme)[0]))
    else:
        # This version trains on one GPU, however many are here.
        machine = replace(describe(detect(), None, gpu_memory, host_memory, nvme), gpus=1)
        console.print(f"profiling {file.name} and planning for this machine ...", highlight=False)
        chosen, *_ = _plan(source, machine, batch_size or DEFAULT_BATCH_SIZE, precision)
        console.print(show.plan_summary(chosen))
    dashboard = not no_tui and sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM") != "dumb"
    options = TrainingOptions(steps, learning_rate, clip, seed, resume, dashboard)
    raise typer.Exit(run_training(source, chosen, run_dir, options, console))


@app.command()
def watch(run: Annotated[Path, typer.Argument(help="Directory of a run.")]) -> None:
    """The dashboard of a run that is going on, or is over. Leaving it leaves the run alone."""
    raise typer.Exit(watch_run(run))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html if not given.")] = None,
) -> None:
    """The same as an HTML page, in one file."""
    target = out or run / "report.html"
    write_report(run, target)
    console.print(f"written: {target}")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="Where the rates go.")] = Path("calibration.json"),
) -> None:
    """Measure the rates of this machine's GPU, for `memplan profile --calibration`. Takes about a minute."""
    found = measure_rates(lambda text: console.print(text, style="dim", highlight=False))
    found.save(out)
    for sentence in found.skipped:
        console.print(sentence, style="yellow", highlight=False)
    console.print(f"written: {out}", highlight=False)


@app.command()
def doctor(
    nvme: Annotated[Path | None, typer.Option(metavar="DIR", help="A directory to try as NVMe tier.")] = None,
) -> None:
    """What is wrong or slow on this machine, and the command that mends it."""
    found = checks(nvme)
    console.print(show.doctor_table(found))
    if any(check.status == "fail" for check in found):
        raise typer.Exit(TRAINING_FAILED)


def _plan(
    source: ModelSource, machine: Machine, batch_size: int, precision: Precision | None
) -> tuple[Plan, ModelProfile, Rates]:
    """The plan, and what it was made with."""
    precision = precision or default_precision(machine.device)
    rates = rates_of(machine, precision)
    profiled = profile_for(source, machine, rates, batch_size, precision)
    return make_plan(profiled, machine, batch_size, rates), profiled, rates


def main() -> None:
    """Run a command; a person's mistakes end in a sentence and an exit code."""
    try:
        app()
    except NothingFits as error:
        _say(error)
        sys.exit(NOTHING_FITS)
    except TrainingFailed as error:
        _say(error)
        sys.exit(TRAINING_FAILED)
    except (MemplanError, ProfilerError, OffloadError, RunError) as error:
        _say(error)
        sys.exit(BAD_INPUT)
    except OSError as error:
        _say(MemplanError(f"{error.filename}: {error.strerror}" if error.filename else str(error)))
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _say(error: ValueError) -> None:
    """The sentence, and the lines of the person's own code that led to it."""
    traceback = getattr(error, "traceback", "")
    if traceback:
        errors.print(traceback, markup=False, highlight=False, soft_wrap=True)
    errors.print(f"memplan: {error}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
