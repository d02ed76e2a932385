"""The command line: reads words, calls the library, turns errors into sentences and exit codes.

Exit codes: 0 done, 1 training failed or errors found, 2 bad input, 3 nothing fits, 130 interrupted.

[Note: late imports] Pages are drawn with plotly and the dashboard with textual, whose imports take longer than many a
command: who writes no page and watches no run does not wait for them.
"""

import gc
import json
import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memplan import show
from memplan.calibrate.here import save_cached
from memplan.calibrate.run import calibrate as measure_rates
from memplan.described import find_machine
from memplan.described_disk import local_nvme
from memplan.doctor import checks
from memplan.errors import MemplanError, NothingFits, TrainingFailed
from memplan.export import Dtype
from memplan.export import export as export_run
from memplan.formatting import format_bytes, format_count
from memplan.imported import import_checkpoint
from memplan.launch import ALONE, Place, joined, told_by_first, were_restarted
from memplan.lint.command import lint
from memplan.options import (
    BAD_INPUT,
    DEFAULT_BATCH_SIZE,
    NOTHING_FITS,
    SHOWN,
    TRAINING_FAILED,
    BatchSize,
    File,
    GpuMemory,
    HostMemory,
    MomentsOption,
    OptimizerOption,
    PrecisionOption,
    Seq,
)
from memplan.plan_command import plan as plan_command
from memplan.plan_command import planned_for, remark
from memplan.processes import run_in_processes, without_options
from memplan.show_measured import measured_table
from memplan.show_profile import profile_tables
from memplan.show_rates import rates_tables
from memplan.train import INTERRUPTED, TrainingOptions, prepare_run
from memplan.train import train as run_training
from offload.chunked_loss import in_chunks
from offload.errors import OffloadError, PlanError
from offload.plan import OptimizerKind, Plan
from offload.watchdog import TIMEOUT_SECONDS
from profiler.errors import ProfilerError
from profiler.flamegraph import write_flamegraph
from profiler.measure import check_measurable, measure_step
from profiler.optimizers import OPTIMIZERS
from profiler.profile import ModelProfile
from profiler.run import profile_source
from profiler.source import load_source
from profiler.trace import PRECISIONS
from profiler.uncollected import uncollected
from tui import watch as watch_run
from tui.errors import RunError

app = typer.Typer(
    help="Training models that do not fit: profile, plan, train with offload, watch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

TIMED = {"rich_help_panel": "On a GPU"}
SEVERAL = {"rich_help_panel": "Several processes"}
PRECISIONS_HELP = "amp and amp-fp16: autocast to bf16 or fp16 over fp32 parameters; bf16: everything in bf16."


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
    # Only a planner reads what the loss in pieces takes, and that costs further traces.
    chunked = in_chunks if json is not None else None
    with uncollected():  # from the building on; what is measured runs with collections, as training does
        found = profile_source(source, batch_size, precision, optimizer, clip, device, calibration, chunked)
    console.print(profile_tables(found, depth))
    for write, path in ((_write_page, html), (write_flamegraph, flamegraph), (ModelProfile.save, json)):
        if path is not None:
            write(found, path)
            console.print(f"written: {path}", highlight=False)
    if measure:
        batch = source.example_batch(batch_size)
        measured = measure_step(source.build(), batch, source.forward, precision, optimizer, clip)
        console.print(measured_table(found, measured))


def _write_page(found: ModelProfile, path: Path) -> None:
    from memplan.profile_page import write_profile_page  # [Note: late imports]

    write_profile_page(found, path)


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in --out.")] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two checkpoints; one at the end only, if not given.")
    ] = None,
    keep_checkpoints: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")] = 2,
    no_tui: Annotated[bool, typer.Option("--no-tui", help="Progress lines instead of the dashboard.")] = False,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    nvme: Annotated[
        str | None,
        typer.Option(metavar="DIR[:SIZE]", help="A fast disk's directory; beside a plan, in place of its own."),
    ] = None,
    precision: PrecisionOption = None,
    optimizer: OptimizerOption = None,
    moments: MomentsOption = None,
    learning_rate: Annotated[float, typer.Option(help="Of the optimizer, constant.")] = 3e-4,
    clip: Annotated[float, typer.Option(help="Largest global norm of the gradients.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the model's initial weights and of dropout.")] = 0,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine; else torchrun's or one.", **SEVERAL)
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Of --nproc's processes, from the last checkpoint, when one dies.", **SEVERAL)
    ] = 0,
    collective_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for which one process may keep the others waiting.", **SEVERAL)
    ] = TIMEOUT_SECONDS,
) -> None:
    """Train by a plan, with a live dashboard; writes plan.json, events.jsonl and a checkpoint into the run."""
    if resume and out is None:
        raise PlanError("--resume needs the run to go on with: name it by --out")
    place = Place.here(os.environ) if nproc is None else ALONE  # a script's job is not what --nproc starts
    if out is None and (max_restarts or place.max_restarts):
        raise PlanError("with --max-restarts, name the run by --out: what is started again must find it")
    if nproc is not None:
        arguments = without_options(sys.argv[1:], "--nproc", "--max-restarts")
        raise typer.Exit(run_in_processes(nproc, arguments, max_restarts))
    if max_restarts:
        raise PlanError("--max-restarts is for --nproc; give it to torchrun where that starts the processes")
    source = load_source(file, seq)
    with joined(place, collective_timeout):
        session = f"{datetime.now():%Y%m%d-%H%M%S}"
        told, restarted = None, were_restarted(place)
        if place.speaks:
            run_dir = out or Path(f"runs/{source.name}-{session}")
            go_on = prepare_run(run_dir, resume=resume, restarted=restarted)
            told = json.dumps([str(run_dir), go_on, session])
        told_dir, resume_now, session = json.loads(told_by_first(told))  # nobody goes on before it is prepared
        run_dir = Path(told_dir)
        if restarted and place.speaks:
            console.print(_restarted(run_dir, resume_now), highlight=False, soft_wrap=True)
        if plan is None and resume_now:
            plan = run_dir / "plan.json"
        if plan is not None:
            wishes = {
                "--batch-size": batch_size,
                "--gpu-memory": gpu_memory,
                "--host-memory": host_memory,
                "--precision": precision,
                "--optimizer": optimizer,
                "--moments": moments,
            }
            # What is started again says what it said at first, when there was no plan.
            if not restarted and (given := [name for name, wish in wishes.items() if wish is not None]):
                raise PlanError(f"{given[0]} is for making a plan, and {plan} is one already; leave one of them out")
            chosen = Plan.load(plan)
            if nvme is not None:
                chosen = replace(chosen, nvme_dir=str(local_nvme(nvme)[0]))
        else:
            # One process a GPU, however many GPUs are here.
            here = find_machine(gpu_memory=gpu_memory, host_memory=host_memory, nvme=nvme)
            machine = replace(here, gpus=place.world, nodes=place.nodes)
            told = None
            if place.speaks:
                remark(machine)
                console.print(f"profiling {file.name} and planning for this machine ...", highlight=False)
                size = batch_size or max(DEFAULT_BATCH_SIZE, place.world)
                found = planned_for(source, machine, size, precision, optimizer=optimizer, moments=moments).plan
                console.print(show.plan_summary(found))
                told = json.dumps(found.to_dict())
            chosen = Plan.from_dict(json.loads(told_by_first(told)))
        dashboard = not no_tui and sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM") != "dumb"
        kept = checkpoint_every, keep_checkpoints
        options = TrainingOptions(steps, learning_rate, clip, seed, resume_now, dashboard, *kept, session)
        code = run_training(source, chosen, run_dir, options, console, place)
    raise typer.Exit(code)


