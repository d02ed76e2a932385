"""Whole profiles: peaks by hand, layers, blocks, activation points, optimizers, JSON."""

import pytest
import torch
from torch import nn

from profiler import ModelProfile, ProfilerError, SourceError, profile_model
from profiler.layers import repeated_blocks
from tests.profiler_models import GPT, VOCABULARY, conv_net, llama, mean_square, mlp, next_token_loss, tokens

KIB = 1 << 10
WORKSPACES = 2 * 32 * KIB * KIB
STATE_COPIES = {"adamw": 2, "adamw-fused": 2, "sgd": 0, "sgd-momentum": 1}


@pytest.mark.parametrize("optimizer", STATE_COPIES)
def test_peaks_of_a_small_mlp_are_those_worked_out_by_hand(optimizer):
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.ReLU(), nn.Linear(512, 128, bias=False))
    profile = profile_model(model, torch.randn(64, 256), loss=lambda y, _: y.sum(), optimizer=optimizer)
    weights, batch, hidden, scalar = 768 * KIB, 64 * KIB, 128 * KIB, 512
    counters = 2 * scalar if optimizer == "adamw-fused" else 0
    base = weights * (1 + STATE_COPIES[optimizer]) + counters + batch + WORKSPACES
    # Forward: the last step's loss, the first layer's output and that of the ReLU.
    assert profile.peaks.forward_bytes == base + scalar + 2 * hidden
    # Backward: the loss and its gradient, both weights' gradients and that of the first layer's output.
    assert profile.peaks.backward_bytes == base + 2 * scalar + weights + hidden
    # Step: the loss, the gradients, and AdamW's copy of all parameters.
    assert profile.peaks.step_bytes == base + scalar + weights * (2 if optimizer == "adamw" else 1)
    assert profile.peaks.overall_bytes == max(
        profile.peaks.forward_bytes, profile.peaks.backward_bytes, profile.peaks.step_bytes
    )
    assert profile.peaks.reserved_bytes >= profile.peaks.overall_bytes
    # Of an engine: the end of backward, with the first weight's gradient about to be taken away.
    without_state = profile.activations[0]
    assert without_state.allocated_bytes == batch + WORKSPACES + 2 * scalar + hidden + 512 * KIB


def test_activation_points_cover_both_batches_with_and_without_recompute():
    profile = profile_model(GPT(width=128), tokens(4, 64), loss=next_token_loss)
    points = {(p.batch_size, p.recompute): p for p in profile.activations}
    assert list(points) == [(4, False), (4, True), (1, False), (1, True)]
    for batch in (1, 4):
        assert points[batch, True].allocated_bytes < points[batch, False].allocated_bytes
        assert points[batch, True].executed_flops > points[batch, False].executed_flops
    again = profile.layers[0].recompute_flops  # attention's scores
    assert points[4, False].executed_flops == profile.forward_flops + profile.backward_flops + again
    # Embedding and head share a weight: its two gradients are added, whatever the batch.
    addition = VOCABULARY * 128
    assert points[4, False].executed_flops == 4 * points[1, False].executed_flops - 3 * addition


def test_a_batch_that_can_not_be_cut_has_no_points_of_batch_one():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, scale):
            return (self.layer(x) * scale).sum()

    profile = profile_model(Indexed(), (torch.randn(8, 4), torch.ones(4)))
    assert [(p.batch_size, p.recompute) for p in profile.activations] == [(8, False)]
    assert profile.batch_size == 8


def test_a_batch_of_one_is_traced_once():
    profile = profile_model(mlp(), torch.randn(1, 100), loss=mean_square)
    assert [(p.batch_size, p.recompute) for p in profile.activations] == [(1, False)]


