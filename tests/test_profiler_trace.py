"""The fake step against real ones, and what it leaves behind."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from profiler.errors import ProfilerError
from profiler.events import BACKWARD, FORWARD, LOSS, OF_CUDA, SETUP, Alloc, Category, Free, Op
from profiler.formulas import MATMULS
from profiler.layers import repeated_blocks, saved_storages
from profiler.trace import Trace, trace_step
from tests.profiler_models import GPT, conv_net, llama, mean_square, mlp, next_token_loss, really_allocated, tokens

KIB = 1 << 10


def forward_with(loss):
    return lambda model, batch: loss(model(batch), batch)


def fake_allocated(trace: Trace) -> tuple[int, int]:
    """(bytes left, peak bytes) of the step itself."""
    sizes, held, peak = {}, 0, 0
    for e in trace.events:
        if isinstance(e, Alloc) and e.phase != SETUP and e.category not in OF_CUDA:
            sizes[e.id] = e.bytes
            held += e.bytes
        elif isinstance(e, Free):
            held -= sizes.pop(e.id, 0)
        peak = max(peak, held)
    return held, peak


PRODUCTS = {*MATMULS, "aten::convolution", "attention", "recurrent"}


def is_product(op: Op) -> bool:
    return op.name.removesuffix("_backward") in PRODUCTS


def product_flops(trace: Trace, phase: str, recompute: bool = False) -> int:
    """Of matrix products, convolutions, recurrent layers and attention."""
    return sum(
        e.flops or 0
        for e in trace.events
        if isinstance(e, Op)
        and is_product(e)
        and e.phase in ((FORWARD, LOSS) if phase == FORWARD else (phase,))
        and e.recompute == recompute
    )


def state_of(model: nn.Module):
    return [
        (dict(m.__dict__), dict(m._parameters), dict(m._buffers), list(m._forward_hooks), list(m._forward_pre_hooks))
        for m in model.modules()
    ]


def same(a, b) -> bool:
    return all(
        x.keys() == y.keys() and all(x[k] is y[k] for k in x)
        for before, after in zip(a, b, strict=True)
        for x, y in zip(before[:3], after[:3], strict=True)
    ) and [x[3:] for x in a] == [y[3:] for y in b]


class EagerBlock(nn.Module):
    """Attention by hand, whose memory is the same on every device."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        x = self.norm(x)
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 8
        return x + torch.softmax(scores, -1) @ self.v(x)


REAL_CASES = {
    "mlp": (mlp, lambda: torch.randn(64, 100)),
    "attention": (lambda: nn.Sequential(EagerBlock(), EagerBlock()), lambda: torch.randn(4, 32, 64)),
    "frozen": (lambda: _frozen(mlp()), lambda: torch.randn(64, 100)),
    "tied": (lambda: _tied(), lambda: torch.randn(64, 100)),
}


def _frozen(model):
    model[2].requires_grad_(False)
    return model


def _tied():
    model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("case", REAL_CASES)
def test_fp32_step_leaves_exactly_and_peaks_within_a_scalar_of_what_the_real_allocator_hands_out(case, tmp_path):
    build, make = REAL_CASES[case]
    model, x = build(), make()

    def step():
        loss = mean_square(model(x), x)
        loss.backward()
        return loss

    real_left, real_peak = really_allocated(step, tmp_path)
    model.zero_grad(set_to_none=True)
    left, peak = fake_allocated(trace_step(model, x, forward_with(mean_square)))
    assert left == real_left
    # A kernel may hold a number of its own for a moment.
    assert real_peak - 64 <= peak <= real_peak


def test_gradients_take_the_bytes_of_the_trainable_parameters():
    model = _frozen(mlp())
    trace = trace_step(model, torch.randn(8, 100), forward_with(mean_square))
    gradients = sum(e.bytes for e in trace.events if isinstance(e, Alloc) and e.category is Category.GRADIENT)
    assert gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert [p.name for p in trace.parameters if not p.has_gradient] == ["2.weight", "2.bias"]


def test_mlp_saves_the_inputs_of_its_layers():
    trace = trace_step(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(3, 8), lambda m, b: m(b).sum()
    )
    assert sorted(saved_storages(trace.events)) == [("0", 3 * 8 * 4), ("1", 3 * 16 * 4)]


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_exactly_as_it_was(fails):
    model = GPT().eval()
    model.blocks[0].cache = [torch.ones(3)]
    model.blocks[1].requires_grad_(False)
    before, numbers = state_of(model), [p.detach().clone() for p in model.parameters()]

    def forward(m, batch):
        m.blocks[0].cache.append(m.embed.weight)
        m.left_over = m(batch)
        if fails:
            raise RuntimeError("broken")
        return next_token_loss(m.left_over, batch)

    try:
        trace_step(model, tokens(), forward, "bf16", repeated_blocks(model), recompute=True)
    except RuntimeError:
        assert fails
    assert same(before, state_of(model))
    assert len(model.blocks[0].cache) == 1
    assert not model.training
    assert model.head.weight is model.embed.weight
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(numbers, model.parameters(), strict=True))
    real = model(tokens())
    assert real.isfinite().all()


