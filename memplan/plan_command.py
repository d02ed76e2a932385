"""``memplan plan``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from memplan import show
from memplan.api import plan as make_plan
from memplan.api import profile_for
from memplan.configs.files import NAMES, NOTES, block_classes_of, configurations
from memplan.described import find_machine
from memplan.errors import PlanningError
from memplan.explanation import Explanation, explanation_of
from memplan.from_config import GivenConfig, Verdict, judge
from memplan.inputs import saved_profile
from memplan.machine import Machine
from memplan.options import (
    DEFAULT_BATCH_SIZE,
    DESCRIBED,
    NOTHING_FITS,
    SHOWN,
    File,
    GpuMemory,
    Gpus,
    HostMemory,
    MachineName,
    MomentsOption,
    Network,
    Nodes,
    Nvme,
    OptimizerOption,
    PrecisionOption,
    Seq,
)
from memplan.quick_rates import REFERENCE, rates_of
from memplan.rates import PLANNED, Rates
from memplan.search import check_wishes, precision_of
from memplan.show_timeline import timeline_view
from memplan.show_verdict import BETTER, verdict_tables
from memplan.train import default_precision
from offload.plan import MomentFormat, OptimizerKind, Plan, Precision, Target
from profiler.contract import ModelSource
from profiler.device import find_device
from profiler.errors import ProfilerError
from profiler.profile import ModelProfile
from profiler.source import load_source

RATES_MARK, PLAN_MARK = '"schema": "memplan.rates/', '"schema": "memplan.plan/'
BATCH_HELP = f"Samples of one optimizer step. If not given {DEFAULT_BATCH_SIZE}, or of a profile its own on each GPU."
console = Console()
errors = Console(stderr=True)


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was made with."""

    plan: Plan
    profile: ModelProfile
    machine: Machine
    rates: Rates
    config: Mapping[str, Any] | None = None
    """DeepSpeed's, where it is one that a person has, with what the plan decides put in its place."""


