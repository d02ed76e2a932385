"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from offload.plan import MomentFormat, OptimizerKind, Precision

DEFAULT_BATCH_SIZE = 8
TRAINING_FAILED, BAD_INPUT, NOTHING_FITS = 1, 2, 3
"""Exit codes, beside 0 and 130."""
SHOWN = {"rich_help_panel": "What is shown and written"}
File = Annotated[Path, typer.Argument(help="A Python file with the model (docs/model-file.md), or a config.json.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Samples of one optimizer step.")]
Seq = Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence (or samples of audio) in the batch.")]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(help="fp32; amp: autocast to bf16 over fp32 parameters; bf16: bf16 weights with exact fp32 masters."),
]
OptimizerOption = Annotated[
    OptimizerKind | None, typer.Option(help="What trains; if not given, what the profile was made with, or AdamW.")
]
MomentsOption = Annotated[
    MomentFormat | None,
    typer.Option(help="How the optimizer's moments are stored; bf16 and 8bit take less, and change the numbers."),
]
DESCRIBED = {"rich_help_panel": "The machine, if not this one as it is"}
MachineName = Annotated[
    str | None,
    typer.Option(
        "--machine", metavar="GPU|FILE.json", help="GPUs by name, like h100-80gb, or a calibration.", **DESCRIBED
    ),
]
Gpus = Annotated[int | None, typer.Option(help="GPUs of a node.", **DESCRIBED)]
Nodes = Annotated[int | None, typer.Option(help="Nodes, each with so many GPUs.", **DESCRIBED)]
GpuMemory = Annotated[
    str | None, typer.Option(help="Memory of one GPU that training may use, like 24GiB.", **DESCRIBED)
]
HostMemory = Annotated[
    str | None, typer.Option(help="Memory of one node that training may use, like 64GiB.", **DESCRIBED)
]
Nvme = Annotated[
    str | None,
    typer.Option(
        metavar="DIR[:SIZE]",
        help="A directory on a fast disk, and how much of it; if described, 7GB/s[:SIZE].",
        **DESCRIBED,
    ),
]
Network = Annotated[
    str | None,
    typer.Option(metavar="RATE", help="What each GPU can send to other nodes, like 50GB/s.", **DESCRIBED),
]