def test_torch_behaves_as_before_after_a_trace():
    trace_step(GPT(dropout=0.1), tokens(), forward_with(next_token_loss), "amp")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.softmax(torch.ones(2, 2, dtype=torch.bfloat16), -1).dtype == torch.bfloat16
    q = torch.randn(1, 1, 4, 8)
    assert torch.nn.functional.scaled_dot_product_attention(q, q, q).isfinite().all()
    assert torch._C._get_mkldnn_enabled() == torch.backends.mkldnn.enabled


def test_random_numbers_go_on_as_if_there_had_been_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    trace_step(model, torch.ones(2, 4), forward_with(mean_square))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bf16_attention_keeps_no_score_matrix_whatever_the_dropout(dropout):
    model = nn.MultiheadAttention(64, 2, dropout=dropout, batch_first=True)
    length = 512
    trace = trace_step(model, torch.randn(1, length, 64), lambda m, x: m(x, x, x, need_weights=False)[0].sum(), "bf16")
    scores = 2 * length * length * 2
    assert max(e.bytes for e in trace.events if isinstance(e, Alloc) and e.category is Category.ACTIVATION) < scores
    row_sums = 2 * length * 4
    assert row_sums in [size for _, size in saved_storages(trace.events)]


def test_attention_counts_the_pairs_that_a_causal_mask_leaves_and_two_and_a_half_times_as_much_in_backward():
    q = torch.randn(2, 4, 32, 16)

    def forward(causal):
        def run(model, x):
            x = model(x)
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=causal).sum()

        return run

    model = nn.Linear(16, 16)
    linear = 2 * q.numel() * 16
    for causal, pairs in ((False, 32 * 32), (True, 32 * 33 // 2)):
        attention = 4 * 2 * 4 * pairs * 16
        trace = trace_step(model, q, forward(causal))
        assert product_flops(trace, FORWARD) == linear + attention
        assert product_flops(trace, BACKWARD) == linear + attention * 5 // 2


def test_grouped_query_attention_traces_in_every_precision():
    for precision in ("fp32", "amp", "bf16"):
        trace = trace_step(llama(), {"input_ids": tokens(), "labels": tokens()}, lambda m, b: m(**b).loss, precision)
        assert len([p for p in trace.parameters if p.has_gradient]) == len(trace.parameters)
        assert not trace.used_outside


def test_linear_layers_cost_two_flops_a_weight_a_row_and_twice_that_in_backward():
    model = mlp()
    weights = sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))
    trace = trace_step(model, torch.randn(7, 100), forward_with(mean_square))
    assert product_flops(trace, FORWARD) == 2 * 7 * weights
    # The first layer's input needs no gradient.
    assert product_flops(trace, BACKWARD) == 2 * product_flops(trace, FORWARD) - 2 * 7 * model[0].weight.numel()


def test_convolutions_count_groups_strides_and_transposition():
    first, grouped, transposed, head = (
        2 * 2 * n for n in (8 * 8 * 16 * 3 * 9, 4 * 4 * 32 * 4 * 9, 4 * 4 * 32 * 16 * 4, 16 * 10)
    )
    trace = trace_step(conv_net(), torch.randn(2, 3, 8, 8), forward_with(mean_square))
    total = first + grouped + transposed + head
    assert product_flops(trace, FORWARD) == total
    biases = 2 * (8 * 8 * 16 + 4 * 4 * 32 + 8 * 8 * 16)
    assert product_flops(trace, BACKWARD) == 2 * total - first + biases


def test_lstm_counts_its_matrix_products():
    model = nn.LSTM(8, 16, batch_first=True)
    trace = trace_step(model, torch.randn(2, 5, 8), lambda m, x: m(x)[0].sum())
    assert product_flops(trace, FORWARD) == 2 * 2 * 5 * 4 * 16 * (8 + 16)
    assert all(p.has_gradient for p in trace.parameters)


def test_recomputing_blocks_repeats_their_forward_and_saves_their_insides():
    model, batch = GPT(), tokens()
    blocks = repeated_blocks(model)
    plain = trace_step(model, batch, forward_with(next_token_loss), "fp32", blocks)
    again = trace_step(model, batch, forward_with(next_token_loss), "fp32", blocks, recompute=True)
    inside = sum(
        e.flops or 0
        for e in plain.events
        if isinstance(e, Op) and is_product(e) and e.phase == FORWARD and e.module.startswith("blocks.")
    )
    assert product_flops(plain, FORWARD) == product_flops(again, FORWARD)
    assert product_flops(plain, BACKWARD) == product_flops(again, BACKWARD)
    # The last product of a block is not needed again: recompute stops early.
    last = 3 * 2 * batch.numel() * 64 * 4 * 64
    assert product_flops(again, BACKWARD, recompute=True) == inside - last
    assert fake_allocated(again)[0] == fake_allocated(plain)[0]
    assert fake_allocated(again)[1] < fake_allocated(plain)[1]
    assert sum(n for m, n in saved_storages(again.events)) < sum(n for m, n in saved_storages(plain.events)) / 2


