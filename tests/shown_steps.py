"""Plans with their steps, made up for the tests of what is shown of them."""

from functools import cache

from memplan.explanation import Explanation, explanation_of
from memplan.search import plan
from tests.synthetic_profiles import RATES, machine_of, transformer

MARGIN = 64 << 20


@cache
def shown_step(device: str = "cuda", gpus: int = 1) -> Explanation:
    """State on the GPU, on the host and on disk; several micro-batches."""
    profile = transformer(6, block_elements=200_000, batch_size=2)
    margin = MARGIN if device == "cuda" else 1 << 20
    machine = machine_of(
        margin + 9_000_000 + 5_000_000 * (gpus - 1), 9_000_000 * gpus, 1 << 30, device=device, gpus=gpus
    )
    found = plan(profile, machine, RATES, batch_size=4 * gpus)
    return explanation_of(profile, machine, RATES, found)