def _restarted(run_dir: Path, resume: bool) -> str:
    where = "from its last checkpoint" if resume else "from the beginning, for it has no checkpoint"
    return f"started again: {run_dir} goes on {where}"


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
    from memplan.report import write_report  # [Note: late imports]

    target = out or run / "report.html"
    write_report(run, target)
    console.print(f"written: {target}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Directory of a run, or one checkpoint of it.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    dtype: Annotated[Dtype | None, typer.Option(help="That of the run's precision if not given.")] = None,
) -> None:
    """The weights of the last whole checkpoint as safetensors that from_pretrained reads. Needs no GPU."""
    written = export_run(run, out, dtype)
    for sentence in written.damaged:
        errors.print(f"warning: {sentence}", markup=False, highlight=False, soft_wrap=True)
    what = f"{len(written.files)} file{'s' * (len(written.files) > 1)}, {format_bytes(written.size_bytes)}"
    said = f"written: {out} ({what} in {written.dtype}, of {written.checkpoint.path.name})"
    console.print(said, highlight=False, soft_wrap=True)


@app.command("import")
def import_(
    checkpoint: Annotated[
        Path, typer.Argument(help="A folder of DeepSpeed's checkpoints, or one of them; of ZeRO's stages 1 to 3.")
    ],
    out: Annotated[Path, typer.Option(help="The run that gets it as its newest checkpoint.")],
    optimizer: Annotated[
        OptimizerKind | None, typer.Option(help="Adam or AdamW, where the checkpoint does not say which.")
    ] = None,
) -> None:
    """A checkpoint of DeepSpeed's as a run to go on with, in any plan, or to export. Needs no GPU, nor DeepSpeed."""
    written = import_checkpoint(checkpoint, out, optimizer)
    for sentence in written.left_out:
        errors.print(f"note: {sentence}", markup=False, highlight=False, soft_wrap=True)
    found = written.found
    made = f"step {found.step} of {written.optimizer}, {found.ranks} ranks in stage {found.stage}"
    said = f"written: {written.path} ({format_count(written.parameters)} parameters, {made})"
    console.print(said, highlight=False, soft_wrap=True)
    console.print(f"go on: memplan train MODEL --plan PLAN --out {out} --resume", highlight=False, soft_wrap=True)


@app.command()
def calibrate(
    nvme: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A directory on the disk to measure; none is if not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A copy to plan or profile with elsewhere.")] = None,
) -> None:
    """Measure this machine once, in about a minute: links, updates, disk, kernels. Plans made here then use that."""
    found = measure_rates(nvme, lambda text: console.print(text, style="dim", highlight=False))
    console.print(rates_tables(found))
    console.print(f"written: {save_cached(found, nvme)}", highlight=False, soft_wrap=True)
    if out is not None:
        found.save(out)
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


app.command()(uncollected()(plan_command))
app.command()(lint)


def main() -> None:
    """Run a command; a person's mistakes end in a sentence and an exit code."""
    gc.freeze()  # what was imported stays, and need not be looked through again and again
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
    finally:
        gc.freeze()  # nor what is there at the end, which takes Python half a second


def _say(error: ValueError) -> None:
    """The sentence, with its rank where there are several, and the lines of the person's own code that led to it."""
    traceback = getattr(error, "traceback", "")
    if traceback:
        errors.print(traceback, markup=False, highlight=False, soft_wrap=True)
    errors.print(f"memplan: {getattr(error, 'rank', '')}{error}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
