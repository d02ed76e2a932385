"""The states of random number generators as tensors: Python's, NumPy's, torch's on the CPU and on the GPU."""

import random
from collections.abc import Mapping

import numpy
import torch


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Of this process, by the name of the generator."""
    _, internal, gauss = random.getstate()
    _, key, position, has_gauss, cached = numpy.random.get_state()
    states = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, key), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Go on where ``random_states`` was asked; a generator that is not in it, or not here, stays as it is."""
    if "python" in states:
        version = random.getstate()[0]
        gauss = states["python_gauss"].tolist()
        random.setstate((version, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    if "numpy" in states:
        *key, position, has_gauss = states["numpy"].tolist()
        cached = states["numpy_gauss"].item()
        numpy.random.set_state(("MT19937", numpy.array(key, dtype=numpy.uint32), position, has_gauss, cached))
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
