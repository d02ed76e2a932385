"""Ranks that use units in different orders are refused before their numbers are anything but right."""

from pathlib import Path

import torch

from offload import order as orders
from offload.engine import Engine
from offload.errors import OffloadError
from offload.order import Order, all_equal, common, difference, encoded
from tests.models import GPT, batches
from tests.plans import G, H, N, plan_for
from tests.ranks import on_ranks


class TurnedGPT(GPT):
    """Uses its two blocks in an order that the caller decides."""

    turned = False

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for i in (1, 0) if self.turned else (0, 1):
            x = self.h[i](x)
        return self.head(self.ln_f(x))


def train(rank: int, world: int, turns: list[list[int]], kept: tuple, directory: str, stage: int) -> tuple:
    """What each step says where it is refused, and whether parameters are then what they were."""
    torch.manual_seed(0)
    model = TurnedGPT(layers=2)  # of more, one rank would wait for gathers that the other does not need
    units = ["", *(f"h.{i}" for i in range(len(model.h)))]  # of one size: gloo itself ends ranks that differ in that
    plan = plan_for(model, (kept,), Path(directory), units=units, gpus=world, zero_stage=stage)
    said, changed = [], []
    with Engine(model, plan) as engine:
        for i, turned in enumerate(turns):
            before = engine.state_dict()
            model.turned = rank in turned
            try:
                engine.backward(engine(batches(1, seed=i * world + rank)[0]))
                engine.step()
                said.append("")
            except OffloadError as error:
                said.append(str(error))
            after = engine.state_dict()
            changed.append(any(not torch.equal(before[name], after[name]) for name in before))
    return said, changed


def check_refused(kept: tuple, tmp_path: Path, refused: list[int], turned: list[list[int]]) -> None:
    for said, changed in on_ranks(2, train, turned, kept, str(tmp_path), 3):
        for step, sentence in enumerate(said):
            assert bool(sentence) == (step in refused), said
            assert changed[step] != (step in refused)
        for step in refused:
            assert f"different orders in step {step + 1}" in said[step]
            assert "rank 0 gathers h." in said[step] and "where rank 1 gathers h." in said[step]
            assert "root unit" in said[step] and "stage 0, 1 or 2" in said[step]


def test_an_order_that_differs_between_ranks_is_refused_in_that_step_on_every_rank(tmp_path: Path) -> None:
    check_refused((G, G, G), tmp_path, [0], [[1]])


def test_what_waits_on_host_or_disk_is_refused_as_well(tmp_path: Path) -> None:
    check_refused((N, H, N), tmp_path, [0], [[0]])


def test_an_order_that_all_ranks_change_together_is_trained(tmp_path: Path) -> None:
    check_refused((G, G, G), tmp_path, [], [[], [0, 1], [], [0, 1]])


def test_with_whole_weights_on_the_device_ranks_may_have_orders_of_their_own(tmp_path: Path) -> None:
    for said, _ in on_ranks(2, train, [[], [1], [0]], (G, G, G), str(tmp_path), 2):
        assert said == ["", "", ""]


def submitted(*units: str, kind: str = "gather") -> Order:
    order = Order()
    for unit in units:
        order.add(kind, unit)
    return order


def agree(*digests: tuple[bytes, int]) -> bool:
    """Of ranks with a digest in a group."""
    groups = max(group for _, group in digests) + 1
    return all_equal([max(values) for values in zip(*(encoded(d, g, groups) for d, g in digests), strict=True)])


def test_digests_differ_by_order_and_by_unit_and_only_within_a_group() -> None:
    one, other = submitted("h.0", "h.1").digest(), submitted("h.1", "h.0").digest()
    assert agree((one, 0), (submitted("h.0", "h.1").digest(), 0))
    assert not agree((one, 0), (other, 0))
    assert agree((one, 0), (one, 0), (other, 1), (other, 1))
    assert not agree((one, 0), (one, 0), (other, 1), (one, 1))
    assert submitted("h.1", "1").digest() != submitted("h.", "11").digest()


def test_the_first_unit_that_differs_is_named() -> None:
    told = {4: submitted("", "h.0", "h.1").told(), 6: submitted("", "h.0", "h.2").told()}
    assert difference(told) == "rank 4 gathers h.1 where rank 6 gathers h.2"
    told = {0: submitted("", kind="reduce").told(), 1: submitted("h.0", kind="reduce").told()}
    assert difference(told) == "rank 0 reduces the root unit where rank 1 reduces h.0"


def test_a_rank_that_is_only_ahead_is_right_and_its_rest_is_compared_with_what_comes() -> None:
    ahead, behind = submitted("h.0", "h.1", "h.2"), submitted("h.0", "h.1")
    assert difference({0: ahead.told(), 1: behind.told()}) is None
    counts = common([ahead.told(), behind.told()])
    for order in (ahead, behind):
        order.drop(counts)
    behind.add("gather", "h.2")
    assert ahead.digest() == behind.digest()
    behind.add("gather", "h.0")
    ahead.add("gather", "h.1")
    assert difference({0: ahead.told(), 1: behind.told()}) == "rank 0 gathers h.1 where rank 1 gathers h.0"


def test_of_a_long_evaluation_only_the_last_names_are_kept() -> None:
    order = submitted(*["h.0"] * (orders.KEPT + 10), "h.1")
    told = order.told()["gather"]
    assert (len(told.names), told.first) == (orders.KEPT, 11)
    assert difference({0: {"gather": told}, 1: {"gather": told}}) is None
    order.drop({"gather": orders.KEPT + 10})
    assert order.told()["gather"].names == ["h.1"]
