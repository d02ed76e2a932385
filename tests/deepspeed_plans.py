"""Plans for DeepSpeed, made by hand and by hypothesis."""

from dataclasses import replace

from hypothesis import strategies as st

from memplan.rates import PLANNED
from offload.plan import Buckets, Budget, Placement, Plan, Precision, Prediction, Target, Tier

SHAPES = {
    "embed.weight": (1000, 640),
    **{f"layers.{i}.{name}.weight": (640, 1280) for i in range(3) for name in ("up", "down")},
    "norm.weight": (640,),
}
UNITS = ("", "embed", "layers.0", "layers.1", "layers.2")
LARGEST = 640 * 1280


def plan_of(parameters: Tier = Tier.GPU, optimizer: Tier = Tier.GPU, **changes) -> Plan:
    """Every unit placed alike, gradients with the optimizer state or in host memory."""
    gradients = Tier.GPU if optimizer is Tier.GPU else Tier.HOST
    plan = Plan(
        model="Made by hand",
        parameter_shapes=SHAPES,
        precision=Precision.BF16,
        device="cuda",
        gpus=1,
        zero_stage=0,
        placements=tuple(Placement(unit, parameters, gradients, optimizer) for unit in UNITS),
        buckets=Buckets(),
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        recompute=(),
        budget=Budget(1 << 40, 1 << 40, 1 << 40),
        prediction=Prediction(0, 0, 0, 0, None, None),
        nvme_dir="/swap",
    )
    return replace(plan, **changes)


@st.composite
def deepspeed_plans(draw: st.DrawFn) -> Plan:
    """Plans for DeepSpeed, and for memplan's engine, with anything that the plan's own check allows."""
    parameters = draw(st.sampled_from(list(Tier)))
    optimizer = draw(st.sampled_from([t for t in Tier if t.depth >= parameters.depth]))
    nodes, per_node = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 8]))
    elements = st.integers(1, 1 << 30)
    return plan_of(
        parameters,
        optimizer,
        precision=draw(st.sampled_from(PLANNED)),
        target=draw(st.sampled_from([Target.DEEPSPEED, Target.MEMPLAN])),
        gpus=nodes * per_node,
        nodes=nodes,
        shard_gpus=draw(st.sampled_from([0, per_node, nodes * per_node])),
        zero_stage=draw(st.integers(0, 3)),
        buckets=Buckets(
            update_elements=draw(elements),
            reduce_elements=draw(elements),
            gather_elements=draw(elements),
            persistence_elements=draw(st.integers(0, 1 << 20)),
            live_elements=draw(st.integers(0, 1 << 31)),
        ),
        micro_batch_size=draw(st.integers(1, 64)),
        gradient_accumulation_steps=draw(st.integers(1, 64)),
        recompute=draw(st.sampled_from([(), ("layers.0",), ("layers.0", "layers.1", "layers.2")])),
        checkpoints=draw(st.sampled_from([Tier.GPU, Tier.HOST])),
        loss_chunks=draw(st.sampled_from([1, 8])),
        gpu_update_share=draw(st.floats(0, 1)),
    )
