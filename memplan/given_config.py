"""A DeepSpeed configuration that a person has, read, and every "auto" in it filled in as Hugging Face does."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from memplan.errors import PlanningError
from memplan.lint.config import DsConfig, ds_config_of
from memplan.lint.document import Document, read_document
from memplan.lint.schema import schema
from memplan.lint.view import View, Z
from offload.plan import Precision
from profiler.profile import ModelProfile

PRECISIONS = {"fp32": Precision.FP32, "bf16": Precision.BF16, "fp16": Precision.BF16, "autocast": Precision.AMP}
"""fp16 takes the bytes of bf16."""
HALVES = {"bf16.enabled": Precision.BF16, "fp16.enabled": Precision.FP16}
TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
OTHER_PARALLELISM = ("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size", "sequence_parallel_size")
"""What divides the GPUs into fewer data-parallel ranks."""
ALREADY = "{} is in the configuration already; leave it out beside --from"


@dataclass(frozen=True)
class GivenConfig:
    """A configuration file: as it is written, and as it runs."""

    document: Document
    """As it is written."""
    fills: Mapping[str, Any] = field(default_factory=dict)
    """What stands for each "auto" that decides anything here."""

    @classmethod
    def read(cls, path: Path) -> "GivenConfig":
        """Raises ConfigError for a file that is no configuration of DeepSpeed."""
        return cls(read_document(path))

    @cached_property
    def filled(self) -> Document:
        """With what stands for "auto" in its place."""
        root = dict(self.document.root)
        for dotted, value in self.fills.items():
            *home, name = dotted.split(".")
            if home:
                root[home[0]] = {**root[home[0]], name: value}
            else:
                root[name] = value
        return replace(self.document, root=root)

    @cached_property
    def view(self) -> View:
        """What DeepSpeed makes of it."""
        return View(self.filled)

    @property
    def values(self) -> DsConfig:
        """The same, typed."""
        return ds_config_of(self.view)

    @property
    def precision(self) -> Precision:
        """What a profile has to be made in."""
        return PRECISIONS[self.values.precision]

    def batch_size(self, gpus: int) -> int:
        """Samples of one optimizer step."""
        return self.values.batch_sizes(gpus)[0]

    def for_training(
        self, gpus: int, batch_size: int | None, precision: Precision | None, profiled: Precision | None = None
    ) -> "GivenConfig":
        """With what Hugging Face takes from its arguments: batch and precision, as somebody wished them.

        ``profiled`` is the precision of a profile that is there already. Raises PlanningError where a wish contradicts
        the file, or one is needed and missing.
        """
        self._check_ranks_and_stage()
        fills = {**self._precision(precision, profiled), **self._batch(gpus, batch_size)}
        return replace(self, fills={**self.fills, **fills})

    def for_model(self, profile: ModelProfile) -> "GivenConfig":
        """With the sizes that Hugging Face makes of the model's hidden size."""
        hidden = hidden_size(profile)
        if hidden is None:
            return self
        sizes = {f"{Z}.reduce_bucket_size": hidden * hidden}
        if View(self.filled).stage == 3:
            sizes[f"{Z}.stage3_prefetch_bucket_size"] = int(0.9 * hidden * hidden)
            sizes[f"{Z}.stage3_param_persistence_threshold"] = 10 * hidden
        return replace(self, fills={**self.fills, **{k: n for k, n in sizes.items() if self._is_auto(k)}})

    @property
    def unknown(self) -> list[str]:
        """Every "auto" of ZeRO's section that has an effect and that nothing is known for: DeepSpeed's default runs."""
        written = self.filled.section(Z)
        return [
            f"{Z}.{name}"
            for name, value in written.items()
            if value == "auto" and self.view.stage in (schema().key((Z, name)).stages or range(4))
        ]

    def _check_ranks_and_stage(self) -> None:
        """Raise PlanningError for what the arithmetic here knows nothing of."""
        view = View(self.document)
        for key in OTHER_PARALLELISM:
            if (size := view.value(key) or 1) > 1:
                raise PlanningError(
                    f"{key} is {size}, and --from prices data parallelism only: leave it out to see what the rest costs"
                )
        if not 0 <= (ratio := view.value(f"{Z}.offload_optimizer.ratio")) <= 1:
            raise PlanningError(
                f"{Z}.offload_optimizer.ratio is {ratio}; it is the share that the CPU updates: write 0 to 1"
            )
        if self._is_auto(f"{Z}.stage"):
            raise PlanningError(
                f'{Z}.stage is "auto", which Accelerate or the Trainer fills in from arguments of its own: write the '
                "stage as a number"
            )

    def _is_auto(self, dotted: str) -> bool:
        return self.document.get(*dotted.split(".")) == "auto"

    def _precision(self, wish: Precision | None, profiled: Precision | None) -> dict[str, bool]:
        open_ones = [key for key in HALVES if self._is_auto(key)]
        if not open_ones or View(self.document).precision in ("bf16", "fp16"):
            if wish is not None:
                raise PlanningError(ALREADY.format("--precision"))
            return dict.fromkeys(open_ones, False)
        if wish is None and profiled is not None:
            # A profile in bf16 is also that of fp16.
            narrow = profiled in HALVES.values()
            wish = HALVES[open_ones[0]] if narrow and profiled not in map(HALVES.get, open_ones) else profiled
        wish = wish or HALVES[open_ones[0]]
        if wish is Precision.AMP and View(self.document).precision != "autocast":
            raise PlanningError("without a torch_autocast section the configuration can not run in amp")
        if wish in HALVES.values() and wish not in map(HALVES.get, open_ones):
            raise PlanningError(f'only {open_ones[0]} is "auto" in the configuration, so it can not run in {wish}')
        return {key: HALVES[key] is wish for key in open_ones}

    def _batch(self, gpus: int, wish: int | None) -> dict[str, int]:
        open_ones = [key for key in (TRAIN, MICRO, STEPS) if self._is_auto(key)]
        if wish is not None and self.document.get(TRAIN) is None and self.document.get(MICRO) is None:
            raise PlanningError(
                f"the configuration has neither {TRAIN} nor {MICRO}, and DeepSpeed stops without one: write "
                f'"{TRAIN}": {wish} into it, and leave --batch-size out'
            )
        if wish is not None and (not open_ones or self.values.train_batch_size is not None):
            raise PlanningError(ALREADY.format("--batch-size"))
        if not open_ones:
            return {}
        values = replace(self.values, train_batch_size=wish or self.values.train_batch_size)
        if values.train_batch_size is None and values.micro_batch_size is None:
            raise PlanningError(
                f'{TRAIN} and {MICRO} are "auto", which Hugging Face fills from its arguments; say by --batch-size how '
                "many samples a step has"
            )
        if values.micro_batch_size is None or values.train_batch_size is None:
            # The Trainer's own default.
            values = replace(values, gradient_accumulation_steps=values.gradient_accumulation_steps or 1)
        sizes = dict(zip((TRAIN, MICRO, STEPS), values.batch_sizes(gpus), strict=True))
        wished = (TRAIN,) if wish is not None else ()
        return {key: sizes[key] for key in (*wished, *open_ones)}


def hidden_size(profile: ModelProfile) -> int | None:
    """The width of the model's first embedding; ``None`` where it has none."""
    types = {layer.path: layer.type for layer in profile.layers}
    for parameter in profile.parameters:
        if types.get(parameter.name.rpartition(".")[0], "").endswith("Embedding") and len(parameter.shape) == 2:
            return parameter.shape[1]
    return None
