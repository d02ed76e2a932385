"""How ZeRO divides a unit over the ranks, and what bringing it together and apart takes."""

from dataclasses import dataclass

from memplan.rates import Rates
from offload.shards import Shards

ASSUMED_INTER_NODE_BYTES_PER_SECOND = 25e9
"""Of each GPU, where nobody said: a 200 Gb/s network card a GPU."""


@dataclass(frozen=True)
class Sharding:
    """ZeRO's stage, and the groups that hold one copy of the model in shards.

    With ``shard_gpus`` below ``gpus`` every group is one node, and nodes hold replicas (hierarchical sharding).
    """

    zero_stage: int
    gpus: int
    nodes: int = 1
    shard_gpus: int = 0
    """0 stands for all."""

    @property
    def gpus_per_node(self) -> int:
        """They share the node's memory, cores and disk."""
        return self.gpus // self.nodes

    @property
    def group(self) -> int:
        """Ranks over which the model is divided."""
        return self.shard_gpus or self.gpus

    @property
    def shards(self) -> Shards:
        """What memplan's engine keeps on one rank."""
        return Shards(self.zero_stage, self.group)

    def state(self, elements: int) -> int:
        """Elements of optimizer state on one rank."""
        return -(-elements // self.group) if self.zero_stage >= 1 else elements

    def gradients(self, elements: int) -> int:
        """Elements of gradients on one rank."""
        return -(-elements // self.group) if self.zero_stage >= 2 else elements

    def parameters(self, elements: int) -> int:
        """Elements of parameters on one rank."""
        return -(-elements // self.group) if self.zero_stage >= 3 else elements

    def gather_seconds(self, whole_bytes: int, rates: Rates) -> float:
        """Of bringing a divided tensor of so many bytes together on every rank of a group, in a ring."""
        n = self.group
        return whole_bytes * (n - 1) / n / self._rate(whole_bytes, rates, across=n > self.gpus_per_node)

    def reduce_seconds(self, whole_bytes: int, rates: Rates, last: bool) -> float:
        """Of summing gradients: scattered from stage 2 on, on every rank below it; replicas are summed at the last."""
        n, whole = self.group, whole_bytes
        scattered = whole * (n - 1) / n / self._rate(whole, rates, across=n > self.gpus_per_node)
        replicas = self.gpus // n
        across = 0.0
        if last and replicas > 1:
            across = 2 * (whole / n) * (replicas - 1) / replicas / self._rate(whole // n, rates, across=True)
        return scattered * (1 if self.zero_stage >= 1 else 2) + across

    def network_bytes_per_second(self, whole_bytes: int, rates: Rates, *, everywhere: bool) -> float:
        """Of collectives in tensors of this size: of all GPUs, or only of a group that shares one copy."""
        ranks = self.gpus if everywhere else self.group
        return self._rate(whole_bytes, rates, across=ranks > self.gpus_per_node)

    def _rate(self, whole_bytes: int, rates: Rates, across: bool) -> float:
        within = rates.collective.at(max(1, whole_bytes))
        if not across:
            return within
        return min(within, rates.inter_node_bytes_per_second or ASSUMED_INTER_NODE_BYTES_PER_SECOND)
