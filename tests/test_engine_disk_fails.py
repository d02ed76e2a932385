"""The disk of the NVMe tier fails once: it is named, and training goes on from where that did no harm."""

import asyncio
import copy
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.arena import page_aligned
from offload.engine import Engine
from offload.errors import TierError
from offload.store import Store
from tests.models import GPT, batches
from tests.plans import G, H, N, plan_for
from tests.test_engine_equals_pytorch import assert_same

DATA = batches(6)
STATE_ONLY, ALL = (H, H, N), (N, H, N)


def engine_for(model: GPT, placement: tuple, tmp_path: Path) -> Engine:
    plan = plan_for(model, (placement,), tmp_path)
    return Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2))


def step(engine: Engine, tokens: torch.Tensor) -> float:
    loss = engine(tokens)
    engine.backward(loss)
    engine.step()
    return loss.item()


def fails(which: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next so many blocks that are read, or written, fail."""
    transfer, left = getattr(Store, which), [times]

    async def failing(store: Store, offset: int, block: memoryview) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        await transfer(store, offset, block)

    monkeypatch.setattr(Store, which, failing)


@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("placement", [ALL, (N, G, N)])
def test_weights_that_could_not_be_read_are_read_again_by_the_next_forward(
    placement: tuple, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    losses, failed = [], 0
    with engine_for(model, placement, tmp_path) as engine:
        for number, tokens in enumerate(DATA):
            if number == 3:
                engine.finish()
                with torch.no_grad():
                    engine(tokens)  # what a step fetches ahead is there, so it is a pass that reads what fails
                fails("_read_block", times, monkeypatch)
                for _ in range(times):
                    try:
                        engine(tokens)
                    except TierError as error:
                        failed += 1
                        said = f"reading the weights of .*unit.* failed in the NVMe directory {tmp_path} .*Input/output"
                        assert re.match(said, str(error))
                        assert isinstance(error.__cause__, OSError)
            losses.append(step(engine, tokens))
        found = engine.state_dict()
    assert failed
    for tokens, loss in zip(DATA, losses, strict=True):
        expected = plain(tokens)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(found, plain, 1e-6)


@pytest.mark.parametrize("which", ["_read_block", "_write_block"])
@pytest.mark.parametrize("placement", [STATE_ONLY, ALL, (G, H, N)])
def test_an_update_in_which_the_disk_failed_is_half_done_until_a_checkpoint_is_loaded(
    placement: tuple, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = GPT()
    other = copy.deepcopy(model)
    with engine_for(model, placement, tmp_path) as engine, engine_for(other, placement, tmp_path) as undisturbed:
        for tokens in DATA[:2]:
            assert step(engine, tokens) == step(undisturbed, tokens)
        engine.save_checkpoint(tmp_path / "good").wait()
        engine.backward(engine(DATA[2]))
        fails(which, 1, monkeypatch)
        with pytest.raises(TierError, match=f"the update of .*unit.* failed: .* in the NVMe directory {tmp_path}"):
            step_and_finish(engine)
        refused: tuple[Callable[[], object], ...] = (
            lambda: engine(DATA[2]),
            engine.step,
            engine.finish,
            engine.state_dict,
            lambda: engine.save_checkpoint(tmp_path / "bad"),
        )
        for use in refused:
            with pytest.raises(TierError, match="The update is half done: go on from a checkpoint"):
                use()
        engine.load_checkpoint(tmp_path / "good")
        for tokens in DATA[2:]:
            assert step(engine, tokens) == step(undisturbed, tokens)
        whole = undisturbed.state_dict()
        assert all(torch.equal(whole[n], t) for n, t in engine.state_dict().items())


def step_and_finish(engine: Engine) -> None:
    engine.step()
    engine.finish()


@pytest.mark.parametrize("which", ["_read_block", "_write_block"])
def test_a_request_that_failed_is_over_when_its_last_block_is(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hears of it may use the buffer for something else."""
    store = Store(tmp_path, 1 << 16, 4096)
    extent, raw = store.take(4 * 4096, "weights of unit h.0"), page_aligned(4 * 4096)
    store.write(extent, raw).result()
    over: list[int] = []

    async def slow(_: Store, offset: int, __: memoryview) -> None:
        if offset == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        await asyncio.sleep(0.05)
        over.append(offset)

    monkeypatch.setattr(Store, which, slow)
    ticket = store.read(extent, raw) if which == "_read_block" else store.write(extent, raw)
    with pytest.raises(TierError, match=r"ing the weights of unit h\.0 failed"):
        ticket.result()
    assert len(over) == 3
    store.close()
