"""DeepSpeed's memory against what was measured of it, and against sums done by hand."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memplan
from benchmarks.common import LLAMAS, llama_config
from memplan.engines.deepspeed_memory import OFFLOADING_PROCESS_BYTES, deepspeed_held
from memplan.engines.deepspeed_setup import DeepSpeedSetup, setup_of
from memplan.engines.deepspeed_traffic import deepspeed_traffic
from memplan.engines.held import FORWARD, PHASES, STEP, Held
from memplan.engines.pinned import PinnedCache, rounded
from memplan.errors import PlanningError
from memplan.rates import PLANNED
from offload.plan import Precision, Target, Tier
from profiler.profile import ModelProfile, ParameterProfile
from tests.deepspeed_plans import plan_of

GPU, HOST, NVME = Tier.GPU, Tier.HOST, Tier.NVME
PROCESS_BYTES = 1.8e9
"""Resident of a process that trains with everything on the GPU: libraries and the CUDA context's host side."""


def parameter(name: str, *shape: int, trainable: bool = True) -> ParameterProfile:
    return ParameterProfile(name, shape, "bfloat16", trainable)


def model(blocks: int, block: int = 4_000_000, embedding: int = 10_000_000) -> list[ParameterProfile]:
    names = [f"layers.{i}.weight" for i in range(blocks)]
    return [parameter("embed.weight", embedding), *(parameter(n, block) for n in names), parameter("norm.weight", 1000)]


def setup(stage: int, parameters: Tier = GPU, optimizer: Tier = GPU, **more) -> DeepSpeedSetup:
    return DeepSpeedSetup(
        stage, more.pop("gpus", 1), more.pop("nodes", 1), Precision.BF16, parameters, optimizer, **more
    )


@cache
def llama() -> ModelProfile:
    """3.21e9 parameters, 8 x 2048 tokens, as they were measured."""
    from transformers import LlamaForCausalLM

    config = llama_config(LLAMAS["3b"], tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa")
    with torch.device("meta"):
        network = LlamaForCausalLM(config).train()
    tokens = torch.zeros(8, 2048, dtype=torch.long)
    return memplan.profile(network, {"input_ids": tokens, "labels": tokens}, precision="bf16")


MEASURED = {
    # One H200, or two of one host; DeepSpeed 0.19.8 with the buckets that are its defaults.
    "stage 2, optimizer on the host": (setup(2, GPU, HOST), 35.7e9, 71.9e9),
    "stage 3, everything on the host": (setup(3, HOST, HOST), 31.6e9, 80.0e9),
    "stage 3 on two GPUs": (setup(3, HOST, HOST, gpus=2), 31.6e9, 87.1e9),
}


@pytest.mark.parametrize(("setup", "_", "measured"), MEASURED.values(), ids=MEASURED.keys())
def test_host_memory_is_within_two_percent_of_what_was_measured(setup, _, measured):
    held = deepspeed_held(llama().parameters, setup, 1)
    assert held.host_peak_bytes + PROCESS_BYTES * setup.gpus == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("setup", "measured", "_"), MEASURED.values(), ids=MEASURED.keys())
def test_gpu_memory_is_not_below_what_was_measured_and_close_on_one_gpu(setup, measured, _):
    """The peak is the loss, before the first gradient: what DeepSpeed holds then is what it holds in forward."""
    activations = next(a for a in llama().activations if a.recompute and a.batch_size == 8).allocated_bytes
    predicted = deepspeed_held(llama().parameters, setup, 1).gpu[FORWARD] + activations
    assert predicted >= 0.999 * measured
    assert predicted <= (1.03 if setup.gpus == 1 else 1.08) * measured


def test_unrounded_and_on_the_host_a_parameter_takes_what_the_table_says():
    """fp32 master, two moments, fp32 gradient, flat gradient, and in stage 3 the weight."""
    parameters = model(8)
    total = sum(p.elements for p in parameters)
    every = setup(3, HOST, HOST, pin_memory=False, persistence_elements=0)
    held = deepspeed_held(parameters, every, 1)
    # The buffer of the weights is page-locked whatever the configuration says.
    assert held.host[STEP] == 4 * total + 8 * total + 4 * total + 2 * total + rounded(2 * total)
    assert held.pinned_bytes == rounded(2 * total)
    held = deepspeed_held(parameters, setup(2, GPU, HOST, pin_memory=False), 1)
    assert held.host[STEP] == 4 * total + 8 * total + 4 * total + 2 * total + 2 * 10_000_000
    assert held.pinned_bytes == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_offloading_the_states_are_divided_as_the_stage_says(stage):
    parameters, gpus = model(16), 8
    total = sum(p.elements for p in parameters)
    held = deepspeed_held(parameters, setup(stage, gpus=gpus, reduce_elements=2, live_elements=0, gather_elements=2), 1)
    weights, state = 2 * total, 12 * total
    if stage == 3:
        weights = 2 * total // gpus + 2 * total // gpus  # the flat gradient buffer is there from the start
    if stage > 0:
        state //= gpus
    gathered = 2 * (2 * 10_000_000 + 2 + 2 * 10_000_000) if stage == 3 else 0
    assert held.gpu[FORWARD] == pytest.approx(weights + state + gathered, rel=1e-3)
    assert held.host[FORWARD] == held.host[STEP] == held.pinned_bytes == 0