def plan(
    file: File,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "-b", min=1, help=BATCH_HELP)] = None,
    seq: Seq = None,
    engine: Annotated[Target, typer.Option(help="Who will train: the plan is priced for it.")] = Target.MEMPLAN,
    machine: MachineName = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    nvme: Nvme = None,
    network: Network = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Rates that `memplan calibrate` measured, here or elsewhere.", **DESCRIBED)
    ] = None,
    precision: PrecisionOption = None,
    optimizer: OptimizerOption = None,
    moments: MomentsOption = None,
    given: Annotated[
        Path | None,
        typer.Option("--from", metavar="DS_CONFIG", help="Price a ds_config.json of yours, and say what to change."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where plan.json and the engines' files go.")] = Path(),
    explain: Annotated[
        bool, typer.Option("--explain", help="Print a step as a timeline, and what would make it faster.", **SHOWN)
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the timeline here.", **SHOWN)] = None,
) -> None:
    """What to do about it on this machine, or on one you describe."""
    limits = {"gpu_memory": gpu_memory, "host_memory": host_memory, "nvme": nvme, "network": network}
    there = find_machine(machine, gpus=gpus, nodes=nodes, **limits)
    remark(there)
    if given is not None and (out / "ds_config.json").resolve() == given.resolve():
        raise PlanningError(f"the better configuration would be written over {given}; name another directory by --out")
    check_ours(out)
    rates = rates_in(calibration, machine)
    if rates is not None and calibration is not None:
        rates = rates_for(rates, there, calibration)
    source = saved_profile(file) or load_source(file, seq)
    if isinstance(source, ModelProfile) and seq is not None:
        raise PlanningError(f"{file} is a profile, whose sequences have their length already; leave --seq out")
    out.mkdir(parents=True, exist_ok=True)
    verdict = None
    if given is not None:
        if engine is Target.FSDP2:
            raise PlanningError("--from reads a configuration of DeepSpeed; leave --engine fsdp2 out")
        if optimizer is not None:
            raise PlanningError("--from reads a configuration that has its optimizer; leave --optimizer out")
        if moments is not None:
            raise PlanningError("--from reads a configuration, and DeepSpeed's moments are fp32; leave --moments out")
        verdict, found = _judged(source, there, rates, GivenConfig.read(given), batch_size, precision)
        console.print(verdict_tables(given.name, verdict))
    else:
        found = planned_for(source, there, batch_size, precision, engine, rates, optimizer, moments)
        console.print(show.plan_tables(found.plan))
    if explain or html is not None:
        steps = _steps(found, verdict, "" if given is None else given.name)
        if explain:
            for step in steps:
                console.print(timeline_view(step, console.width), highlight=False)
        if html is not None:
            from memplan.timeline_page import write_timeline_page  # [Note: late imports] in memplan/cli.py

            write_timeline_page(steps, html)
            console.print(f"written: {html}", highlight=False)
    if verdict is not None and verdict.better is None:
        raise typer.Exit(NOTHING_FITS)
    _write(found, out)


def planned_for(
    source: ModelSource | ModelProfile,
    machine: Machine,
    batch_size: int | None,
    precision: Precision | None,
    target: Target = Target.MEMPLAN,
    rates: Rates | None = None,
    optimizer: OptimizerKind | None = None,
    moments: MomentFormat | None = None,
) -> Planned:
    """The plan of a model file, or of a profile, for a machine."""
    if precision is not None and precision not in PLANNED:
        raise PlanningError(
            f"plans in {precision} are not made yet: plan in one of {', '.join(PLANNED)}; the engine itself trains in "
            f"{precision} by a plan with that precision"
        )
    if isinstance(source, ModelProfile):
        if precision is not None and precision != source.precision:
            raise PlanningError(
                f"the profile is in {source.precision}; leave --precision out, or profile again with --precision "
                f"{precision}"
            )
        size = batch_size or source.batch_size * machine.gpus
        check_wishes(machine, size, target)
        rates = rates or rates_of(machine, precision_of(source))
        return Planned(make_plan(source, machine, size, rates, target, optimizer, moments), source, machine, rates)
    precision, size = precision or default_precision(machine.device), batch_size or DEFAULT_BATCH_SIZE
    check_wishes(machine, size, target)
    rates = rates or rates_of(machine, precision)
    profile = profile_for(source, machine, rates, size, precision)
    return Planned(make_plan(profile, machine, size, rates, target, optimizer, moments), profile, machine, rates)


def rates_in(calibration: Path | None, machine: str | None) -> Rates | None:
    """Those of a calibration, which may also be the file that the machine is from; ``None`` where there is none."""
    if calibration is not None:
        return Rates.load(calibration)
    if machine is not None and machine.endswith(".json") and RATES_MARK in Path(machine).read_text():
        return Rates.load(Path(machine))
    return None


def rates_for(rates: Rates, machine: Machine, path: Path) -> Rates:
    """What a calibration says of a machine: as much as a reference does, where it was made on one of another kind.

    Raises PlanningError where only one of the two has a GPU.
    """
    measured = rates.machine or {}
    if measured.get("device", machine.device) != machine.device:
        kinds = {"cuda": "a machine with a GPU", "cpu": "a machine without a GPU"}
        raise PlanningError(
            f"{path} was measured on {kinds.get(measured['device'], measured['device'])}, and the plan is for "
            f"{kinds[machine.device]}: leave --calibration out, or give one of such a machine"
        )
    theirs, ours = (_known(name) for name in (measured.get("gpu_name"), machine.gpu_name))
    return rates if theirs == ours else replace(rates, spread=max(rates.spread, REFERENCE.spread))


def _known(gpu_name: str | None) -> str | None:
    """One name of a GPU that has several; drivers and people use others."""
    try:
        return None if gpu_name is None else find_device(gpu_name).name
    except ProfilerError:
        return gpu_name


def check_ours(out: Path) -> None:
    """Raise PlanningError where a file would be lost that was not written for a plan: no plan.json of ours is there."""
    written = out / "plan.json"
    ours = written.is_file() and PLAN_MARK in written.read_text(encoding="utf-8", errors="replace")[:200]
    strangers = [name for name in ("plan.json", *NAMES) if (out / name).exists()]
    if strangers and not ours:
        raise PlanningError(
            f"{out.resolve()} holds {strangers[0]}, which was not written for a plan and would be lost; name another "
            "directory by --out"
        )


def remark(machine: Machine) -> None:
    """Say what a person should know of the machine beside the plan."""
    for sentence in machine.remarks:
        errors.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _judged(
    source: ModelSource | ModelProfile,
    machine: Machine,
    rates: Rates | None,
    config: GivenConfig,
    batch_size: int | None,
    precision: Precision | None,
) -> tuple[Verdict, Planned]:
    """What is to be said of a configuration, and the better one as a plan."""
    profiled = precision_of(source) if isinstance(source, ModelProfile) else None
    config = config.for_training(machine.gpus, batch_size, precision, profiled)
    size = config.batch_size(machine.gpus)
    check_wishes(machine, size, Target.DEEPSPEED)
    rates = rates or rates_of(machine, config.precision)
    if isinstance(source, ModelSource):
        source = profile_for(source, machine, rates, size, config.precision)
    verdict = judge(source, machine, rates, config)
    return verdict, Planned(verdict.better or verdict.theirs, source, machine, rates, verdict.config)


def _steps(found: Planned, verdict: Verdict | None, name: str) -> list[Explanation]:
    """The plan's step; with a configuration that a person has theirs, and the better one's where there is one."""
    if verdict is None:
        return [explanation_of(found.profile, found.machine, found.rates, found.plan)]
    steps = [Explanation(verdict.theirs, verdict.step, None, name)]
    if verdict.better not in (None, verdict.theirs):
        better = explanation_of(found.profile, found.machine, found.rates, found.plan, verdict.engine)
        steps.append(replace(better, whose=BETTER))
    return steps


def _write(found: Planned, out: Path) -> None:
    """plan.json, and what the engines read."""
    found.plan.save(out / "plan.json")
    written = ["plan.json"]
    for name, text in configurations(found.plan, block_classes_of(found.profile), found.config).items():
        (out / name).write_text(text)
        written.append(name)
    console.print(f"written into {out.resolve()}: {', '.join(written)}", highlight=False, soft_wrap=True)
    # What lies here is ours: check_ours has refused anything else.
    if old := [name for name in NAMES if name not in written and (out / name).exists()]:
        for name in old:
            (out / name).unlink()
        console.print(f"removed from the plan before: {', '.join(old)}", highlight=False, soft_wrap=True)
    console.print(f"What they can not say of the plan is in {NOTES} and in their comments.", highlight=False)
