"""A plan that somebody changed with an editor."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan.audit import audit, check_plan
from offload.engine import Engine
from offload.errors import PlanError
from offload.plan import Budget, MadeFor, Plan, Precision, Tier
from offload.residency import UnitShape
from tests.models import GPT
from tests.plans import RESIDENT, counted, plan_for

AWAY = (Tier.HOST, Tier.HOST, Tier.HOST)

GONE = object()
BYTES = "it must be a whole number of bytes, at least 0"


def planned(**changes: Any) -> Plan:
    """A plan with part of the model's blocks recomputed and their inputs on the host."""
    plan = replace(plan_for(GPT(layers=4), (RESIDENT, RESIDENT, AWAY)), recompute=("h.0", "h.1"), checkpoints=Tier.HOST)
    plan = counted(plan, GPT(layers=4))
    p = plan.prediction
    made_for = MadeFor("cpu", Precision.FP32, 4, plan.recompute, Tier.HOST, 1, 30_000, 40_000, 5_000)
    prediction = replace(
        p,
        gpu_peak_bytes=p.gpu_peak_bytes + made_for.activation_bytes,
        gpu_upper_bytes=p.gpu_upper_bytes + made_for.activation_upper_bytes,
        host_bytes=p.host_bytes + made_for.checkpoint_bytes,
        host_upper_bytes=p.host_upper_bytes + made_for.checkpoint_bytes,
        phases={"host": {"checkpoints": made_for.checkpoint_bytes}},
        made_for=made_for,
    )
    return replace(plan, prediction=prediction, **changes)


def predicting(**changes: Any) -> Plan:
    plan = planned()
    return replace(plan, prediction=replace(plan.prediction, **changes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu_update_share": 1.5}, "gpu_update_share is 1.5; it must be a number between 0 and 1"),
        ({"gpu_update_share": "half"}, "gpu_update_share is 'half'; it must be a number between 0 and 1"),
        ({"gpus": "2"}, "gpus is '2'; it must be a whole number, at least 1"),
        ({"loss_chunks": None}, "loss_chunks is None; it must be a whole number, at least 1"),
        ({"micro_batch_size": True}, "micro_batch_size is True; it must be a whole number, at least 1"),
        ({"zero_stage": "3"}, "zero_stage is '3'; it must be 0, 1, 2 or 3"),
        ({"nvme_dir": 5}, "nvme_dir is 5; it must be a string, or null"),
        ({"buckets.update_slots": 2}, "buckets.update_slots is 2; it must be a whole number, at least 3"),
        ({"buckets.update_slots": 3.5}, "buckets.update_slots is 3.5; it must be a whole number, at least 3"),
        ({"buckets.prefetch_units": "1"}, "buckets.prefetch_units is '1'; it must be a whole number, at least 0"),
        ({"budget.gpu_bytes": "150MiB"}, f"budget.gpu_bytes is '150MiB'; {BYTES}"),
        ({"budget.nvme_bytes": -1}, f"budget.nvme_bytes is -1; {BYTES}"),
        ({"budget": None}, "budget is None; it must be an object"),
        ({"prediction": None}, "prediction is None; it must be an object"),
        ({"prediction.phases": None}, "prediction.phases is None; it must be an object"),
        ({"prediction.phases": {"gpu": {"step": "x"}}}, f"prediction.phases.gpu.step is 'x'; {BYTES}"),
        ({"prediction.host_bytes": None}, f"prediction.host_bytes is None; {BYTES}"),
        ({"prediction.pinned_bytes": -5}, f"prediction.pinned_bytes is -5; {BYTES}"),
        ({"prediction.made_for.checkpoint_bytes": -5}, f"prediction.made_for.checkpoint_bytes is -5; {BYTES}"),
        (
            {"prediction.step_seconds": "1 s"},
            "prediction.step_seconds is '1 s'; it must be a number, at least 0, or null",
        ),
        (
            {"prediction.step_seconds_range": [1]},
            "prediction.step_seconds_range is (1,); it must be two numbers, or null",
        ),
        ({"parameter_shapes": {"w": ["a"]}}, "parameter_shapes.w is ('a',); it must be a list of whole numbers"),
    ],
)
def test_a_value_that_can_not_be_is_named_with_what_it_must_be(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    data = planned().to_dict()
    for key, value in change.items():
        *parts, last = key.split(".")
        part = data
        for name in parts:
            part = part[name]
        part[last] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(caught.value) == f"{path}: {says}"


AGAIN = "make the plan again with memplan plan"
TIERS = "it must be 'gpu', 'host' or 'nvme'"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (
            ("placements", 2, "optimizer"),
            "hbm",
            ": placements[2].optimizer is 'hbm'; it must be 'gpu', 'host' or 'nvme'",
        ),
        (("placements", 0, "parameters"), 3, ": placements[0].parameters is 3; it must be 'gpu', 'host' or 'nvme'"),
        (("placements", 1, "unit"), None, ": placements[1].unit is None; it must be a string"),
        (("placements", 1), "h.0", ": placements[1] is 'h.0'; it must be an object"),
        (("placements",), {}, ": placements is {}; it must be a list"),
        (("recompute",), "h.0", ": recompute is 'h.0'; it must be a list"),
        (("recompute",), [1], ": recompute is (1,); it must be a list of strings"),
        (("precision",), "fp8", ": precision is 'fp8'; it must be 'fp32', 'amp', 'bf16' or 'fp16'"),
        (("shard_gpus",), "all", ": shard_gpus is 'all'; it must be a whole number, at least 0"),
        (("gpus",), 10**30, f": gpus is {10**30}; it must be below 2^63"),
        pytest.param(
            ("prediction", "step_seconds"),
            10**400,
            f": prediction.step_seconds is {10**17}...{'0' * 19}; it must be below 2^63",
            id="what no float holds",
        ),
        (("buckets", "speed"), 1, ": buckets.speed is nothing that this version knows; take it out"),
        (("a key\nwith a line",), 1, ": ['a key\\nwith a line'] is nothing that this version knows; take it out"),
        (("buckets",), GONE, f": buckets is missing; {AGAIN}"),
        (("placements", 3, "gradients"), GONE, f": placements[3].gradients is missing; {AGAIN}"),
        (("prediction", "made_for", "device"), GONE, f": prediction.made_for.device is missing; {AGAIN}"),
        (
            ("schema",),
            "memplan.plan/1",
            f": it is not a plan that this version can read: its schema is 'memplan.plan/1', and must be "
            f"'memplan.plan/2'; {AGAIN}",
        ),
        (
            ("schema",),
            GONE,
            f": it is not a plan that this version can read: it names no schema, and must be 'memplan.plan/2'; {AGAIN}",
        ),
    ],
)
def test_a_place_that_is_not_as_it_must_be_is_named_with_what_is_there_and_what_to_do(
    place: tuple[Any, ...], value: Any, says: str, tmp_path: Path
) -> None:
    data = json.loads(json.dumps(planned().to_dict()))
    *before, last = place
    part = data
    for name in before:
        part = part[name]
    if value is GONE:
        del part[last]
    else:
        part[last] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(caught.value) == f"{path}{says}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (DEEP, f" is not a plan: it is nested too deeply; {AGAIN}"),
        ("[1]", f": it is not a plan, for it holds [1] and no object; {AGAIN}"),
        ("{", " is not a plan: it is no JSON that can be read (Expecting property name enclosed in double quotes"),
        ("", " is not a plan: it is no JSON that can be read (Expecting value: line 1 column 1 (char 0)); "),
    ],
)
def test_a_file_that_is_no_plan_is_said_to_be_none(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"{path}{says}")


