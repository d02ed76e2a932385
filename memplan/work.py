"""What one GPU has to do in one optimizer step, unit by unit: bytes, elements and seconds, wherever things live."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memplan.memory import ChainTables, chain_order, state_extent_bytes, weight_extent_bytes
from memplan.passes import BACKWARD, BACKWARD_ISSUE, FORWARD_ISSUE, PassSeconds
from memplan.rates import Rates
from memplan.sharding import Sharding
from memplan.shared_update import SharedUpdate, beside_adam, shared_update
from offload.plan import Buckets, Precision, StateFormat
from offload.residency import UnitShape

ISSUE_COLUMNS = np.isin(np.arange(4), (FORWARD_ISSUE, BACKWARD_ISSUE)).astype(float)
"""Of the seconds of passes: 1 where they are the CPU's, 0 where they are of kernels."""
GRADIENT_PASSES = 3
"""Of a gradient through the device's memory, in each micro-batch: read, added to what is there, written."""
# What the engine costs the CPU beside the model, in calls of a small module (``Rates.call_seconds``), so that it
# follows the machine. Fitted to 42 steps of a ViT on two H200 machines, most of them bound by the CPU
# (benchmarks/neighbours.py); the update's to 31 steps without offloading (benchmarks/planner.py).
HOOKED_ISSUE_FACTOR = 1.1
"""How much longer it takes to issue a pass where each saved tensor goes through a hook: where weights come and go, or
inputs of blocks wait on the host."""
UNIT_CALLS = 1.6
"""For one unit in one pass: it is told where its use begins and ends."""
GRADIENT_CALLS = 0.17
"""For one parameter's gradient in one micro-batch: taken away, gathered."""
UPDATE_CALLS = 2.4
"""For one unit's update on the GPU."""