def test_layers_add_up_to_the_model():
    model = GPT()
    profile = profile_model(model, tokens(), loss=next_token_loss)
    layers = {layer.path: layer for layer in profile.layers}
    assert list(layers) == [path for path, _ in model.named_modules()]
    assert layers[""].parameters == sum(p.numel() for p in model.parameters()) == profile.parameter_elements
    assert layers[""].parameter_bytes == 4 * layers[""].parameters
    assert layers["head"].parameters == 0  # counted where it first appears
    for path, layer in layers.items():
        children = [c for p, c in layers.items() if p and p.rpartition(".")[0] == path and p != path]
        assert layer.parameters >= sum(c.parameters for c in children)
        assert layer.forward_flops >= sum(c.forward_flops for c in children)
        assert layer.backward_flops >= sum(c.backward_flops for c in children)
        assert layer.activation_bytes >= sum(c.activation_bytes for c in children)
    rows, width = 2 * 32, 64
    pairs = 32 * 33 // 2
    product = 2 * 2 * 4 * pairs * 16
    # Two norms of 7 an element, two residual additions, a gelu of four widths.
    pointwise = rows * width * (2 * 7 + 2 + 4)
    assert layers["blocks.1"].forward_flops == 2 * rows * 12 * width * width + 2 * product + pointwise
    # Two norms of 13 an element, two additions, the gelu, and the sums that are the gradients of nine widths of biases.
    pointwise = rows * width * (2 * 13 + 2 + 4 + 9)
    assert layers["blocks.1"].backward_flops == 4 * rows * 12 * width * width + 4 * product + pointwise
    assert layers["head"].forward_flops == 2 * rows * width * VOCABULARY
    assert layers[""].order == 0
    assert layers["blocks"].order is None
    assert layers["embed"].order < layers["blocks.0"].order < layers["blocks.1"].order < layers["head"].order


def test_tied_weights_are_one_parameter_with_an_alias():
    profile = profile_model(GPT(), tokens(), loss=next_token_loss)
    embedding = profile.parameters[0]
    assert (embedding.name, embedding.aliases) == ("embed.weight", ("head.weight",))
    assert not embedding.used_outside
    assert all(p.name != "head.weight" for p in profile.parameters)


def test_frozen_parameters_have_neither_gradient_nor_state():
    model = mlp()
    whole = profile_model(model, torch.randn(2, 100), loss=mean_square)
    model[2].requires_grad_(False)
    part = profile_model(model, torch.randn(2, 100), loss=mean_square)
    frozen = (200 * 300 * 4 + 511) // 512 * 512 + 300 * 4 // 512 * 512 + 512
    assert whole.peaks.step_bytes - part.peaks.step_bytes == 4 * frozen
    assert part.trainable_elements == whole.trainable_elements - 200 * 300 - 300


def test_a_module_that_runs_twice_counts_two_calls_and_twice_the_flops():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(self.layer(x))

    profile = profile_model(Twice(), torch.randn(2, 8), loss=mean_square)
    layer = profile.layers[1]
    assert layer.calls == 2
    assert layer.forward_flops == 2 * 2 * 2 * 8 * 8


def test_blocks_are_the_outermost_repeated_children_in_forward_order():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()) for _ in range(2)
            )
            self.single = nn.ModuleList([nn.Linear(8, 4)])

        def forward(self, x):
            for stage in reversed(self.stages):
                x = stage(x)
            return self.single[0](x)

    model = Backwards()
    assert repeated_blocks(model) == ("stages.0", "stages.1")
    profile = profile_model(model, torch.randn(2, 8), loss=mean_square)
    assert profile.blocks == ("stages.1", "stages.0")
    assert repeated_blocks(mlp()) == ()
    lists = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))
    assert repeated_blocks(lists) == ("0.0", "0.1", "1.0", "1.1")


def test_llama_profiles_with_its_layers_as_blocks_and_products_of_six_flops_a_weight_a_token():
    batch = tokens(2, 32)
    profile = profile_model(llama(), {"input_ids": batch, "labels": batch}, precision="bf16")
    assert profile.blocks == tuple(f"model.layers.{i}" for i in range(4))
    matrices = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 64 * VOCABULARY
    pairs = 32 * 33 // 2
    attention = (2 + 5) * 4 * (2 * 2 * 4 * pairs * 16)
    flops = {o.name: o.flops for o in profile.operations}
    products = flops["aten::mm"] + flops["attention"] + flops["attention_backward"]
    assert products == 6 * batch.numel() * matrices + attention
    assert products > 0.95 * profile.executed_flops
    assert {p.dtype for p in profile.parameters} == {"bfloat16"}
    assert not profile.uncounted_ops
    assert flops["aten::silu"] == 4 * batch.numel() * 128


