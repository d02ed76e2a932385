"""Values of Python as JSON and back: what schedulers and optimizers keep is a little more than JSON knows."""

from collections import Counter
from typing import Any

import torch


def plain(value: Any) -> Any:
    """The value for JSON; dicts whose keys are not all strings (and Counters) as tagged pairs, tuples as such.

    Tensors with one element become numbers.
    """
    if isinstance(value, dict):
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: plain(item) for key, item in value.items()}
        kind = "Counter" if isinstance(value, Counter) else "dict"
        return {"__kind__": kind, "pairs": [[plain(key), plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__kind__": "tuple", "items": [plain(item) for item in value]}
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return [plain(item) for item in value] if isinstance(value, list) else value


def restored(value: Any) -> Any:
    """The inverse of ``plain``."""
    if isinstance(value, list):
        return [restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("__kind__")
    if kind == "tuple":
        return tuple(restored(item) for item in value["items"])
    if kind is None:
        return {key: restored(item) for key, item in value.items()}
    pairs = {restored(key): restored(item) for key, item in value["pairs"]}
    return Counter(pairs) if kind == "Counter" else pairs
