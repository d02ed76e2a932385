"""How DeepSpeed cuts a model's parameters: partitions, sub-groups, and those that need special room."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from memplan.engines.deepspeed_setup import DeepSpeedSetup
from offload.plan import Tier
from profiler.profile import ParameterProfile


@dataclass(frozen=True)
class Sizes:
    """Elements, of the whole model where nothing else is said."""

    total: int
    trainable: int
    largest: int
    """Of the largest parameter."""
    largest_early: int
    """Of the largest whose gradient is complete while activations are still held: all but the first parameter of the
    model, which backward reaches last, and shared ones, which wait for their last use."""
    tied: tuple[int, ...]
    """Each trainable parameter that several modules use."""
    whole: tuple[int, ...]
    """Each trainable parameter."""
    partitions: tuple[int, ...]
    """One rank's part of each trainable parameter, padded (stage 3)."""
    frozen: tuple[int, ...]
    """One rank's part of each of the others (stage 3)."""
    persistent: int
    """Of the parameters too small to be partitioned (stage 3)."""
    groups: tuple[int, ...]
    """One rank's part of each sub-group (stage 3)."""
    gpu_groups: tuple[int, ...]
    """Of ``groups``, those that the GPU updates."""
    kept: int
    """Of ``groups``, those at the front that have room in host memory though parameters are on NVMe."""
    slice: int
    """One rank's part of the flat trainable parameters (stages 1 and 2)."""

    @property
    def partition(self) -> int:
        """One rank's part of all trainable parameters (stage 3)."""
        return sum(self.partitions)

    @property
    def shared(self) -> int:
        """All of ``tied``: autograd holds their gradient from the first use to the last."""
        return sum(self.tied)

    @property
    def host_groups(self) -> tuple[int, ...]:
        """The sub-groups that the CPU updates."""
        return self.groups[len(self.gpu_groups) :]


def sizes_of(parameters: Sequence[ParameterProfile], setup: DeepSpeedSetup) -> Sizes:
    """Cut these parameters, in the order of ``model.parameters()``."""
    gpus = setup.gpus
    whole = tuple(p.elements for p in parameters if p.trainable)
    partitions = tuple(-(-n // gpus) for n in whole)
    groups = _sub_groups(partitions, setup.sub_group_elements)
    # As DeepSpeed computes it from the ratio, rounding included.
    share = 1.0 if setup.optimizer is Tier.GPU else 1 - (1.0 - setup.gpu_update_share)
    on_gpu = int(share * len(groups))
    trainable = sum(whole)
    return Sizes(
        total=sum(p.elements for p in parameters),
        trainable=trainable,
        largest=max((p.elements for p in parameters), default=0),
        largest_early=max((p.elements for p in parameters[1:] if p.trainable and not p.aliases), default=0),
        tied=tuple(p.elements for p in parameters if p.trainable and p.aliases),
        whole=whole,
        partitions=partitions,
        frozen=tuple(-(-p.elements // gpus) for p in parameters if not p.trainable),
        persistent=sum(p.elements for p in parameters if p.elements <= setup.persistence_elements),
        groups=groups,
        gpu_groups=groups[:on_gpu],
        kept=_kept(groups, setup.max_in_cpu_elements) if setup.parameters is Tier.NVME else 0,
        # Every rank's slice begins at a multiple of two elements.
        slice=2 * -(-trainable // (2 * gpus)),
    )


def _sub_groups(partitions: Sequence[int], least: int) -> tuple[int, ...]:
    """Sums of consecutive partitions: a sub-group closes as soon as it has ``least`` elements."""
    groups: list[int] = []
    filled = 0
    for n in partitions:
        filled += n
        if filled >= least:
            groups.append(filled)
            filled = 0
    return (*groups, filled) if filled else tuple(groups)


def _kept(groups: Sequence[int], room: int) -> int:
    """Elements of the sub-groups at the front that fit whole."""
    return max(n for n in accumulate(groups, initial=0) if n <= room or not n)
