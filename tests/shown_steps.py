"""Plans with their steps, made up for the tests of what is shown of them."""

from functools import cache

from memplan.activations import FIXED_MARGIN_BYTES
from memplan.explanation import Explanation, explanation_of
from memplan.search import plan
from offload.plan import Target
from tests.synthetic_profiles import RATES, machine_of, transformer

MARGIN = FIXED_MARGIN_BYTES["cuda"]


@cache
def shown_step(device: str = "cuda", gpus: int = 1, target: Target = Target.MEMPLAN) -> Explanation:
    """State on the GPU, on the host and on disk; several micro-batches. Other engines' buffers need a larger model."""
    if target is Target.MEMPLAN:
        profile = transformer(6, block_elements=200_000, batch_size=2)
        gpu_bytes = (MARGIN if device == "cuda" else 1 << 20) + (9_000_000 if gpus == 1 else 14_000_000)
        host_bytes = 9_000_000 + (2 * 4 * 200_064 if device == "cuda" else 0)  # a block on its way at the start
        machine = machine_of(gpu_bytes, host_bytes * gpus, 1 << 30, device=device, gpus=gpus)
    else:
        profile = transformer(6, block_elements=50_000_000, batch_size=2)
        machine = machine_of(2_500_000_000, 1 << 36, device=device, gpus=gpus)
    found = plan(profile, machine, RATES, batch_size=4 * gpus, target=target)
    return explanation_of(profile, machine, RATES, found)
