"""What is searched: one model on one machine for one batch, and the families of candidates that there are."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar, cast

from memplan.activations import Activations, Way, activations_of, largest_batch, ways_of
from memplan.memory import ChainTables, chain_order
from memplan.passes import PassSeconds, pass_seconds
from memplan.rates import Rates
from memplan.sharding import Sharding
from memplan.shared_update import shared_update
from memplan.start import StartBytes, have_room, room_bytes
from memplan.units import owner
from memplan.work import StepWork
from offload.plan import Buckets, Budget, OptimizerKind, Precision, StateFormat, Target, Tier
from offload.residency import UnitShape
from offload.shards import Shards
from profiler.profile import ModelProfile

T = TypeVar("T")


def profiled_optimizer(profile: ModelProfile) -> OptimizerKind | None:
    """The optimizer that a profile was made with, however it is implemented; ``None`` where the engine has it not."""
    name = profile.optimizer.removesuffix("-fused").removesuffix("-forloop")
    return OptimizerKind(name) if name in {*OptimizerKind} else None


@dataclass(frozen=True)
class Family:
    """Candidates that differ only in where things live, and how far ahead they are fetched."""

    sharding: Sharding
    way: Way
    micro_batches: int
    """Of one optimizer step."""


@dataclass(frozen=True)
class Problem:
    """One model on one machine, with the batch one GPU sees in a step."""

    profile: ModelProfile
    shapes: tuple[UnitShape, ...]
    """In forward order."""
    device: str
    gpus: int
    """Of all nodes."""
    nodes: int
    budget: Budget
    """Of each GPU, and of one node's host memory and NVMe."""
    rates: Rates
    form: StateFormat
    gpu_batch_size: int
    target: Target = Target.MEMPLAN
    _known: dict[object, object] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What was worked out once: many families share it, and so do other budgets."""

    @property
    def precision(self) -> Precision:
        """Of weights and gradients."""
        return self.form.precision

    @property
    def gpus_per_node(self) -> int:
        """They share a node's memory and disk."""
        return self.gpus // self.nodes

    @cached_property
    def start(self) -> StartBytes:
        """Host bytes of one process at the start, its units padded as far as any sharding does."""
        padded = [shape.padded(Shards(3, self.gpus)) for shape in self.shapes]
        return StartBytes.of(self.profile.parameter_elements, padded)

    @property
    def on_meta(self) -> bool:
        """Whether models are built without memory, for those of a node have no room: [Note: the start]."""
        room = room_bytes(self.budget, self.device, self.gpus_per_node)
        return not have_room(self.gpus_per_node, self.start.model_bytes, self.start.passing_bytes, room)

    @property
    def beside_tiers_bytes(self) -> int:
        """Of the host, what each process needs at the start beside full tiers."""
        # Where the CPU computes, the GPU tier is of the same memory and has no activations yet: that is the room.
        return self.start.beside_bytes(on_meta=self.on_meta) if self.device == "cuda" else 0

    def attach_bytes(self, tiers_bytes: int) -> int:
        """The most that one process has on the host until its tiers, of so many bytes there, are full."""
        return self.start.most_bytes(tiers_bytes, on_meta=self.on_meta) if self.device == "cuda" else tiers_bytes

    @cached_property
    def chain(self) -> list[UnitShape]:
        """The shapes in the order in which they leave the GPU."""
        return [self.shapes[i] for i in chain_order(self.shapes)]

    def with_budget(self, tier: Tier, size: int) -> "Problem":
        """The same with another budget in one tier."""
        changed = replace(self, budget=replace(self.budget, **{f"{tier.value}_bytes": size}))
        object.__setattr__(changed, "_known", self._known)
        return changed

    def tables(self, sharding: Sharding, buckets: Buckets) -> ChainTables:
        """Bytes of every candidate of these."""

        def tables() -> ChainTables:
            shared = self.gpu_update_share > 0
            return ChainTables(self.chain, buckets, self.form, sharding, shared_update=shared)

        return self.once(("tables", sharding, buckets), tables)

    @property
    def gpu_update_share(self) -> float:
        """Of the update of state on the host, where memplan's engine makes it."""
        return shared_update(self.rates, self.form, self.device, self.gpus_per_node).gpu_share

    def activations(self, way: Way) -> Activations:
        """Bytes beside the model's state."""
        found = self._activations(way)
        assert found is not None  # families are made from what was profiled
        return found

    def _activations(self, way: Way) -> Activations | None:
        """The same; ``None`` where a trace failed, so that the profile knows of this way smaller batches or none."""
        return self.once(("activations", way), lambda: activations_of(self.profile, way, self.device))

    def passes(self, way: Way) -> PassSeconds:
        """Seconds of one micro-batch by unit."""
        paths = [s.name for s in self.shapes]
        return self.once(("passes", way), lambda: pass_seconds(self.profile, paths, way, self.rates))

    def work(self, family: Family, buckets: Buckets) -> StepWork:
        """What one GPU does in a step of this family."""
        return StepWork(
            self.shapes,
            self.tables(family.sharding, buckets),
            family.sharding,
            buckets,
            self.form,
            self.passes(family.way),
            family.micro_batches,
            self.rates,
            self.once("trained", self._trained),
            self.once(("inputs", family.way), lambda: self._input_bytes(family.way)),
            self.device,
        )

    def _input_bytes(self, way: Way) -> tuple[int, ...]:
        """By unit, of what its recomputed blocks keep on the host; those that are no unit count for the root."""
        paths, found = frozenset(s.name for s in self.shapes), Counter[str]()
        for block, size in zip(self.profile.blocks, self.activations(way).input_bytes, strict=False):
            found[owner((f"{block}.",), paths)] += size
        return tuple(found[s.name] for s in self.shapes)

    def _trained(self) -> tuple[int, ...]:
        """Number of trainable parameters of each unit."""
        paths = frozenset(s.name for s in self.shapes)
        counts = Counter(owner((p.name, *p.aliases), paths) for p in self.profile.parameters if p.trainable)
        return tuple(counts[s.name] for s in self.shapes)

    def micro_batch_sizes(self) -> list[int]:
        """Divisors of a GPU's batch that the profile knows about."""
        most = min(self.gpu_batch_size, largest_batch(self.profile))
        return [m for m in range(1, most + 1) if self.gpu_batch_size % m == 0]

    def shardings(self) -> list[Sharding]:
        """ZeRO's stages, flat and, on several nodes, within each node."""
        if self.gpus == 1:
            return [Sharding(0, 1)]
        flat = [Sharding(stage, self.gpus, self.nodes) for stage in range(4)]
        within = [Sharding(stage, self.gpus, self.nodes, self.gpus_per_node) for stage in (1, 2, 3)]
        return flat + (within if self.nodes > 1 and self.gpus_per_node > 1 else [])

    def families(self) -> Iterator[Family]:
        """All of them."""
        for sharding in self.shardings():
            for recomputed, checkpoints, chunks in ways_of(self.profile):
                for micro in self.micro_batch_sizes():
                    way = Way(micro, recomputed, checkpoints, chunks)
                    if self._activations(way) is not None:
                        yield Family(sharding, way, self.gpu_batch_size // micro)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What ``make`` makes, kept under ``key``."""
        if key not in self._known:
            self._known[key] = make()
        return cast(T, self._known[key])
