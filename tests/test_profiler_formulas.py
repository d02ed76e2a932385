"""FLOPs against counts made by hand, by loops over what meets what, and by PyTorch's counter where that is right."""

from itertools import combinations
from math import log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from profiler.elementwise import FORMULAS, FREE, PER_FIRST, PER_RESULT
from profiler.events import BACKWARD, FORWARD, Op
from profiler.formulas import flops_of
from profiler.products import PRODUCTS, attended_pairs, attention_of
from profiler.run import profile_model
from profiler.trace import trace_step
from tests.profiler_models import mean_square, next_token_loss, tokens

aten = torch.ops.aten


class Counted(TorchDispatchMode):
    """FLOPs of what runs inside; an operation without a formula fails."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flops = flops_of(func, args, kwargs or {}, out)
        assert flops is not None, func
        self.flops += flops
        return out


def counted(run) -> int:
    with Counted() as counter:
        run()
    return counter.flops


def forward_and_backward(layer, *inputs) -> tuple[int, int]:
    """FLOPs of a layer, and of the gradients of all inputs that can have one."""
    inputs = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs)
    found = []
    forward = counted(lambda: found.append(layer(*inputs)))
    out = found[0]
    gradient = torch.ones_like(out)
    return forward, counted(lambda: out.backward(gradient))


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.booleans(), st.booleans())
def test_convolution_and_its_backward_count_every_weight_at_every_position(groups, size, stride, transposed, deep):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(4, 8, size, stride=stride, padding=size // 2, groups=groups)
    x = torch.randn(2, 4, 8, 8)
    out = conv(x)
    positions = x if transposed else out
    expected = 2 * 2 * positions[0, 0].numel() * conv.weight.numel()
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), conv) if deep else conv
    trace = trace_step(model, x, lambda m, b: m(b).sum())
    module = "1" if deep else ""
    found = {
        phase: sum(
            e.flops
            for e in trace.events
            if isinstance(e, Op) and e.phase == phase and e.module == module and "convolution" in e.name
        )
        for phase in (FORWARD, BACKWARD)
    }
    # Without a layer below, the input's gradient is not asked for; the bias's is a sum.
    assert found == {FORWARD: expected, BACKWARD: expected * (2 if deep else 1) + out.numel()}


def test_every_multiplication_of_a_grouped_convolution_is_counted_as_a_loop_finds_it():
    x, weight = torch.randn(1, 4, 5), torch.randn(6, 2, 3)
    out = functional.conv1d(x, weight, groups=2)
    multiplications = sum(
        1
        for channel in range(6)
        for _ in range(out.shape[-1])
        for inner in range(4)
        for _ in range(3)
        if channel // 3 == inner // 2
    )
    assert counted(lambda: functional.conv1d(x, weight, groups=2)) == 2 * multiplications


@pytest.mark.parametrize(
    "product",
    [
        lambda t: torch.mm(t(3, 4), t(4, 5)),
        lambda t: torch.bmm(t(2, 3, 4), t(2, 4, 5)),
        lambda t: torch.baddbmm(t(2, 3, 5), t(2, 3, 4), t(2, 4, 5)),
        lambda t: functional.linear(t(3, 4), t(5, 4), t(5)),
        lambda t: torch.einsum("bij,bjk->bik", t(2, 3, 4), t(2, 4, 5)),
        lambda t: functional.conv2d(t(2, 3, 8, 8), t(6, 1, 3, 3), groups=3, padding=1),
        lambda t: functional.conv3d(t(1, 2, 4, 4, 4), t(3, 2, 2, 2, 2), stride=2),
        lambda t: functional.conv_transpose2d(t(1, 4, 4, 4), t(4, 2, 3, 3), stride=2),
    ],
)
def test_products_are_counted_as_by_pytorch(product):
    with FlopCounterMode(display=False) as reference:
        product(torch.randn)
    assert counted(lambda: product(torch.randn)) == reference.get_total_flops() > 0


@pytest.mark.parametrize(
    ("flops", "product"),
    [
        (2 * 2 * 3 * 4 * 5, lambda t: torch.addbmm(t(3, 5), t(2, 3, 4), t(2, 4, 5))),
        (2 * 3 * 4, lambda t: torch.mv(t(3, 4), t(4))),
        (2 * 3 * 4, lambda t: torch.addmv(t(3), t(3, 4), t(4))),
        (2 * 4, lambda t: torch.dot(t(4), t(4))),
        (2 * 3 * 4, lambda t: torch.addr(t(3, 4), t(3), t(4))),
        (4 * 2 * 3 * 4 * 5, lambda t: torch.mm(t(3, 4, dtype=torch.cfloat), t(4, 5, dtype=torch.cfloat))),
        (2 * 2 * 6 * 3 * 4, lambda t: functional.bilinear(t(2, 3), t(2, 4), t(6, 3, 4))),
    ],
)
def test_products_that_pytorch_does_not_count(flops, product):
    assert counted(lambda: product(torch.randn)) == flops


def test_grouped_products_count_each_row_column_or_inner_index_in_its_group():
    ends = torch.tensor([1, 4, 6], dtype=torch.int32)
    rows, columns, many = torch.zeros(6, 8), torch.zeros(8, 6), torch.zeros(3, 8, 4)
    for left, right, flops in (
        (rows, many, 2 * 6 * 8 * 4),
        (many.transpose(1, 2), columns, 2 * 4 * 8 * 6),
        (columns, rows, 2 * 8 * 6 * 8),
        (many.transpose(1, 2), many, 2 * 3 * 4 * 8 * 4),
    ):
        assert flops_of(aten._grouped_mm.default, (left, right), {"offs": ends}, torch.zeros(1)) == flops


@given(*[st.integers(1, 9)] * 2, st.integers(-5, 5), *[st.none() | st.integers(0, 6)] * 2)
def test_attended_pairs_are_those_that_a_loop_finds(queries, keys, shift, left, right):
    found = sum(
        (left is None or j >= i + shift - left) and (right is None or j <= i + shift + right)
        for i in range(queries)
        for j in range(keys)
    )
    assert attended_pairs(queries, keys, shift, left, right) == found


def test_attention_counts_scores_and_values_with_their_own_widths():
    query, key = (2, 4, 16, 8), (2, 2, 32, 8)
    assert attention_of(query, key, 8, causal=False).flops == 4 * 2 * 4 * 16 * 32 * 8
    causal = attention_of(query, key, 24, causal=True)
    mask = torch.ones(16, 32).tril()  # PyTorch's, from the top left
    assert causal.flops == 2 * 2 * 4 * int(mask.sum()) * (8 + 24)
    # Backward: scores again, gradients of queries and keys; gradients of the weights and of the values.
    assert causal.backward_flops == 2 * 2 * 4 * int(mask.sum()) * (3 * 8 + 2 * 24)


def sdpa_flops(query, key, value, **options) -> list[int]:
    model = nn.ParameterList((query, key, value))
    trace = trace_step(model, (), lambda m, _: functional.scaled_dot_product_attention(*m, **options).sum())
    return [e.flops for e in trace.events if isinstance(e, Op) and e.name.startswith("attention")]


def test_attention_without_causality_counts_as_by_pytorch_in_both_directions():
    q, k, v = torch.randn(2, 4, 16, 8), torch.randn(2, 4, 32, 8), torch.randn(2, 4, 32, 8)
    forward, backward = (
        flop_registry[getattr(aten, "_scaled_dot_product_flash_attention" + end)] for end in ("", "_backward")
    )
    expected = [forward(q, k, v, out_val=q), backward(q, q, k, v, out_val=(q, k, v))]
    assert sdpa_flops(q, k, v) == expected
    # A window is a mask, and a mask leaves full scores.
    window = torch.ones(16, 32, dtype=torch.bool).triu(-4).tril(0)
    assert sdpa_flops(q, k, v, attn_mask=window) == expected


def test_grouped_queries_cost_as_much_as_if_every_query_head_had_keys_of_its_own():
    q, k = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8)
    half = [t.to(torch.bfloat16) for t in (q, k, k)]
    wide = sdpa_flops(q, k.repeat_interleave(2, 1), k.repeat_interleave(2, 1), is_causal=True)
    assert sdpa_flops(*half, is_causal=True, enable_gqa=True) == wide


def test_sequences_of_different_lengths_count_their_own_pairs_only():
    heads, dim, lengths = 4, 8, (3, 5, 8)
    q = torch.randn(sum(lengths), heads, dim)
    offsets = torch.tensor([0, 3, 8, 16], dtype=torch.int32)
    args = (q, q, q, offsets, offsets, 8, 8, 0.0)
    full = flops_of(aten._flash_attention_forward.default, (*args, False, False), {}, (q,))
    assert full == 4 * heads * dim * sum(n * n for n in lengths)
    assert full == flop_registry[aten._flash_attention_forward](*args, False, False, out_val=(q,))
    causal = flops_of(aten._flash_attention_forward.default, (*args, True, False), {}, (q,))
    assert causal == 4 * heads * dim * sum(n * (n + 1) // 2 for n in lengths)
    window = {"window_size_left": 1, "window_size_right": 0}
    windowed = flops_of(aten._flash_attention_forward.default, (*args, False, False), window, (q,))
    assert windowed == 4 * heads * dim * sum(2 * n - 1 for n in lengths)
    backward = (q, q, q, q, q, q, offsets, offsets, 8, 8, 0.0, True, offsets, offsets)
    assert flops_of(aten._flash_attention_backward.default, backward, {}, (q,)) == causal * 5 // 2
    packed = (q[None], q[None], q[None], None, offsets, offsets, 8, 8, 0.0, 1)
    assert flops_of(aten._efficient_attention_forward.default, packed, {}, (q[None],)) == causal
    # Where the offsets hold no numbers, the sequences are taken to be equally long.
    unknown = (q, q, q, offsets[:3].to("meta"), offsets[:3].to("meta"), 8, 8, 0.0, False, False)
    assert flops_of(aten._flash_attention_forward.default, unknown, {}, (q,)) == 4 * heads * dim * 2 * 8 * 8


ROWS, WIDTH = 6, 8
N = ROWS * WIDTH


@pytest.mark.parametrize(
    ("forward", "backward", "layer"),
    [
        *(
            (N, N, f)
            for f in (
                functional.gelu,
                functional.silu,
                functional.relu,
                torch.tanh,
                torch.sigmoid,
                functional.mish,
                functional.hardswish,
                functional.elu,
            )
        ),
        *(
            (N, N, f)
            for f in (
                functional.softplus,
                functional.logsigmoid,
                functional.leaky_relu,
                functional.hardtanh,
                functional.hardsigmoid,
            )
        ),
        (N, 2 * N, torch.exp2),
        (N, N, lambda x: x.clone().mul_(3.0)),
        (4 * N, 4 * N, lambda x: x.softmax(-1)),
        (4 * N, 4 * N, lambda x: x.log_softmax(-1)),
        (7 * N, 13 * N, nn.LayerNorm(WIDTH)),
        (5 * N, 9 * N, nn.LayerNorm(WIDTH, elementwise_affine=False)),
        (7 * N, 13 * N, nn.BatchNorm1d(WIDTH, track_running_stats=False)),
        (7 * N, 13 * N, nn.GroupNorm(2, WIDTH)),
        (2 * N, 2 * N, lambda x: torch.native_dropout(x, 0.5, True)[0]),
        (N, 0, lambda x: x.sum(0)),
        (N, N, lambda x: x.cumsum(0)),
        (0, 0, lambda x: x.transpose(0, 1)[1:].contiguous()),
        (0, N // 2, lambda x: functional.max_pool1d(x, 2)),
        (0, 0, lambda x: x.sort(-1)[0]),
        (0, 0, lambda x: x.topk(2)[0]),
        (2 * N // 2, 2 * N, functional.glu),
    ],
)
def test_layers_number_by_number_cost_what_their_definitions_say(forward, backward, layer):
    found = forward_and_backward(lambda x: layer(x), torch.rand(ROWS, WIDTH) + 0.1)
    assert found == (forward, backward)


@pytest.mark.parametrize(
    ("forward", "backward", "layer"),
    [
        # 2 x 2 windows of four numbers, and the same number of shares in backward
        (4 * 64, 4 * 64, lambda x: functional.avg_pool2d(x, 2)),
        (256, 256, lambda x: functional.adaptive_avg_pool2d(x, 2)),
        (0, 64, lambda x: functional.max_pool2d(x, 2)),
        (0, 1024, lambda x: functional.interpolate(x, scale_factor=2)),
        (8 * 1024, 8 * 1024, lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear")),
        (32 * 1024, 32 * 1024, lambda x: functional.interpolate(x, scale_factor=2, mode="bicubic")),
        # halved, so twice as many numbers along each axis
        (
            2 * 16 * 64,
            2 * 16 * 64,
            lambda x: functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
        ),
        (0, 4 * 100, lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect")),
        (0, 4 * 4 * 49, lambda x: functional.unfold(x, 2)),
        # and the sums over the batch of the gradients of weight and bias
        (7 * 256, 13 * 256 + 2 * 2 * 2, nn.InstanceNorm2d(2, affine=True)),
    ],
)
def test_layers_of_images_cost_what_their_windows_say(forward, backward, layer):
    assert forward_and_backward(layer, torch.randn(2, 2, 8, 8)) == (forward, backward)


def test_a_fused_norm_of_root_mean_squares_has_no_mean_and_no_bias():
    x, weight = torch.randn(ROWS, WIDTH), torch.ones(WIDTH)
    for scale, flops in ((weight, 4 * N), (None, 3 * N)):
        assert flops_of(aten._fused_rms_norm.default, (x, [WIDTH], scale, 1e-6), {}, (x, x[:, :1])) == flops
    for scale, mask, flops in ((weight, [True, True], 9 * N), (None, [True, False], 6 * N)):
        args = (x, x, [WIDTH], x[:, :1], scale, mask)
        assert flops_of(aten._fused_rms_norm_backward.default, args, {}, (x, None)) == flops


def test_a_norm_with_given_statistics_only_scales_and_shifts():
    layer = nn.BatchNorm1d(WIDTH).eval()
    assert counted(lambda: layer(torch.randn(ROWS, WIDTH))) == 4 * N


def test_sampling_a_grid_counts_the_numbers_around_each_point():
    x, grid = torch.randn(2, 3, 4, 4, requires_grad=True), torch.rand(2, 5, 5, 2, requires_grad=True)
    samples = 2 * 3 * 5 * 5
    for mode, around in (("nearest", 0), ("bilinear", 4), ("bicubic", 16)):
        with Counted() as forward:
            out = functional.grid_sample(x, grid, mode=mode, align_corners=False)
        with Counted() as backward:
            torch.autograd.grad(out, (x, grid), torch.ones_like(out))
        # The input's gradient, and those of two coordinates.
        assert (forward.flops, backward.flops) == (2 * around * samples, 3 * 2 * around * samples)


@pytest.mark.parametrize(
    ("forward", "backward", "loss"),
    [
        (3 * N, 3 * N, functional.mse_loss),
        (4 * N, 3 * N, functional.smooth_l1_loss),
        (4 * N, 3 * N, functional.huber_loss),
        (8 * N, 5 * N, functional.binary_cross_entropy),
    ],
)
def test_losses_cost_so_many_an_element(forward, backward, loss):
    target = torch.rand(ROWS, WIDTH)
    assert forward_and_backward(lambda x: loss(x, target), torch.rand(ROWS, WIDTH)) == (forward, backward)


def test_a_cross_entropy_is_a_softmax_and_one_number_a_row():
    target = torch.zeros(ROWS, dtype=torch.int64)
    found = forward_and_backward(lambda x: functional.cross_entropy(x, target), torch.randn(ROWS, WIDTH))
    assert found == (4 * N + ROWS, 4 * N + ROWS)


def test_an_alignment_loss_counts_the_cells_of_its_lattice():
    steps, batch, symbols, length = 12, 2, 5, 3
    lattice = batch * steps * (2 * length + 1)
    targets = torch.ones(batch, length, dtype=torch.int64)
    scores = torch.randn(steps, batch, symbols).log_softmax(-1)
    args = (targets, (steps,) * batch, (length,) * batch)
    forward, backward = forward_and_backward(lambda x: functional.ctc_loss(x, *args, reduction="none"), scores)
    assert forward == 11 * lattice
    assert backward == 16 * lattice + 3 * scores.numel()


def test_embeddings_are_free_and_their_gradients_are_sums():
    table = torch.randn(10, 4)
    index = torch.tensor([[1, 2, 2], [0, 0, 0]])
    added = index.numel() * 4
    assert forward_and_backward(lambda w: functional.embedding(index, w), table) == (0, added)
    assert forward_and_backward(lambda w: functional.embedding_bag(index, w, mode="sum"), table) == (added, added)
    for choice in (lambda w: w[index], lambda w: w.index_select(0, index.flatten())):
        assert forward_and_backward(choice, table) == (0, added)
    assert forward_and_backward(lambda w: w.gather(0, index), table) == (0, index.numel())
    assert counted(lambda: torch.zeros(10, 4).index_put_((index[0],), table[:3], accumulate=False)) == 0


def test_a_fourier_transform_costs_five_n_log_n_and_half_of_it_for_real_numbers():
    x = torch.randn(3, 16)
    usual = 3 * 5 * 16 * log2(16)
    assert counted(lambda: torch.fft.fft(torch.complex(x, x))) == usual
    assert counted(lambda: torch.fft.rfft(x)) == usual / 2
    spectrum = torch.fft.rfft(x)
    assert counted(lambda: torch.fft.irfft(spectrum)) == usual / 2
    assert counted(lambda: torch.fft.rfft2(x)) == int(2.5 * 48 * log2(48))


def test_operations_on_lists_cost_the_sum_of_their_parts():
    many = [torch.randn(3), torch.randn(2, 2)]
    assert counted(lambda: torch._foreach_add(many, 1.0)) == 7
    assert counted(lambda: torch._foreach_mul_(many, many)) == 7
    assert counted(lambda: torch._foreach_addcdiv_(many, many, [t.abs() + 1 for t in many])) == 2 * 7 + 2 * 7
    assert counted(lambda: torch._foreach_norm(many)) == 2 * 7
    assert counted(lambda: torch._foreach_zero_(many)) == 0


def test_complex_numbers_count_as_the_real_ones_that_they_are_made_of():
    z = torch.randn(5, dtype=torch.cfloat)
    assert counted(lambda: z * z) == 6 * 5
    assert counted(lambda: z + z) == 2 * 5
    assert counted(z.sum) == 2 * 5


def test_integers_comparisons_and_choices_are_no_flops():
    x, i = torch.randn(4, 4), torch.arange(16).view(4, 4)
    for run in (
        lambda: i * 2 + i.cumsum(0) - i.sum(),
        lambda: (x > 0) | x.isnan(),
        lambda: torch.where(x > 0, x, 0.0),
        lambda: x.masked_fill(i > 3, 0.0).to(torch.bfloat16),
        lambda: (x.max(), x.argmax(0), x.amax(1), x.sort(), x.topk(2)),
        lambda: torch.rand_like(x).bernoulli_().fill_(1.0),
        lambda: torch.cat([x, x.roll(1, 0)]).tril().repeat(2, 1),
        lambda: functional.one_hot(i[0], 4),
    ):
        assert counted(run) == 0


def test_a_recurrent_cell_is_counted_as_its_closed_formula():
    steps, batch, inner, width = 5, 2, 8, 16
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        model = nn.Sequential(nn.Linear(inner, inner), kind(inner, width))
        trace = trace_step(model, torch.randn(steps, batch, inner), lambda m, x: m(x)[0].sum())
        ops = [e for e in trace.events if isinstance(e, Op) and e.module == "1"]
        products = {p: sum(e.flops for e in ops if e.shape and e.phase == p) for p in (FORWARD, BACKWARD)}
        cell = 2 * steps * batch * gates * width * (inner + width)
        assert products == {FORWARD: cell, BACKWARD: 2 * cell}


def test_a_formula_registered_with_pytorch_counts_for_an_operator_of_ones_own():
    library = torch.library.Library("memplan_formulas", "DEF")
    try:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        operator = torch.ops.memplan_formulas.twice.default
        x = torch.ones(3)
        assert flops_of(operator, (x,), {}, x) is None
        register_flop_formula(torch.ops.memplan_formulas.twice)(lambda shape, out_shape: 7 * shape[0])
        assert flops_of(operator, (x,), {}, x) == 21
    finally:
        flop_registry.pop(torch.ops.memplan_formulas.twice, None)
        library._destroy()


def test_an_operation_has_one_formula():
    for one, other in combinations((FREE, PER_RESULT, PER_FIRST, FORMULAS, PRODUCTS), 2):
        assert not set(one) & set(other)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(96, 16), nn.LSTM(16, 16, 2, batch_first=True), nn.Linear(16, 96)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.embed(batch))[0])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.Mish())
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.first(x)
        deep = functional.interpolate(self.down(wide), scale_factor=2, mode="bilinear")
        return self.last(torch.cat([wide + deep[:, :8], self.up(self.down(wide))], 1))


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 96}
KINDS = {
    "Gemma2ForCausalLM": {**TEXT, "num_key_value_heads": 1, "head_dim": 16},
    "MixtralForCausalLM": {**TEXT, "num_key_value_heads": 1, "num_local_experts": 2},
    "BertForMaskedLM": TEXT,
    "MambaForCausalLM": {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 96, "state_size": 4},
    "ViTForImageClassification": {**SMALL, "image_size": 32},
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_of_the_usual_architectures_goes_uncounted(kind):
    import transformers

    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**KINDS[kind]))
    text = {"input_ids": tokens(length=8), "labels": tokens(length=8)}
    images = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.int64)}
    profile = profile_model(model, images if "Image" in kind else text)
    assert not profile.uncounted_ops
    assert profile.uncounted_share == 0


def test_no_operation_of_plain_recurrent_and_convolution_networks_goes_uncounted():
    assert not profile_model(Recurrent(), tokens(length=4), loss=next_token_loss).uncounted_ops
    assert not profile_model(UNet(), torch.randn(2, 3, 16, 16), loss=mean_square).uncounted_ops
