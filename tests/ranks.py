"""Several processes on this machine that train together, for tests."""

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
        found = dict(results.get() for _ in range(world))
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    errors = [value for value in found.values() if isinstance(value, _Failed)]
    assert not errors, errors[0].text
    return [torch.load(io.BytesIO(found[rank]), weights_only=False) for rank in range(world)]


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
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        dist.init_process_group("gloo")
        results.put((rank, _packed(work(rank, world, *args))))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, _Failed(traceback.format_exc())))
        raise