def test_two_nodes_hold_what_one_holds_of_half_the_ranks():
    parameters = model(8)
    one = deepspeed_held(parameters, setup(3, HOST, HOST, gpus=8), 1)
    two = deepspeed_held(parameters, setup(3, HOST, HOST, gpus=8, nodes=2), 1)
    assert two.host[STEP] * 2 == one.host[STEP]
    assert two.gpu == one.gpu


def test_files_hold_sixteen_bytes_a_parameter_and_its_weight():
    parameters = model(4)
    large = sum(p.elements for p in parameters) - 1000
    held = deepspeed_held(parameters, setup(3, NVME, NVME), 1)
    assert held.nvme_bytes == 16 * (large + 1000) + 2 * large
    assert deepspeed_held(parameters, setup(3, HOST, HOST), 1).nvme_bytes == 0
    tied = [replace(parameters[0], aliases=("head.weight",)), *parameters[1:]]
    built = deepspeed_held(tied, setup(3, NVME, NVME, zero_init=True), 1)
    assert built.nvme_bytes == held.nvme_bytes + 2 * parameters[0].elements


def test_more_swap_buffers_take_more_host_memory_and_overlap_more():
    parameters = model(4)
    few, many = (setup(3, HOST, NVME, optimizer_buffer_count=n, sub_group_elements=4_000_000) for n in (4, 12))
    difference = deepspeed_held(parameters, many, 1).host[STEP] - deepspeed_held(parameters, few, 1).host[STEP]
    assert difference == 8 * 4 * 10_000_000
    assert (few.pipeline_read, few.pipeline_write) == (False, False)
    assert (many.pipeline_read, many.pipeline_write) == (True, True)


def test_a_model_built_before_deepspeed_starts_is_whole_on_every_rank():
    parameters = [replace(p, dtype="float32") for p in model(64)]
    total = sum(p.elements for p in parameters)
    small = {"gpus": 8, "reduce_elements": 2, "sub_group_elements": 1}
    whole = deepspeed_held(parameters, setup(3, HOST, HOST, **small), 1)
    parts = deepspeed_held(parameters, setup(3, HOST, HOST, **small, zero_init=True), 1)
    assert whole.host["attach"] == 8 * (4 * total + OFFLOADING_PROCESS_BYTES)
    assert whole.gpu["attach"] >= 2 * total
    assert parts.gpu["attach"] < 2 * total // 8
    assert parts.host["attach"] < whole.host["attach"]


def test_accumulated_gradients_wait_on_the_host_in_stage_2():
    parameters = model(4)
    once = deepspeed_held(parameters, setup(2, GPU, HOST), 1)
    often = deepspeed_held(parameters, setup(2, GPU, HOST), 2)
    assert often.host[STEP] - once.host[STEP] == sum(rounded(2 * p.elements) for p in parameters)


def test_a_second_copy_of_the_weights_is_held_within_a_node():
    parameters = model(64)
    total = sum(p.elements for p in parameters)
    flat = deepspeed_held(parameters, setup(3, gpus=32, nodes=4), 1)
    nodes = deepspeed_held(parameters, setup(3, gpus=32, nodes=4, hpz=8), 1)
    assert nodes.gpu[FORWARD] - flat.gpu[FORWARD] == 2 * total // 8


@pytest.mark.parametrize(
    ("stage", "parameters", "optimizer", "more"),
    [
        (2, HOST, HOST, {}),
        (2, GPU, NVME, {}),
        (0, GPU, HOST, {}),
        (2, GPU, HOST, {"gpu_update_share": 0.5}),
        (3, GPU, GPU, {"gpus": 8, "nodes": 3}),
    ],
)
def test_what_deepspeed_can_not_do_is_refused_in_a_sentence(stage, parameters, optimizer, more):
    with pytest.raises(PlanningError, match=r"ZeRO stage|divided evenly"):
        setup(stage, parameters, optimizer, **more)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[ParameterProfile], DeepSpeedSetup, int]:
    parameters = [
        parameter(f"p{i}", draw(st.integers(1, 3_000_000)), trainable=i == 0 or draw(st.booleans()))
        for i in range(draw(st.integers(1, 12)))
    ]
    placed = draw(st.sampled_from(list(Tier)))
    optimizer = draw(st.sampled_from([t for t in Tier if t.depth >= placed.depth]))
    least = 3 if placed is not GPU or optimizer is NVME else 1 if optimizer is HOST else 0
    stage = draw(st.integers(least, 3))
    found = DeepSpeedSetup(
        stage, draw(st.sampled_from([1, 2, 8])), 1, draw(st.sampled_from(PLANNED)), placed, optimizer,
        gpu_update_share=draw(st.floats(0, 1)) if stage == 3 and optimizer is HOST else 0.0,
        reduce_elements=draw(st.integers(2, 1 << 24)), live_elements=draw(st.integers(0, 1 << 24)),
        sub_group_elements=draw(st.integers(1, 1 << 24)), pin_memory=draw(st.booleans()),
        overlap_comm=draw(st.booleans()),
    )  # fmt: skip
    return parameters, found, draw(st.integers(1, 3))


