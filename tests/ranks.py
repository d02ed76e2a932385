"""Several processes on this machine that train together, for tests."""

import io
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from offload.ranks import CONNECTIONS

THREADS = 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def on_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(rank, world, *args)`` returns on every rank; raises the first error of one."""
    context = mp.get_context("spawn")
    results, port = context.SimpleQueue(), free_port()
    processes = [context.Process(target=_one, args=(r, world, port, results, work, args)) for r in range(world)]
    for process in processes:
        process.start()
    try:
        found = dict(_next_of(results, processes) for _ in range(world))
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    errors = [value for value in found.values() if isinstance(value, _Failed)]
    assert not errors, errors[0].text
    return [torch.load(io.BytesIO(found[rank]), weights_only=False) for rank in range(world)]


def _next_of(results: Any, processes: list[Any]) -> tuple[int, Any]:
    """What the next rank puts; raises where one has ended without a word, as by a watchdog."""
    while True:
        codes = [process.exitcode for process in processes]  # asked first: who ends has put before
        if not results.empty():
            return results.get()
        assert not any(codes), f"the ranks ended with exit codes {codes}"
        time.sleep(0.01)


def _packed(value: Any) -> bytes:
    """Tensors in shared memory would be gone with their process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _Failed:
    def __init__(self, text: str) -> None:
        self.text = text


def _one(rank: int, world: int, port: int, results: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(THREADS)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update({**CONNECTIONS, "LOCAL_RANK": str(rank)})
    try:
        dist.init_process_group("gloo")
        results.put((rank, _packed(work(rank, world, *args))))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, _Failed(traceback.format_exc())))
        raise
