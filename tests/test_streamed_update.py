"""State on the host that the device updates, alone and beside the host: the same training, whoever updates what."""

import copy
import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.allotment import Reach, allot
from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Buckets, Budget, Placement, Precision, StateFormat, Tier
from offload.residency import UPDATE_RING, UnitShape, footprint, streamed_slot_bytes
from offload.rules import AdamWStep
from offload.split import TRIES, Took, UpdateSplit
from offload.state import UnitState
from offload.streamed_update import StreamedUpdate
from offload.streams import Done, Lane
from offload.unit_update import Segment, UnitUpdate, shared
from offload.visits import Visit
from tests.models import GPT, FrozenGPT, LoopingGPT, SkippingGPT, TiedGPT, batches
from tests.plans import G, H, N, plan_for
from tests.test_engine_equals_pytorch import assert_same, train_plainly, train_through_tiers

ON_HOST = ((H, H, H), (G, G, H), (G, H, H), (H, G, H))
"""Each way in which state on the host meets weights and gradients."""
LARGER_PIECES = Buckets(prefetch_units=1, update_elements=1 << 17)


@pytest.mark.parametrize("kind", [GPT, TiedGPT, FrozenGPT, SkippingGPT, LoopingGPT])
@pytest.mark.parametrize(("share", "slots"), [(0.4, 3), (1.0, 3), (0.5, 9), (1.0, 400)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_with_a_shared_update_is_plain_training(
    kind: type[GPT], share: float, slots: int, accumulation: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    data = batches(6 * accumulation)
    placements = (*ON_HOST, (G, G, G), (H, H, N))
    plan = plan_for(
        model,
        placements,
        tmp_path,
        gpu_update_share=share,
        gradient_accumulation_steps=accumulation,
        buckets=Buckets(prefetch_units=1, update_elements=1000, io_bytes=16384, update_slots=slots),
    )
    losses, found = train_through_tiers(model, plan, data, 0.05)
    assert losses == pytest.approx(train_plainly(plain, data, accumulation, 0.05), rel=1e-6)
    assert_same(found, plain, 1e-6)


def test_in_bf16_the_share_changes_no_bit(tmp_path: Path) -> None:
    found = []
    for share, slots in ((0.0, 3), (0.3, 3), (1.0, 3), (0.6, 8), (1.0, 40)):
        torch.manual_seed(0)
        model = GPT()
        buckets = Buckets(1, 5000, 16384, update_slots=slots)
        plan = plan_for(model, ON_HOST, tmp_path, Precision.BF16, gpu_update_share=share, buckets=buckets)
        found.append(train_through_tiers(model, plan, batches(6), 0.05))
    for losses, tensors in found[1:]:
        assert losses == found[0][0]
        for name, tensor in found[0][1].items():
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("slow", ["up", "returns", "down", "update", "streamed", "home", "leaving", "everything"])
@pytest.mark.parametrize(("placement", "slots"), [*((p, 3) for p in ON_HOST), ((H, H, H), 7), ((G, G, H), 40)])
def test_slow_transfers_change_nothing(
    slow: str, placement: tuple, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, submit = random.Random(0), Lane.submit

    def slow_submit(lane: Lane, job: Any, after: Any = ()) -> Any:
        def slow_job() -> None:
            time.sleep(waits.uniform(0, 0.004))
            job()

        return submit(lane, slow_job if slow in (lane.name, "everything") else job, after)

    monkeypatch.setattr(Lane, "submit", slow_submit)
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    data = batches(4)
    buckets = Buckets(1, 5000, 16384, update_slots=slots)
    plan = plan_for(model, (placement,), gpu_update_share=0.6, buckets=buckets)
    losses, found = train_through_tiers(model, plan, data, 0.05)
    assert losses == pytest.approx(train_plainly(plain, data, 1, 0.05), rel=1e-6)
    assert_same(found, plain, 1e-6)


def test_both_engines_really_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT()
    pieces: list[int] = []
    visiting = StreamedUpdate._update_piece

    def counted(self: StreamedUpdate, visit: Visit, *rest: Any) -> None:
        pieces.append(visit.piece.stop - visit.piece.start)
        visiting(self, visit, *rest)

    monkeypatch.setattr(StreamedUpdate, "_update_piece", counted)
    with Engine(model, plan_for(model, ((H, H, H),), gpu_update_share=0.5)) as engine:
        engine.backward(engine(batches(1)[0]))
        engine.step()
        engine.finish()
        elements = sum(s.unit.shape.trainable_elements for s in engine.states)
        moved = engine.traffic_bytes()
    assert 0.2 * elements < sum(pieces) < 0.6 * elements
    assert moved["device_to_host"] >= 12 * sum(pieces)


def test_what_goes_wrong_on_the_device_ends_training_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(StreamedUpdate, "_update_piece", broken)
    model = GPT()
    engine = Engine(model, plan_for(model, ((H, H, H),), gpu_update_share=1.0))
    said = "the update of .*unit.* failed: RuntimeError: the device is on fire. The update is half done"
    with pytest.raises(OffloadError, match=said), engine:
        for tokens in batches(3):
            engine.backward(engine(tokens))
            engine.step()


def test_the_ring_is_counted_where_state_on_the_host_has_one() -> None:
    shapes, buckets = [UnitShape.of("a", [1 << 20])], Buckets(update_elements=1 << 16)
    form = StateFormat(Precision.BF16)
    ring = UPDATE_RING * streamed_slot_bytes(1 << 16, form)
    for placement, extra in (((H, H, H), ring), ((G, G, H), ring), ((G, G, G), 0), ((G, G, N), 0)):
        placements = [Placement("a", *placement)]
        with_share, without = (footprint(shapes, placements, buckets, form, s).gpu_bytes for s in (0.5, 0.0))
        assert with_share - without == extra


@given(
    st.integers(1, 100_000),
    st.floats(0, 1),
    st.integers(1, 20_000),
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 100_000)), max_size=5),
)
def test_every_element_is_updated_by_one_engine(
    elements: int, share: float, least: int, spans: list[tuple[int, int]]
) -> None:
    edges = sorted({min(e, elements) for span in spans for e in span} | {0, elements})  # so there is a segment
    how = AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.1, 1)
    segments = tuple(Segment(a, b, how) for a, b in zip(edges[:-1:2], edges[1::2], strict=False) if a < b)
    state = _state(elements)
    update = UnitUpdate(state, segments, Done())
    host, device = shared([update], allot([Reach("", elements)], share, least, 3).edges)
    owners = torch.zeros(elements, dtype=torch.int32)
    for part in (*host, *device):
        assert part.segments
        for s in part.segments:
            owners[s.start : s.stop] += 1
    expected = torch.zeros(elements, dtype=torch.int32)
    for s in segments:
        expected[s.start : s.stop] += 1
    assert torch.equal(owners, expected)
    for part in (*host, *device):
        assert not update.promise.settled
        part.promise.finish(None)
    assert update.promise.settled


