"""What an engine does to the process around it, and undoes."""

import gc
import weakref

import pytest
import torch

from offload.engine import Engine
from offload.setup import feed_a_gpu, grow_segments, pass_over_what_lasts
from tests.models import GPT
from tests.plans import RESIDENT, G, H, plan_for


class Knot:
    """Refers to itself, so only the collector can end it."""

    def __init__(self) -> None:
        self.itself = self


def test_the_collector_passes_over_what_was_there_until_that_is_undone_but_not_over_what_comes_later() -> None:
    garbage, kept = Knot(), Knot()
    before, old = weakref.ref(garbage), weakref.ref(kept)
    del garbage
    undo = pass_over_what_lasts()
    try:
        assert before() is None, "what was garbage already is not kept"
        later = Knot()
        new = weakref.ref(later)
        del kept, later
        gc.collect()
        assert old() is not None
        assert new() is None
    finally:
        undo()
    gc.collect()
    assert old() is None


def test_the_collector_looks_at_everything_again_when_the_last_of_several_is_through() -> None:
    first, second = pass_over_what_lasts(), pass_over_what_lasts()
    first()
    assert gc.get_freeze_count() > 0
    second()
    assert gc.get_freeze_count() == 0


def test_where_the_cpu_computes_the_process_stays_as_it_is() -> None:
    threads, frozen = torch.get_num_threads(), gc.get_freeze_count()
    closers: list = []
    feed_a_gpu(torch.device("cpu"), closers, updates_on_host=True)
    assert closers == []
    assert (torch.get_num_threads(), gc.get_freeze_count()) == (threads, frozen)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_who_keeps_segments_from_growing_is_told_what_plans_do_not_count(name: str, monkeypatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512,expandable_segments:False")
    with pytest.warns(RuntimeWarning, match="Set expandable_segments:True"):
        grow_segments(torch.device("cuda"))
    monkeypatch.setenv(name, "expandable_segments:True")
    grow_segments(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("placement", [RESIDENT, (G, G, H)])
def test_an_engine_on_a_gpu_prepares_the_process_and_leaves_it_as_it_was(placement: tuple) -> None:
    torch.set_num_threads(4)
    model = GPT()
    with Engine(model, plan_for(model, (placement,), device="cuda")):
        assert gc.get_freeze_count() > 10_000
        assert torch.get_num_threads() == (4 if placement == RESIDENT else 2)
    assert gc.get_freeze_count() == 0
    assert torch.get_num_threads() == 4
