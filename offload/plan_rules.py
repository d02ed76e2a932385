"""What each value of a plan must be by itself. What they must be together is in ``offload.plan``."""

from typing import Any

from offload.figures import BYTES, TEXT, TEXTS, YES_OR_NO, Rule, each, list_of, number, or_none, place, whole, wrong

SHAPE = list_of(whole(0), "whole numbers")
SECONDS = or_none(number())
RANGE = Rule(
    lambda pair: pair is None or (isinstance(pair, tuple) and [number().holds(end) for end in pair] == [True, True]),
    "two numbers, or null",
)
WHOLE = ("gpus", "nodes", "loss_chunks", "micro_batch_size", "gradient_accumulation_steps")
RULES = {
    "": {
        "model": TEXT,
        "parameter_shapes": each(SHAPE),
        "device": Rule(lambda device: device in ("cuda", "cpu"), "'cuda' or 'cpu'"),
        **dict.fromkeys(WHOLE, whole(1)),
        "zero_stage": Rule(lambda stage: whole(0).holds(stage) and stage < 4, "0, 1, 2 or 3"),
        "shard_gpus": whole(0),
        **dict.fromkeys(("recompute", "reasons"), TEXTS),
        "gpu_update_share": number(0, 1),
        "nvme_dir": or_none(TEXT),
        "on_meta": YES_OR_NO,
    },
    "buckets": {
        **dict.fromkeys(("update_elements", "io_bytes"), whole(1)),
        "update_slots": whole(3),
        **dict.fromkeys(
            ("prefetch_units", "reduce_elements", "gather_elements", "persistence_elements", "live_elements"), whole(0)
        ),
    },
    "budget": dict.fromkeys(("gpu_bytes", "host_bytes", "nvme_bytes"), BYTES),
    "prediction": {
        **dict.fromkeys(("gpu_peak_bytes", "host_bytes", "pinned_bytes", "nvme_bytes"), BYTES),
        **dict.fromkeys(("gpu_upper_bytes", "host_upper_bytes"), BYTES),
        "step_seconds": SECONDS,
        "bottleneck": or_none(TEXT),
        "lane_seconds": each(number()),
        "step_seconds_range": RANGE,
        "phases": each(each(BYTES)),
    },
    "prediction.made_for": {
        "device": TEXT,
        "recompute": TEXTS,
        **dict.fromkeys(("micro_batch_size", "loss_chunks"), whole(1)),
        **dict.fromkeys(("activation_bytes", "activation_upper_bytes", "checkpoint_bytes", "batch_elements"), BYTES),
    },
}
"""By the part of a plan that they are for."""
RULES_OF_EACH = {
    "placements": {"unit": TEXT},
    "alternatives": {
        **dict.fromkeys(("description", "why_not"), TEXT),
        "step_seconds": SECONDS,
        **dict.fromkeys(("gpu_peak_bytes", "host_bytes", "nvme_bytes"), BYTES),
    },
}
"""By the list of a plan, for each of its entries."""


def first_wrong(plan: Any) -> str | None:
    """What is wrong with the first value of a plan that is not what it must be."""
    for part, rules in RULES.items():
        found = plan
        for name in filter(None, part.split(".")):
            found = getattr(found, name)
        if found is not None and (said := wrong(vars(found), rules, part)):
            return said
    for part, rules in RULES_OF_EACH.items():
        for i, entry in enumerate(getattr(plan, part)):
            if said := wrong(vars(entry), rules, place(part, i)):
                return said
    return None