def _state(elements: int) -> UnitState:
    unit: Any = SimpleNamespace(name="", shape=SimpleNamespace(trainable_elements=elements))
    there: Any = object()
    return UnitState(unit, [(0, elements)], [(0, elements)], host_weights=there, host_state=there, host_gradients=there)


def _learned(split: UpdateSplit, host_seconds: Callable[[float], float], device_seconds: Callable[[float], float]):
    """The shares that were tried while it learned from steps of so many seconds, and the one that it settled on."""
    tried = []
    while split.learns:
        share = split.device_share
        tried.append(share)
        host = Took(round(1e6 * (1 - share)), host_seconds(share))
        device = Took(1_000_000 - host.elements, device_seconds(share))
        for _ in range(2):  # the first step and the one after a move teach nothing
            moved = split.learn(host, device)
            if not split.learns or moved:
                break
    return tried, split.device_share


@given(st.floats(0.05, 5), st.floats(0.05, 5), st.floats(0.1, 0.9))
def test_the_split_moves_to_where_both_end_at_once_and_stays(host: float, device: float, start: float) -> None:
    split = UpdateSplit(start)
    tried, settled = _learned(split, lambda share: host * (1 - share), lambda share: device * share)
    right = host / (host + device)
    assert len(tried) <= TRIES
    assert all(abs(b - right) <= abs(a - right) + 1e-6 for a, b in pairwise(tried))
    assert abs(settled - right) < 0.07
    split.learn(Took(1_000_000, 10 * host), Took(1_000_000, device))
    assert split.device_share == settled


@given(st.floats(0.1, 1), st.floats(0.01, 0.2), st.floats(0.5, 0.9), st.floats(0.1, 0.9))
def test_a_share_that_the_links_can_not_carry_is_not_kept(
    host: float, device: float, carried: float, start: float
) -> None:
    def device_seconds(share: float) -> float:
        return device * share + (2.0 if share > carried else 0.0)

    split = UpdateSplit(start)
    tried, settled = _learned(split, lambda share: host * (1 - share), device_seconds)
    assert settled in tried
    ends = [max(host * (1 - share), device_seconds(share)) for share in tried]
    assert max(host * (1 - settled), device_seconds(settled)) == pytest.approx(min(ends))
    if start <= carried:
        assert settled <= carried


