"""What a rank has of every unit in ZeRO's stages: pure arithmetic, shared by the runtime and the planner.

[Note: sharding]
Stage 1 divides the optimizer's state over the ranks of a group, stage 2 the gradients too, stage 3 the weights too
(Rajbhandari et al., ZeRO, 2020). A unit's trainable elements and its frozen ones are divided each by themselves, and
evenly: both are padded until that works. In stages 1 and 2 every rank has whole weights on its GPU; weights that live
off the GPU are divided from stage 1 on, for whoever uses them brings them to the device anyway.
"""

from dataclasses import dataclass

from offload.plan import Plan, Tier

ALIGN_ELEMENTS = 64
"""Every parameter starts at a multiple of this in its unit's flat buffer, and so does every shard: 128 bytes in bf16,
what vector loads like."""


@dataclass(frozen=True)
class Shards:
    """ZeRO's stage, and the number of ranks that share one copy of the model."""

    zero_stage: int = 0
    group: int = 1

    @classmethod
    def of(cls, plan: Plan) -> "Shards":
        """A plan's."""
        return cls(plan.zero_stage, plan.shard_gpus or plan.gpus)

    @property
    def align_elements(self) -> int:
        """What trainable and frozen elements of a unit are padded to a multiple of, each."""
        return ALIGN_ELEMENTS * self._parts(1)

    @property
    def state_parts(self) -> int:
        """Ranks that a unit's optimizer state is divided over."""
        return self._parts(1)

    def state(self, trainable_elements: int) -> int:
        """Elements of optimizer state on one rank."""
        return trainable_elements // self._parts(1)

    def gradients(self, trainable_elements: int) -> int:
        """Elements of gradients that one rank keeps."""
        return trainable_elements // self._parts(2)

    def weights(self, elements: int, tier: Tier) -> int:
        """Elements of weights that one rank keeps in this tier."""
        return elements if self.whole_weights(tier) else elements // self.group

    def whole_weights(self, tier: Tier) -> bool:
        """Whether a rank has all weights of a unit that lives in this tier."""
        return self._parts(3 if tier is Tier.GPU else 1) == 1

    def on_device(self, tier: Tier) -> bool:
        """Whether weights that live in this tier can be computed with where they are."""
        return tier is Tier.GPU and self.whole_weights(tier)

    def whole_gradients(self) -> bool:
        """Whether a rank keeps all gradients."""
        return self._parts(2) == 1

    def _parts(self, from_stage: int) -> int:
        return self.group if self.zero_stage >= from_stage else 1


ALONE = Shards()
"""One rank that has everything."""
