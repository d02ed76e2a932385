"""What DeepSpeed holds beyond the plainest setups: gradients in other types, second partitions, room on the host."""

from dataclasses import replace

import pytest

from memplan.engines.deepspeed import DeepSpeed
from memplan.engines.deepspeed_memory import deepspeed_held
from memplan.engines.deepspeed_sizes import sizes_of
from memplan.engines.deepspeed_traffic import deepspeed_traffic
from memplan.engines.held import BACKWARD, FORWARD, STEP
from memplan.engines.pinned import rounded
from memplan.search import problem_of
from offload.errors import PlanError
from offload.plan import Target
from tests.deepspeed_plans import plan_of
from tests.synthetic_profiles import RATES, machine_of, transformer
from tests.test_deepspeed_memory import HOST, NVME, model, setup

PARAMETERS = model(16)
TOTAL = sum(p.elements for p in PARAMETERS)
SMALL = {"reduce_elements": 2, "live_elements": 0, "gather_elements": 2, "gpus": 8}


def held(stage: int, steps: int = 1, **more):
    return deepspeed_held(PARAMETERS, setup(stage, **SMALL, **more), steps)


@pytest.mark.parametrize("steps", [1, 4])
def test_stage_1_with_fp32_sums_holds_four_more_bytes_a_parameter_on_every_gpu(steps):
    """BF16_Optimizer allocates them for the whole model when it starts, and lets them go never."""
    found = held(1, steps, accumulated_bytes=4)
    assert found.gpu[FORWARD] == pytest.approx(8 * TOTAL + 12 * TOTAL // 8, rel=1e-3)
    assert found.gpu[BACKWARD] > found.gpu[FORWARD]
    # The sums are converted whole for a collective in bf16.
    assert found.gpu[STEP] == pytest.approx(10 * TOTAL + 12 * TOTAL // 8, rel=1e-3)
    wide = held(1, steps, accumulated_bytes=4, communicated_bytes=4)
    assert wide.gpu[STEP] < found.gpu[STEP]


def test_fp16_and_an_optimizer_on_the_host_sum_in_fp32_at_the_parameters():
    for more in ({"loss_scaled": True}, {"optimizer": HOST}):
        found, plain = (held(1, accumulated_bytes=n, **more) for n in (4, None))
        assert found.gpu[BACKWARD] - plain.gpu[BACKWARD] >= 4 * TOTAL
        assert found.gpu[FORWARD] == plain.gpu[FORWARD]


def test_stage_2_with_fp32_sums_holds_two_more_bytes_of_its_slice():
    found, plain = held(2, 2, accumulated_bytes=4), held(2, 2)
    assert found.gpu[FORWARD] - plain.gpu[FORWARD] >= 2 * TOTAL // 8


def test_stage_3_keeps_its_flat_gradients_in_the_type_of_the_sums():
    found, plain = held(3, accumulated_bytes=4), held(3)
    assert found.gpu[FORWARD] - plain.gpu[FORWARD] == pytest.approx(2 * TOTAL // 8, rel=1e-3)
    off = {"parameters": HOST, "optimizer": HOST, "pin_memory": False}
    found, plain = held(3, accumulated_bytes=4, **off), held(3, **off)
    assert found.host[STEP] - plain.host[STEP] == pytest.approx(2 * TOTAL, rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_are_in_the_type_of_the_collectives(stage):
    million = {"reduce_elements": 1_000_000, "gpus": 8}
    found, plain = (
        deepspeed_held(PARAMETERS, setup(stage, communicated_bytes=n, **million), 1).gpu[BACKWARD] for n in (4, None)
    )
    assert found - plain >= 2 * 1_000_000
    found, plain = (
        deepspeed_traffic(setup(stage, communicated_bytes=n, **million), TOTAL, TOTAL, 1).reduce_bytes
        for n in (4, None)
    )
    assert found == 2 * plain


@pytest.mark.parametrize("hpz", [2, 4, 8])
def test_a_second_partition_is_that_share_of_the_weights_more(hpz):
    assert held(3, hpz=hpz).gpu[FORWARD] - held(3).gpu[FORWARD] == -(-2 * TOTAL // hpz)


def test_room_for_parameters_in_host_memory_is_pinned_whether_it_is_filled_or_not():
    away = {"parameters": NVME, "optimizer": NVME, "sub_group_elements": 2_000_000, "param_buffer_elements": 10_000_000}
    none, some, all_of_it = (
        deepspeed_held(PARAMETERS, setup(3, **away, max_in_cpu_elements=n), 1) for n in (0, 1_500_000, 1_000_000_000)
    )
    assert some.pinned_bytes - none.pinned_bytes == rounded(2 * 1_500_000)
    # What has room comes from no disk, and the buffer for new weights on their way there is not made.
    largest = max(sizes_of(PARAMETERS, setup(3, **away)).groups)
    assert all_of_it.pinned_bytes - none.pinned_bytes == rounded(2 * TOTAL) - 2 * largest


def test_parameters_that_have_room_in_host_memory_are_not_read_from_the_disk():
    away = setup(3, parameters=NVME, optimizer=HOST, sub_group_elements=2_000_000, max_in_cpu_elements=15_000_000)
    kept = sizes_of(PARAMETERS, away).kept
    assert kept == 14_000_000  # the embedding and one block: whole sub-groups only
    all_moved, moved = (deepspeed_traffic(away, TOTAL, TOTAL, 1, n) for n in (0, kept))
    assert all_moved.nvme_read_bytes - moved.nvme_read_bytes == 2 * 2 * kept
    assert all_moved.nvme_write_bytes - moved.nvme_write_bytes == 2 * kept


def test_parameters_on_the_host_with_their_state_on_the_gpu_are_updated_there():
    traffic = deepspeed_traffic(setup(3, parameters=HOST), TOTAL, TOTAL, 1)
    assert (traffic.gpu_update_elements, traffic.cpu_update_elements) == (TOTAL, 0)
    assert (traffic.h2d_forward_bytes, traffic.d2h_step_bytes) == (2 * TOTAL, 2 * TOTAL)


def test_a_plan_for_deepspeed_may_keep_state_on_the_gpu_and_weights_off_it():
    own = plan_of(zero_stage=3, target=Target.DEEPSPEED)
    placements = tuple(replace(p, parameters=HOST) for p in own.placements)
    assert replace(own, placements=placements).uses(HOST)
    with pytest.raises(PlanError, match="the state must live where the parameters do"):
        replace(own, placements=placements, target=Target.MEMPLAN)


def test_a_plan_for_deepspeed_may_have_groups_of_any_size_that_divides_the_gpus():
    assert plan_of(gpus=8, shard_gpus=2, target=Target.DEEPSPEED).shard_gpus == 2
    for wrong in ({"shard_gpus": 3, "target": Target.DEEPSPEED}, {"shard_gpus": 2}):
        with pytest.raises(PlanError, match="shard_gpus is"):
            plan_of(gpus=8, **wrong)


def test_stage_0_is_no_setup_for_sums_in_another_type():
    machine = machine_of(1 << 40, 1 << 40, device="cuda", gpus=2)
    problem = problem_of(transformer(2, 1_000_000, 0, precision="bf16"), machine, RATES, 2, None, Target.DEEPSPEED)
    stages = {s.family.sharding.zero_stage for s in DeepSpeed(accumulated_bytes=4).setups(problem)}
    assert stages == {1, 2, 3}
    assert {s.family.sharding.zero_stage for s in DeepSpeed().setups(problem)} == {0, 1, 2, 3}