def least_state_bytes(parameters: list[ParameterProfile], s: DeepSpeedSetup) -> int:
    """Moments, and weights, of one rank: nobody can hold less, wherever it is."""
    state = sum(p.elements for p in parameters if p.trainable) * 8 // (s.gpus if s.zero_stage else 1)
    return state + sum(p.elements for p in parameters) * s.precision.weight_bytes // (
        s.gpus if s.zero_stage == 3 else 1
    )


@given(cases())
def test_whatever_the_setup_no_byte_is_negative_and_the_states_are_somewhere(case):
    parameters, found, steps = case
    held = deepspeed_held(parameters, found, steps)
    assert isinstance(held, Held)
    assert tuple(held.gpu) == tuple(held.host) == PHASES
    assert min(*held.gpu.values(), *held.host.values(), held.pinned_bytes, held.nvme_bytes) >= 0
    assert held.pinned_bytes <= held.host[STEP]
    everywhere = held.gpu[STEP] + (held.host[STEP] + held.nvme_bytes) // found.gpus
    assert everywhere >= least_state_bytes(parameters, found)


@given(cases())
def test_accumulating_gradients_never_takes_less(case):
    parameters, found, _ = case
    once, often = (deepspeed_held(parameters, found, n) for n in (1, 2))
    assert all(often.gpu[phase] >= once.gpu[phase] and often.host[phase] >= once.host[phase] for phase in PHASES)


@given(st.lists(st.integers(1, 1 << 40), max_size=20))
def test_freed_page_locked_memory_is_kept_for_the_same_size(sizes):
    cache = PinnedCache()
    for size in sizes:
        cache.allocate(size)
    taken = cache.bytes
    assert sum(sizes) <= taken <= 2 * sum(sizes)
    for size in sizes:
        cache.free(size)
    for size in sizes:
        cache.allocate(size)
    assert cache.bytes == taken


def test_state_on_nvme_moves_thirty_two_bytes_a_parameter():
    traffic = deepspeed_traffic(setup(3, HOST, NVME), 1_000_000, 1_000_000, 1)
    assert traffic.nvme_read_bytes + traffic.nvme_write_bytes == 32_000_000
    assert traffic.cpu_update_elements == 1_000_000


def test_the_copies_of_a_step_add_up():
    n = 1_000_000
    stage_2 = deepspeed_traffic(setup(2, GPU, HOST), n, n, 1)
    assert (stage_2.d2h_backward_bytes, stage_2.h2d_backward_bytes, stage_2.h2d_step_bytes) == (4 * n, 0, 2 * n)
    twice = deepspeed_traffic(setup(2, GPU, HOST), n, n, 2)
    assert (twice.d2h_backward_bytes, twice.h2d_backward_bytes) == (8 * n, 2 * n)
    stage_3 = deepspeed_traffic(setup(3, HOST, HOST), n, n, 1)
    assert (stage_3.h2d_forward_bytes, stage_3.h2d_backward_bytes, stage_3.d2h_backward_bytes) == (2 * n, 4 * n, 6 * n)
    assert stage_3.h2d_step_bytes == stage_3.gather_bytes == stage_3.reduce_bytes == 0
    shared = deepspeed_traffic(setup(3, HOST, HOST, gpus=4, gpu_update_share=0.5), n, n, 1)
    assert (shared.cpu_update_elements, shared.d2h_step_bytes) == (n // 8, 2 * n // 8)
    assert (shared.gather_bytes, shared.reduce_bytes) == (3 * n, 3 * n // 2)
    resident = deepspeed_traffic(setup(0), n, n, 4)
    assert {name for name, count in vars(resident).items() if count} == {"gpu_update_elements"}
    assert resident.gpu_update_elements == n


def test_the_setup_of_a_plan_for_another_engine_is_raised_to_what_it_needs():
    found = setup_of(plan_of(HOST, NVME))
    assert (found.zero_stage, found.parameters, found.optimizer, found.zero_init) == (3, HOST, NVME, True)
    own = setup_of(plan_of(GPU, HOST, zero_stage=2, target=Target.DEEPSPEED))
    assert (own.zero_stage, own.zero_init, own.reduce_elements) == (2, False, 1 << 26)