def test_a_model_that_checkpoints_itself_is_followed():
    class Checkpointed(GPT):
        def forward(self, batch):
            x = self.embed(batch)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x))

    trace = trace_step(Checkpointed(), tokens(), forward_with(next_token_loss))
    plain = trace_step(GPT(), tokens(), forward_with(next_token_loss))
    assert product_flops(trace, BACKWARD, recompute=True) > 0
    assert product_flops(trace, BACKWARD) == product_flops(plain, BACKWARD)


def test_backward_belongs_to_the_module_whose_forward_it_undoes():
    trace = trace_step(GPT(layers=2), tokens(), forward_with(next_token_loss))
    by_module = {
        phase: {e.module for e in trace.events if isinstance(e, Op) and is_product(e) and e.phase == phase}
        for phase in (FORWARD, BACKWARD)
    }
    assert by_module[FORWARD] == by_module[BACKWARD]
    assert {"blocks.0.up", "blocks.1.qkv", "head"} <= by_module[BACKWARD]


def test_values_and_masks_that_depend_on_data_are_assumed_and_named():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            if (y > 0).any().item():
                x = x[y.sum(-1) > 0]
            return self.layer(x)[: int(y.abs().sum().item())]

    trace = trace_step(nn.Sequential(Picky()), torch.randn(3, 4), forward_with(mean_square))
    assert len(trace.assumptions) == 3
    assert all(" 0 " in sentence for sentence in trace.assumptions)
    assert product_flops(trace, FORWARD) == 2 * 2 * 3 * 4 * 4


def test_parameters_read_by_other_modules_are_used_outside():
    class Borrower(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(10, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.embed(x)) @ self.embed.weight.t()

    trace = trace_step(Borrower(), torch.zeros(2, 3, dtype=torch.long), forward_with(mean_square))
    assert trace.used_outside == {"embed.weight"}
    tied = trace_step(GPT(), tokens(), forward_with(next_token_loss))
    assert not tied.used_outside


def test_autocast_follows_the_operator_lists_of_cuda():
    seen = {}

    def forward(model, x):
        y = model(x)
        seen["linear"] = y.dtype
        seen["softmax"] = torch.softmax(y, -1).dtype
        seen["log_softmax"] = torch.log_softmax(y, -1).dtype
        seen["layer_norm"] = torch.nn.functional.layer_norm(y, (4,)).dtype
        seen["sum"] = y.sum().dtype
        seen["pow"] = y.pow(2).dtype
        seen["exp"] = y.exp().dtype
        seen["gelu"] = torch.nn.functional.gelu(y).dtype
        seen["stack"] = torch.stack([y, y]).dtype
        seen["cross_entropy"] = torch.nn.functional.cross_entropy(y, torch.zeros(2, dtype=torch.long)).dtype
        return y.sum()

    trace_step(nn.Linear(4, 4), torch.randn(2, 4), forward, "amp")
    half = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert half == {"linear", "gelu", "stack"}


def test_bf16_casts_parameters_buffers_and_floating_inputs_only():
    def forward(model, batch):
        x, index = batch
        assert x.dtype == torch.bfloat16
        assert index.dtype == torch.int64
        return model(x).sum()

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    trace = trace_step(model, (torch.randn(2, 4), torch.zeros(2, dtype=torch.long)), forward, "bf16")
    assert {p.dtype for p in trace.parameters} == {"bfloat16"}
    assert trace.buffer_bytes == 2 * 4 * 2 + 8


def test_an_unknown_precision_and_a_lazy_module_are_refused_in_a_sentence():
    with pytest.raises(ProfilerError, match="precision is 'fp8'"):
        trace_step(mlp(), torch.ones(1, 100), forward_with(mean_square), "fp8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(4)
    with pytest.raises(ProfilerError, match="lazy module"):
        trace_step(lazy, torch.ones(1, 4), forward_with(mean_square))


def test_a_compiled_module_is_refused_and_sparse_buffers_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(ProfilerError, match=r"torch\.jit"):
        trace_step(nn.Sequential(scripted), torch.ones(1, 4), forward_with(mean_square))
    model = nn.Linear(4, 4)
    model.register_buffer("graph", torch.eye(4).to_sparse())
    with pytest.raises(ProfilerError, match="only dense ones"):
        trace_step(model, torch.ones(1, 4), forward_with(mean_square))
    assert model.graph.is_sparse
