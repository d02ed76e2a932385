"""What the planner's benchmark adds up."""

from dataclasses import astuple, replace

from benchmarks.planned_again import MACHINE, allowed_by_margin, refusals, restored, setup_of, summary
from memplan.planned import counts_of
from memplan.search import plan
from tests.synthetic_profiles import RATES, transformer


def row(seconds: float | None, predicted: float = 1.0, **more: object) -> dict:
    sizes = {"gpu_peak_bytes": 100, "host_bytes": 0, "nvme_bytes": 0}
    measured = {**sizes, "seconds": seconds, "out_of_memory": None if seconds else "out of memory"}
    return {"predicted": {**sizes, "seconds": predicted}, "measured": measured, **more}


def test_errors_are_those_of_plans_that_ran_and_running_out_of_memory_is_counted():
    found = summary([row(1.0, 1.1), row(2.0, 1.0), row(None)])
    assert (found["plans"], found["out_of_memory"]) == (3, 1)
    assert found["seconds"]["worst"] == 0.5
    assert found["gpu_peak_bytes"]["worst"] == 0
    assert "host_bytes" not in found, "a tier that nobody uses has no error"


def test_refusals_are_counted_up_to_twice_the_largest_batch_that_runs():
    batches = {"largest_that_runs": 10, "largest_allowed": 8, "most": 128}
    found = summary([row(1.0, batches=batches)])["batches"]
    assert found == {"refused": 12, "wrongly": 2, "allowed_wrongly": 0}
    again = refusals([row(1.0, batches={**batches, "again": 11})], "again")
    assert again == {"refused": 9, "wrongly": 0, "allowed_wrongly": 1}


def test_a_setup_says_what_a_prediction_needs():
    found = plan(transformer(4, batch_size=4), replace(MACHINE, gpu_bytes=1 << 33), RATES, batch_size=4)
    setup = setup_of(found)
    assert setup["counts"] == list(astuple(counts_of(found)))
    assert setup["micro_batch"] * setup["accumulation"] == 4


def test_a_setup_is_predicted_as_its_plan_was_and_allows_what_the_plan_takes():
    profile = transformer(4, batch_size=4)
    found = plan(profile, replace(MACHINE, gpu_bytes=1 << 33), RATES, batch_size=4)
    expected, setup = found.prediction, setup_of(found)
    family, counts = restored(profile, RATES, setup, found.micro_batch_size, found.gradient_accumulation_steps)
    assert family.gpu_peak_bytes(counts) == expected.gpu_peak_bytes
    assert family.seconds_of(counts) == expected.step_seconds
    enough = allowed_by_margin(profile, RATES, setup, expected.gpu_upper_bytes)
    assert enough["largest_allowed"] >= found.micro_batch_size
    assert allowed_by_margin(profile, RATES, setup, expected.gpu_upper_bytes - 1)["largest_allowed"] < (
        found.micro_batch_size
    )
    margins = [*enough["with_margin_mib"].values()]
    assert margins == sorted(margins, reverse=True), "a larger margin allows no more"
