"""``memplan lint``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memplan.lint.document import read_document
from memplan.lint.facts import facts_about
from memplan.lint.rules import lint_document
from memplan.lint.show import findings_table

FOUND_ERRORS = 1


def lint(
    file: Annotated[Path, typer.Argument(help="A ds_config.json.")],
    gpus: Annotated[int | None, typer.Option(min=1, help="Ranks of the job, to check the batch sizes.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A model file or a profile.json, to check buffers and pinned memory against this machine."),
    ] = None,
) -> None:
    """What is wrong with a DeepSpeed configuration, and what was probably meant."""
    document = read_document(file)
    findings = lint_document(document, facts_about(document, gpus, model))
    Console().print(findings_table(file.name, findings))
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(FOUND_ERRORS)
