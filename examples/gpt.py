"""A small GPT on bytes, trained on the source text of Python's own standard library.

    memplan profile examples/gpt.py
    memplan train examples/gpt.py --steps 150

The model is a plain one; ``build_model``, ``example_batch`` and ``train_batches`` are all that memplan asks for.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

VOCABULARY = 256
LENGTH = 128
WIDTH = 256
HEADS = 4
LAYERS = 6
CORPUS_BYTES = 8_000_000


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Returns the loss of predicting each next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_model() -> nn.Module:
    return GPT()


def example_batch(batch_size: int) -> dict[str, torch.Tensor]:
    tokens = torch.zeros(batch_size, LENGTH, dtype=torch.long)
    return {"tokens": tokens, "targets": tokens}


def train_batches(batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    text = corpus()
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - LENGTH - 1, (batch_size,), generator=generator)
        windows = torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()]).long()
        yield {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def corpus() -> torch.Tensor:
    """The first megabytes of the standard library's source, as bytes."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= CORPUS_BYTES:
            break
    return torch.frombuffer(text, dtype=torch.uint8)