@dataclass(frozen=True)
class StepWork:
    """One family of candidates at one prefetch depth."""

    shapes: tuple[UnitShape, ...]
    """In forward order, the root unit "" first where there is one."""
    tables: ChainTables
    sharding: Sharding
    buckets: Buckets
    form: StateFormat
    passes: PassSeconds
    """Rows as ``shapes``."""
    micro_batches: int
    rates: Rates
    trained: tuple[int, ...]
    """Number of trainable parameters of each unit."""
    input_bytes: tuple[int, ...]
    """By unit, of the inputs of its recomputed blocks, where they wait on the host."""
    device: str = "cuda"

    @property
    def precision(self) -> Precision:
        """Of weights and gradients."""
        return self.form.precision

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.shapes)

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return self.sharding.gpus

    @cached_property
    def held(self) -> tuple[UnitShape, ...]:
        """The shapes as the ranks hold them: padded, so that their parts are equal."""
        return tuple(s.padded(self.sharding.shards) for s in self.shapes)

    @cached_property
    def names(self) -> list[str]:
        """Of the units, as people read them."""
        return [s.name or "(root)" for s in self.shapes]

    @cached_property
    def rank(self) -> np.ndarray:
        """Each unit's position in the chain in which units leave the GPU."""
        rank = np.empty(self.units, dtype=np.int64)
        rank[self.chain] = np.arange(self.units)
        return rank

    @cached_property
    def chain(self) -> list[int]:
        """Units in the order in which they leave the GPU."""
        return chain_order(self.shapes)

    @cached_property
    def root(self) -> int | None:
        """The root unit, in use all through a pass."""
        return next((i for i, s in enumerate(self.shapes) if not s.name), None)

    @cached_property
    def order(self) -> list[int]:
        """The other units, as forward uses them."""
        return [i for i, s in enumerate(self.shapes) if s.name]

    @property
    def prefetch(self) -> int:
        """Uses that weights are fetched ahead."""
        return self.buckets.prefetch_units

    @cached_property
    def earlier(self) -> list[int | None]:
        """Whose slot a unit takes over in forward: as many places earlier in its ring as the ring has slots."""
        return self._neighbours(self.prefetch + 1, [s.elements for s in self.held])

    @cached_property
    def later(self) -> list[int | None]:
        """Whose slot a unit takes over in backward."""
        return _inverse(self.earlier)

    @cached_property
    def gradient_follower(self) -> list[int | None]:
        """Whose slot a unit's gradients gather in, in backward: two places later in forward order."""
        return _inverse(self._neighbours(2, [s.trainable_elements for s in self.held]))

    @cached_property
    def input_before(self) -> list[int | None]:
        """The unit before whose inputs leave, too."""
        found: list[int | None] = [None] * self.units
        before = None
        for u in self.order:
            if self.input_bytes[u]:
                found[u], before = before, u
        return found

    def _neighbours(self, distance: int, sizes: Sequence[int]) -> list[int | None]:
        """The unit of the same size so many places earlier."""
        rings: dict[int, list[int]] = defaultdict(list)
        found: list[int | None] = [None] * self.units
        for u in self.order:
            ring = rings[sizes[u]]
            found[u] = ring[-distance] if len(ring) >= distance else None
            ring.append(u)
        return found

    # Bytes and elements of one rank, by unit

    @cached_property
    def weight_bytes(self) -> list[int]:
        """Fetched for one use: the rank's shard in stage 3."""
        return [self.sharding.parameters(s.elements) * self.precision.weight_bytes for s in self.held]

    @cached_property
    def gradient_bytes(self) -> list[int]:
        """Sent home after one backward."""
        return [self.sharding.gradients(s.trainable_elements) * self.precision.weight_bytes for s in self.held]

    @cached_property
    def state_elements(self) -> list[int]:
        """Updated in a step."""
        return [self.sharding.state(s.trainable_elements) for s in self.held]

    @cached_property
    def state_weight_bytes(self) -> list[int]:
        """Of the weights that an update changes."""
        return [n * self.precision.weight_bytes for n in self.state_elements]

    @cached_property
    def nvme_state_bytes(self) -> list[int]:
        """Of optimizer state on disk."""
        return [state_extent_bytes(n, self.form, self.buckets) for n in self.state_elements]

    @cached_property
    def nvme_weight_bytes(self) -> list[int]:
        """Of weights on disk."""
        held = (self.sharding.parameters(s.elements) for s in self.held)
        return [weight_extent_bytes(n, self.precision, self.buckets) for n in held]

    @cached_property
    def update_chunks(self) -> list[int]:
        """In which a unit's state is updated."""
        return [max(1, -(-n // self.buckets.update_elements)) for n in self.state_elements]

    @cached_property
    def weight_chunks(self) -> list[int]:
        """In which a unit's weights come from disk."""
        size = self.buckets.update_elements
        return [max(1, -(-self.sharding.parameters(s.elements) // size)) for s in self.held]

    # Seconds

    @cached_property
    def by_unit(self) -> np.ndarray:
        """Kernels and issue of forward and backward, the engine's own passes over the gradients included."""
        rows = self.passes.by_unit.copy()
        gathered = np.array([s.trainable_elements for s in self.held]) * self.precision.weight_bytes
        rows[:, BACKWARD] += GRADIENT_PASSES * gathered / self.rates.device_bytes_per_second
        call = self.rates.call_seconds
        rows += ISSUE_COLUMNS * UNIT_CALLS * call
        rows[:, BACKWARD_ISSUE] += np.array(self.trained) * GRADIENT_CALLS * call
        return rows

    @cached_property
    def hooks_by_unit(self) -> np.ndarray:
        """What it takes beside ``by_unit`` where saved tensors go through hooks."""
        return self.passes.by_unit * ISSUE_COLUMNS * (HOOKED_ISSUE_FACTOR - 1)

    @property
    def hooks_of_rest(self) -> np.ndarray:
        """The same beside ``passes.rest``, of what belongs to no unit."""
        return self.passes.rest * ISSUE_COLUMNS * (HOOKED_ISSUE_FACTOR - 1)

    @cached_property
    def gpu_update_seconds(self) -> float:
        """A GPU passes over every weight, gradient and norm once a step wherever the state lives.

        So a plan never gains by moving away what fits.
        """
        one = self.rates.gpu_update_seconds[self.precision] * beside_adam(self.form)
        return max(self.step_issue_seconds, sum(self.state_elements) * one)

    @property
    def step_issue_seconds(self) -> float:
        """Of the CPU in ``step``, if all state is on the GPU."""
        return sum(n > 0 for n in self.state_elements) * UPDATE_CALLS * self.rates.call_seconds

    @property
    def host_update_seconds(self) -> float:
        """Of one element of state in host memory, with the GPU's share; the ranks of a node share its cores."""
        return self._update.seconds

    @property
    def nvme_update_seconds(self) -> float:
        """Of one element of state on NVMe, which only the CPU updates."""
        return self._update.cpu_seconds

    @cached_property
    def _update(self) -> SharedUpdate:
        return shared_update(self.rates, self.form, self.device, self.sharding.gpus_per_node)

    @cached_property
    def up_rate(self) -> float:
        """Host to device, at the size of the units."""
        return self.rates.host_to_device.at(self._typical_bytes)

    @cached_property
    def down_rate(self) -> float:
        """Device to host."""
        return self.rates.device_to_host.at(self._typical_bytes)

    @cached_property
    def _typical_bytes(self) -> float:
        sizes = sorted(b for b in self.weight_bytes if b)
        return sizes[len(sizes) // 2] if sizes else 1

    @property
    def read_rate(self) -> float:
        """The ranks of a node share its disk."""
        return self.rates.nvme_read_bytes_per_second / self.sharding.gpus_per_node

    @property
    def write_rate(self) -> float:
        """The same for writing."""
        return self.rates.nvme_write_bytes_per_second / self.sharding.gpus_per_node

    @property
    def gathers_each_use(self) -> bool:
        """Stage 3 brings whole weights together for every use."""
        return self.gpus > 1 and self.sharding.zero_stage == 3

    @property
    def gathers_after_update(self) -> bool:
        """Stages 1 and 2 bring the updated shards together once a step."""
        return self.gpus > 1 and self.sharding.zero_stage in (1, 2)

    @property
    def reduces_each_pass(self) -> bool:
        """From stage 2 on a rank has no room for whole gradients between micro-batches."""
        return self.gpus > 1 and self.sharding.zero_stage >= 2

    @cached_property
    def gather_seconds(self) -> list[float]:
        """Of one unit's weights."""
        w = self.precision.weight_bytes
        return [self.sharding.gather_seconds(s.elements * w, self.rates) for s in self.held]

    @cached_property
    def reduce_seconds(self) -> list[tuple[float, float]]:
        """Of one unit's gradients: in a micro-batch, and in the last one of a step."""
        w = self.precision.weight_bytes

        def seconds(shape: UnitShape, last: bool) -> float:
            return self.sharding.reduce_seconds(shape.trainable_elements * w, self.rates, last=last)

        return [(seconds(s, False), seconds(s, True)) for s in self.held]


def _inverse(neighbours: Sequence[int | None]) -> list[int | None]:
    """Who names each as its neighbour."""
    found: list[int | None] = [None] * len(neighbours)
    for i, other in enumerate(neighbours):
        if other is not None:
            found[other] = i
    return found
