"""A plan that somebody changed with an editor."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memplan.audit import audit
from offload.engine import Engine
from offload.errors import PlanError
from offload.plan import Plan, Tier
from offload.residency import UnitShape
from tests.models import GPT
from tests.plans import RESIDENT, plan_for


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu_update_share": 1.5}, "gpu_update_share is 1.5; it must be between 0 and 1"),
        ({"gpu_update_share": "half"}, "gpu_update_share is 'half'; it must be between 0 and 1"),
        ({"gpus": "2"}, "gpus is '2'; it must be a whole number"),
        ({"loss_chunks": None}, "loss_chunks is None; it must be a whole number"),
        ({"update_slots": 2}, "buckets.update_slots is 2; an update needs at least 3"),
        ({"update_slots": 3.5}, "buckets.update_slots is 3.5; it must be a whole number"),
        ({"update_slots": "9"}, "buckets.update_slots is '9'; it must be a whole number"),
    ],
)
def test_a_value_that_can_not_be_is_named_with_what_it_must_be(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    data = plan_for(GPT(layers=1), (RESIDENT,)).to_dict()
    for key, value in change.items():
        (data["buckets"] if key in data["buckets"] else data)[key] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(caught.value) == f"{path}: {says}"


def test_a_plan_that_is_not_there_is_said_not_to_be(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not exist; memplan plan writes one"):
        Plan.load(tmp_path / "plam.json")


def test_a_placement_that_was_changed_names_the_prediction_to_change_with_it() -> None:
    plan = plan_for(GPT(layers=1), (RESIDENT,))
    shapes = [UnitShape.of(p.unit, [640]) for p in plan.placements]
    moved = replace(plan, placements=tuple(replace(p, optimizer=Tier.HOST) for p in plan.placements))
    assert any("by hand, write that into prediction.host_bytes" in said for said in audit(moved, shapes))


def test_a_unit_that_only_holds_modules_is_refused_before_anything_moves() -> None:
    model = GPT(layers=2)
    plan = plan_for(model, (RESIDENT,))
    root = next(p for p in plan.placements if not p.unit)
    by_list = replace(plan, placements=(root, replace(root, unit="h")))
    with pytest.raises(PlanError, match="the plan places 'h', a ModuleList, which nobody calls"):
        Engine(model, by_list)
    with pytest.raises(PlanError, match="the plan places 'k', but the model has no module of that name"):
        Engine(model, replace(plan, placements=(root, replace(root, unit="k"))))
