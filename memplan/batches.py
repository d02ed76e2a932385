"""Batches of a training: what they count as, and whether they are what the plan was made for."""

from typing import Any

from offload.plan import Plan
from profiler.trees import tensors_in


def token_count(batch: Any) -> int:
    """Tokens of a batch: the elements of its first tensor of integers, or else its samples."""
    tensors = tensors_in(batch)
    integers = [t for t in tensors if not t.is_floating_point() and t.dim() > 1]
    return integers[0].numel() if integers else len(tensors[0])


class LargerBatches:
    """Finds micro-batches with more in them than the plan was made for: its activations may not have room."""

    def __init__(self, plan: Plan) -> None:
        made_for = plan.prediction.made_for
        self._planned_elements = made_for.batch_elements if made_for is not None else 0
        self._largest_elements = self._planned_elements

    def warning(self, micro_batches: list[Any]) -> str | None:
        """A sentence, where one is larger than the plan's and than any before it."""
        largest = max((sum(t.numel() for t in tensors_in(batch)) for batch in micro_batches), default=0)
        if not self._planned_elements or largest <= self._largest_elements:
            return None
        self._largest_elements = largest
        return (
            f"a micro-batch has {largest:,} elements, and the plan was made for {self._planned_elements:,}: longer "
            "sequences or larger inputs need more memory than it has room for; profile a batch as large as they come, "
            "and plan again"
        )
