"""What the rules look at: a configuration with DeepSpeed's defaults filled in, and facts about the job."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memplan.lint.document import Document
from memplan.lint.finding import Finding, Severity
from memplan.lint.kinds import KINDS, meant_by
from memplan.lint.schema import Key, schema

Z = "zero_optimization"
"""The section that rules ask the most of."""
OLD_NAMES = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}
"""The keys that once sent each part to the CPU."""


@dataclass(frozen=True)
class Facts:
    """What a rule may know beside the file; ``None`` is unknown, and the rules that need it stay silent."""

    gpus: int | None = None
    """Ranks of the job."""
    parameter_elements: tuple[int, ...] | None = None
    """Elements of the model's parameters, each once, in forward order."""
    memlock_bytes: int | None = None
    """What one process may lock in memory; ``None`` also where there is no limit."""
    host_bytes: int | None = None
    """Memory of the host that its ranks share."""
    filesystems: Mapping[str, str | None] = field(default_factory=dict)
    """Kind of the file system by the ``nvme_path``s of the file; ``None`` for a path that is not there."""


@dataclass(frozen=True)
class View:
    """A document as DeepSpeed takes it."""

    document: Document
    facts: Facts = Facts()

    def value(self, dotted: str) -> Any:
        """What DeepSpeed makes of a key: what is written, under either of its names, else the real default.

        "auto" and values of no use count as not written: other rules tell of them.
        """
        *home, name = dotted.split(".")
        key = schema().key((*home, name))
        section = self._section(home)
        for written in (key.name, key.also):
            if written in section and section[written] != "auto":
                return _usable(key, section[written])
        return key.default

    def written(self, dotted: str) -> bool:
        """Whether the key stands in the file, under either of its names."""
        *home, name = dotted.split(".")
        key = schema().key((*home, name))
        section = self._section(home)
        return key.name in section or key.also in section

    def is_auto(self, dotted: str) -> bool:
        """Whether it is left to Hugging Face's integrations."""
        return self.document.get(*dotted.split(".")) == "auto"

    def _section(self, home: list[str]) -> dict[str, Any]:
        section = self.document.section(*home)
        if home[:1] == ["bf16"] and self.document.get("bf16") is None:
            return self.document.section("bfloat16", *home[1:])
        return section

    def say(self, severity: Severity, dotted: str, message: str, suggestion: str | None = None) -> Finding:
        """A finding at a key, or at the nearest section above it that is written."""
        return Finding(severity, dotted, self.document.line(tuple(dotted.split("."))), message, suggestion)

    @property
    def stage(self) -> int:
        """The ZeRO stage that runs."""
        if self.document.get(Z) is True:
            return 1
        return int(self.value(f"{Z}.stage"))

    def device(self, what: str) -> str:
        """Where ``offload_param`` or ``offload_optimizer`` sends its part: none, cpu or nvme."""
        if self.value(f"{Z}.{OLD_NAMES[what]}"):
            return "cpu"
        return str(self.value(f"{Z}.{what}.device"))

    @property
    def precision(self) -> str:
        """The type of the weights: fp32, fp16 or bf16; or autocast, over fp32 weights."""
        if self.value("fp16.enabled"):
            return "fp16"
        if self.value("bf16.enabled"):
            return "bf16"
        return "autocast" if self.value("torch_autocast.enabled") else "fp32"

    @property
    def element_bytes(self) -> int:
        """Of a weight as the model computes with it."""
        return 2 if self.precision in ("fp16", "bf16") else 4

    @property
    def overlap_comm(self) -> bool:
        """Written, or what its default comes to: true at stage 3."""
        written = self.value(f"{Z}.overlap_comm")
        return self.stage == 3 if written is None else bool(written)

    @property
    def optimizer(self) -> str | None:
        """The optimizer's type, in lower case where DeepSpeed does not mind."""
        name = self.value("optimizer.type")
        if not isinstance(name, str):
            return None
        return name.lower() if name.lower() in schema().optimizers else name

    @property
    def ranks(self) -> int | None:
        """Data-parallel ranks; ``None`` where they are unknown or split by other kinds of parallelism."""
        if self.facts.gpus is None or "pipeline" in self.document.root:
            return None
        if self.value("tensor_parallel.autotp_size") > 1:
            return None
        return self.facts.gpus // int(self.value("sequence_parallel_size"))


def _usable(key: Key, value: Any) -> Any:
    if any(KINDS[kind](value) for kind in key.types):
        value = int(value) if "int" in key.types and isinstance(value, float) else value
        if isinstance(value, str) and key.nocase:
            value = next((v for v in key.values if v.lower() == value.lower()), key.default)
        return value if not key.values or value is None or value in key.values else key.default
    meant = meant_by(key.types, value)
    return key.default if meant is None else meant