def test_a_step_that_one_engine_slept_through_teaches_nothing() -> None:
    split = UpdateSplit(0.5)
    split.learn(Took(0, 1.0), Took(1000, 1.0))
    split.learn(Took(1000, 1.0), Took(0, 1.0))
    assert split.device_share == 0.5


def test_the_first_step_in_which_kernels_are_compiled_is_no_try() -> None:
    split = UpdateSplit(0.3)
    assert not split.learn(Took(700, 0.7), Took(300, 60.0))
    assert split.device_share == 0.3
    assert split.learn(Took(700, 0.7), Took(300, 0.1))
    assert split.device_share > 0.3


def test_a_step_is_not_the_soonest_because_few_experts_were_asked() -> None:
    split, sizes = UpdateSplit(0.2), chain([100, 100], repeat(1000))
    while split.learns:
        elements, share = next(sizes), split.device_share
        host, device = round(elements * (1 - share)), round(elements * share)
        split.learn(Took(host, host / 100), Took(device, device / 400))
    assert split.device_share > 0.7


def test_what_a_step_took_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Took | None, Took | None]] = []
    monkeypatch.setattr(UpdateSplit, "learn", lambda _, host, device: told.append((host, device)))
    took = Took(1000, 1.0)
    with Engine(model := GPT(), plan_for(model, ((H, H, H),), gpu_update_share=0.5)) as engine:
        for host, device in ((took, None), (None, took), (None, None), (took, took), (None, None)):
            engine._updater._took = host or engine._updater._took
            engine._streamed._clock = engine._streamed._clock if device is None else SimpleNamespace(read=lambda: took)
            engine._updater.coming()
    assert told == [(took, took)]


def test_a_plan_with_a_share_fits_its_budget_to_the_byte(tmp_path: Path) -> None:
    model = GPT()
    plan = plan_for(model, ((H, H, H),), gpu_update_share=0.5, budget=Budget(1 << 30, 1 << 30, 0))
    with Engine(model, plan) as engine:
        shapes, placements = [s.unit.shape for s in engine.states], [s.unit.placement for s in engine.states]
        held = footprint(shapes, placements, plan.buckets, plan.state_format, plan.gpu_update_share)
        assert engine.meter.now_bytes()[Tier.GPU.value] == held.gpu_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("placement", ON_HOST)
def test_on_a_gpu_the_share_changes_no_bit(placement: tuple) -> None:
    found = []
    for share, slots in ((0.0, 3), (0.5, 3), (0.7, 9), (1.0, 40)):
        torch.manual_seed(0)
        model = GPT(width=256)
        buckets = replace(LARGER_PIECES, update_slots=slots)
        plan = plan_for(model, (placement,), None, Precision.BF16, "cuda", gpu_update_share=share, buckets=buckets)
        found.append(train_through_tiers(model, plan, batches(20), 0.05))
    for losses, tensors in found[1:]:
        assert losses == found[0][0]
        for name, tensor in found[0][1].items():
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("late", ["arriving", "computing", "leaving", "home", "main"])
@pytest.mark.parametrize("slots", [3, 9])
def test_on_a_gpu_slow_streams_change_nothing(late: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that is missing between two streams shows as other bits, for here one of them lags behind."""
    expected = _trained_on_gpu(slots)
    visiting = StreamedUpdate._update_piece

    def lagging(self: StreamedUpdate, *args: Any) -> None:
        leaving, home = self._leaving._stream, self._home._stream
        streams = {"arriving": None, "computing": self._computing, "leaving": leaving, "home": home}
        if late == "main":
            with torch.cuda.stream(torch.cuda.default_stream()):
                torch.cuda._sleep(2_000_000)
        elif (stream := streams[late]) is not None:
            with stream:
                torch.cuda._sleep(2_000_000)
        else:
            torch.cuda._sleep(2_000_000)
        visiting(self, *args)

    monkeypatch.setattr(StreamedUpdate, "_update_piece", lagging)
    found = _trained_on_gpu(slots)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def _trained_on_gpu(slots: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(width=256)
    buckets = replace(LARGER_PIECES, update_slots=slots)
    plan = plan_for(model, ON_HOST, None, Precision.BF16, "cuda", gpu_update_share=0.6, buckets=buckets)
    return train_through_tiers(model, plan, batches(5), 0.05)[1]