def test_a_plan_that_is_no_file_says_why_it_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="can not be read: Is a directory"):
        Plan.load(tmp_path)


def test_what_a_prediction_was_made_for_is_read_again(tmp_path: Path) -> None:
    planned().save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == planned()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"micro_batch_size": 64}, "micro_batch_size is 64, but the prediction was made for 4, "),
        ({"recompute": ()}, "recompute is of 0 modules, but the prediction was made for that of 2, "),
        (
            {"recompute": ("h.2", "h.3")},
            "recompute is of 2 modules, but the prediction was made for that of other ones",
        ),
        ({"checkpoints": Tier.GPU}, "checkpoints is gpu, but the prediction was made for host, "),
        ({"loss_chunks": 4}, "loss_chunks is 4, but the prediction was made for 1, "),
    ],
)
def test_a_plan_whose_activations_are_others_than_were_predicted_is_refused(change: dict[str, Any], says: str) -> None:
    model = GPT(layers=4)
    check_plan(planned(), model)
    with pytest.raises(PlanError) as caught:
        check_plan(planned(**change), model)
    assert says in str(caught.value)
    assert "or make it again with memplan plan" in str(caught.value)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (predicting(gpu_upper_bytes=0), "prediction.gpu_upper_bytes is 0, but model state on the gpu takes"),
        (predicting(gpu_peak_bytes=9), "prediction.gpu_peak_bytes is 9, but model state on the gpu takes"),
        (predicting(host_upper_bytes=0), "prediction.host_upper_bytes is 0, below the"),
        (predicting(host_upper_bytes=1 << 41), "the host tier holds up to 2.00 TiB, over its budget of 1.00 TiB"),
        (planned(budget=Budget(1, 1, 1)), "the gpu tier holds up to"),
        (
            predicting(host_bytes=10**6, host_upper_bytes=10**6, phases={"host": {"checkpoints": 10**6}}),
            "the host tier is predicted to hold 1000000 bytes, but the placements add up to",
        ),
    ],
)
def test_a_prediction_that_does_not_add_up_is_refused_before_anything_is_allocated(plan: Plan, says: str) -> None:
    with pytest.raises(PlanError, match=f"^the plan does not add up: {re.escape(says)}"):
        memplan.initialize(GPT(layers=4), plan)


def test_a_plan_of_before_predictions_said_what_they_were_for_is_audited_by_its_phases() -> None:
    plan, model = planned(), GPT(layers=4)
    p = plan.prediction
    assert p.made_for is not None
    phases = {"gpu": {"attach": p.gpu_peak_bytes - p.made_for.activation_bytes}, **p.phases}
    old = replace(p, made_for=None, phases=phases)
    check_plan(replace(plan, prediction=old), model)
    with pytest.raises(PlanError, match="gpu_peak_bytes is"):
        check_plan(replace(plan, prediction=replace(old, gpu_peak_bytes=9)), model)


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