@pytest.mark.parametrize("precision", ["fp32", "amp", "bf16"])
def test_conv_net_and_multihead_attention_profile_in_every_precision(precision):
    assert profile_model(conv_net(), torch.randn(2, 3, 8, 8), loss=mean_square, precision=precision).forward_flops
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True), 2, enable_nested_tensor=False
    )
    profile = profile_model(encoder, torch.randn(2, 16, 32), loss=mean_square, precision=precision)
    assert profile.blocks == ("layers.0", "layers.1")
    # The block around a parameter's module counts as one of its own.
    assert not any(p.used_outside for p in profile.parameters)


def test_a_profile_survives_json(tmp_path):
    profile = profile_model(GPT(), tokens(), loss=next_token_loss, name="gpt")
    profile.save(tmp_path / "profile.json")
    assert ModelProfile.load(tmp_path / "profile.json") == profile
    assert profile.model == "gpt"


def test_an_unknown_optimizer_is_refused_by_name():
    with pytest.raises(ProfilerError, match="optimizer is 'adam'; it must be one of adamw"):
        profile_model(mlp(), torch.randn(2, 100), optimizer="adam")


def test_a_forward_that_fails_is_explained_with_the_callers_own_line():
    with pytest.raises(SourceError, match="forward pass fails on the example batch: RuntimeError") as error:
        profile_model(mlp(), torch.randn(2, 99), loss=mean_square)
    assert "torch/nn" not in error.value.traceback


def test_a_backward_that_fails_is_explained():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no way back")

    with pytest.raises(SourceError, match="can not be traced: RuntimeError: no way back"):
        profile_model(mlp(), torch.randn(2, 100), loss=lambda y, _: Broken.apply(y).sum())


def test_points_that_can_not_be_traced_are_left_out_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))  # batch norm needs two rows
    profile = profile_model(model, torch.randn(8, 4), loss=mean_square)
    assert [p.batch_size for p in profile.activations] == [8, 2]
    assert any("batch size 1 is left out" in s and "more than 1 value" in s for s in profile.assumptions)


def test_a_key_value_cache_does_not_grow_when_blocks_are_recomputed():
    batch = tokens(1, 32)
    inputs = {"input_ids": batch, "labels": batch, "attention_mask": torch.ones_like(batch)}
    profile = profile_model(llama(), inputs, precision="bf16")
    assert [(p.recompute, p.checkpoints_on_host) for p in profile.activations] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    assert not profile.assumptions


def test_layers_dropped_at_random_are_all_kept():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                if torch.rand([]) < 0.9:
                    continue
                x = layer(x)
            return x

    model = Dropped()
    profile = profile_model(model, torch.randn(2, 8, requires_grad=True), loss=mean_square)
    assert profile.blocks == ("layers.0", "layers.1", "layers.2")
    assert all(layer.forward_flops == 2 * 2 * 8 * 8 for layer in profile.layers if layer.type == "Linear")
    assert ["nothing is dropped" in s for s in profile.assumptions] == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matrix_products_trace_and_count_in_any_dtype(dtype):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 16, 32, dtype=dtype))

        def forward(self, x, ends):
            return torch._grouped_mm(x, self.weight, offs=ends)

    batch = (torch.randn(8, 16, dtype=dtype), torch.tensor([2, 4, 6, 8], dtype=torch.int32))
    profile = profile_model(Experts(), batch, loss=mean_square, batch_size=8)
    # The loss squares and sums; in backward, where autograd divides, takes the power's derivative and multiplies.
    assert profile.forward_flops == 2 * 8 * 16 * 32 + 2 * 8 * 32
    assert profile.backward_flops == 2 * 8 * 16 * 32 + 4 * 8 * 32


def test_sparse_gradients_are_refused_in_a_sentence():
    with pytest.raises(ProfilerError, match="sparse_coo tensor; only dense ones"):
        profile_model(nn.Embedding(8, 4, sparse=True), torch.zeros(2, dtype=torch.long), loss=mean_square)
