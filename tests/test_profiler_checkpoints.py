"""Inputs of recomputed blocks: what they hold, and the peak with them on the host."""

import pytest

from offload.engine import Engine
from offload.plan import Tier
from profiler import profile_model
from profiler.checkpoints import checkpoints_on_host, input_bytes
from profiler.events import BACKWARD, FORWARD, Alloc, Category, Free, Op, Save
from tests.models import GPT as PLAIN_GPT
from tests.models import batches
from tests.profiler_models import GPT, next_token_loss, tokens
from tests.test_block_inputs import plan_with


def made(number: int, size: int = 100, phase: str = FORWARD) -> Alloc:
    return Alloc(number, size, Category.ACTIVATION, "", phase)


def again(block: str) -> Op:
    return Op("aten::mm", 1, 1, "float32", f"{block}.linear", BACKWARD, recompute=True)


FORWARD_PART = [
    made(1),
    Save(1, "h.0", checkpoint=True),
    made(2),
    Save(2, "h.1", checkpoint=True),
    made(3),
    Save(3, "h.2", checkpoint=True),
]
BACKWARD_PART = [
    again("h.2"),
    Free(3, BACKWARD),
    again("h.1"),
    again("h.1"),
    Free(2, BACKWARD),
    again("h.0"),
    Free(1, BACKWARD),
]


def test_an_input_leaves_when_the_next_block_begins_and_comes_back_one_block_ahead():
    assert checkpoints_on_host([*FORWARD_PART, *BACKWARD_PART]) == [
        made(1),
        Save(1, "h.0", checkpoint=True),
        made(2),
        Free(1, FORWARD),
        Save(2, "h.1", checkpoint=True),
        made(3),
        Free(2, FORWARD),
        Save(3, "h.2", checkpoint=True),
        made(2, phase=BACKWARD),
        again("h.2"),
        Free(3, BACKWARD),
        made(1, phase=BACKWARD),
        again("h.1"),
        again("h.1"),
        Free(2, BACKWARD),
        again("h.0"),
        Free(1, BACKWARD),
    ]
    assert input_bytes([*FORWARD_PART, *BACKWARD_PART], ("h.0", "h.1", "h.2")) == (100, 100, 100)


def test_an_input_that_something_else_keeps_stays():
    events = [*FORWARD_PART, Save(1, "skip"), *BACKWARD_PART]
    moved = checkpoints_on_host(events)
    assert [e.id for e in moved if isinstance(e, Free) and e.phase == FORWARD] == [2]


def test_blocks_that_run_twice_are_left_out():
    assert checkpoints_on_host([*FORWARD_PART, Save(3, "h.0", checkpoint=True), *BACKWARD_PART]) is None


@pytest.mark.parametrize("blocks", [4, 9])
def test_the_peak_with_inputs_on_the_host_lacks_all_but_one_or_two_of_them(blocks):
    model = GPT(layers=blocks, width=128)
    profile = profile_model(model, tokens(4, 64), loss=next_token_loss)
    size = 4 * 64 * 128 * 4
    points = {(p.batch_size, p.recompute, p.checkpoints_on_host): p for p in profile.activations}
    assert set(points) == {(b, r, h) for b in (1, 4) for r in (False, True) for h in (False, True) if r or not h}
    kept, away = points[4, True, False], points[4, True, True]
    assert kept.checkpoint_bytes == away.checkpoint_bytes == blocks * size
    assert points[4, False, False].checkpoint_bytes == 0
    assert kept.allocated_bytes - away.allocated_bytes in ((blocks - 2) * size, (blocks - 1) * size)
    assert kept.on_cpu_bytes - away.on_cpu_bytes in ((blocks - 2) * size, (blocks - 1) * size)
    assert kept.executed_flops == away.executed_flops


def test_what_the_profile_counts_is_what_the_engine_sends():
    model = PLAIN_GPT()
    profile = profile_model(model, (batches(1)[0],))
    planned = {p.checkpoint_bytes for p in profile.activations if p.recompute and p.batch_size == 4}
    with Engine(model, plan_with(model, Tier.HOST)) as engine:
        engine.backward(engine(batches(1)[0]))
        engine.step()
        assert {engine.traffic_bytes()["device_to_host"]} == planned
