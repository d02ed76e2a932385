"""Transformers, recurrent networks and others in plain PyTorch."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.zoo.configuration import Architecture, tokens


class Block(nn.Module):
    """A transformer's block with fused projections and, if asked, dropped paths."""

    def __init__(
        self, width: int, heads: int, dropout: float = 0.0, drop_path: float = 0.0, causal: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.drop_path, self.causal = heads, dropout, drop_path, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] to the same."""
        x = x + self._dropped(self._attend(self.norm1(x)))
        return x + self._dropped(self.down(functional.gelu(self.up(self.norm2(x)))))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(width, dim=2))
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.dropout(x, self.dropout, self.training)
        if not self.drop_path or not self.training:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_path)
        return x * (kept / (1 - self.drop_path))


class GPT(nn.Module):
    """A decoder with learnt positions whose head is its embedding."""

    def __init__(self, width: int, layers: int, vocabulary: int, length: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, width // 64, dropout=0.1) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, length] to logits [batch, length, vocabulary]."""
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x))


class DeiT(nn.Module):
    """A vision transformer whose paths are dropped more often the deeper they lie."""

    def __init__(self, width: int = 384, layers: int = 12, size: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.zeros(1, (size // 16) ** 2 + 1, width))
        rates = [rate.item() for rate in torch.linspace(0, 0.2, layers, device="cpu")]
        self.blocks = nn.Sequential(*(Block(width, width // 64, drop_path=r, causal=False) for r in rates))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[batch, 3, size, size] to logits [batch, 1000]."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


class LSTMLanguageModel(nn.Module):
    """Stacked LSTMs with dropout between an embedding and a head."""

    def __init__(self, width: int = 1024, layers: int = 3, vocabulary: int = 33278) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.lstm = nn.LSTM(width, width, layers, dropout=0.3, batch_first=True)
        self.dropout = nn.Dropout(0.3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, length] to logits [batch, length, vocabulary]."""
        x, _ = self.lstm(self.dropout(self.embed(ids)))
        return self.head(self.dropout(x))


class GRUTagger(nn.Module):
    """GRUs in both directions that name every element of a sequence."""

    def __init__(self, features: int = 80, width: int = 768, layers: int = 4, classes: int = 2000) -> None:
        super().__init__()
        self.gru = nn.GRU(features, width, layers, dropout=0.2, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, frames: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """[length, batch, features] to the loss of naming the classes [length, batch]."""
        x, _ = self.gru(frames)
        return functional.cross_entropy(self.head(x).flatten(0, 1), classes.flatten())


class MixerBlock(nn.Module):
    """Mixes over the patches, then over the channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_patches = nn.Sequential(nn.Linear(patches, width // 2), nn.GELU(), nn.Linear(width // 2, patches))
        self.over_channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, patches, width] to the same."""
        x = x + self.over_patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


class Mixer(nn.Module):
    """An MLP-Mixer."""

    def __init__(self, width: int = 768, layers: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.Sequential(*(MixerBlock(196, width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[batch, 3, 224, 224] to logits [batch, 1000]."""
        x = self.blocks(self.patches(image).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(dim=1))


class SetTransformer(nn.Module):
    """PyTorch's own encoder over a set, pooled by attention from learnt queries."""

    def __init__(self, features: int = 32, width: int = 512, layers: int = 6, queries: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.pool = nn.MultiheadAttention(width, 8, batch_first=True)
        self.head = nn.Linear(width * queries, 40)

    def forward(self, points: torch.Tensor, missing: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """[batch, points, features], which of them are missing, and classes [batch], to the loss."""
        x = self.encoder(self.first(points), src_key_padding_mask=missing)
        pooled, _ = self.pool(self.queries.expand(len(x), -1, -1), x, x, key_padding_mask=missing)
        return functional.cross_entropy(self.head(pooled.flatten(1)), target)


class Recommender(nn.Module):
    """Embedding tables and two small perceptrons, as DLRM: nearly all of it is parameters."""

    def __init__(self, tables: int = 16, rows: int = 200_000, width: int = 64, dense: int = 13) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(dense, 512), nn.ReLU(), nn.Linear(512, width), nn.ReLU())
        crossed = (tables + 1) * tables // 2 + width
        self.top = nn.Sequential(nn.Linear(crossed, 1024), nn.ReLU(), nn.Linear(1024, 1))

    def forward(self, dense: torch.Tensor, items: torch.Tensor, clicked: torch.Tensor) -> torch.Tensor:
        """Numbers [batch, dense], rows [tables, batch, bag] to a logit [batch]; ``clicked`` is for the loss."""
        del clicked
        x = self.bottom(dense)
        vectors = torch.stack([x, *(table(rows) for table, rows in zip(self.tables, items, strict=True))], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        i, j = torch.tril_indices(products.shape[1], products.shape[2], offset=-1, device=x.device)
        return self.top(torch.cat([x, products[:, i, j]], dim=1)).squeeze(1)


def _next_token(logits: torch.Tensor, ids: Any) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _smoothed_class(logits: torch.Tensor, _: Any) -> torch.Tensor:
    classes = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return functional.cross_entropy(logits, classes, label_smoothing=0.1)


def _clicked(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(logits, batch["clicked"].to(logits.dtype))


def _frames(length: int, batch: int) -> dict[str, torch.Tensor]:
    return {"frames": torch.randn(length, batch, 80), "classes": torch.randint(0, 2000, (length, batch))}


def _points(batch: int, points: int) -> dict[str, torch.Tensor]:
    missing = torch.zeros(batch, points, dtype=torch.bool)
    missing[:, points - points // 8 :] = True
    return {
        "points": torch.randn(batch, points, 32),
        "missing": missing,
        "target": torch.randint(0, 40, (batch,)),
    }


def _clicks(batch: int) -> dict[str, torch.Tensor]:
    return {
        "dense": torch.randn(batch, 13),
        "items": torch.randint(0, 200_000, (16, batch, 8)),
        "clicked": torch.randint(0, 2, (batch,)),
    }


NANOGPT = Architecture("plain-gpt")
DEIT = Architecture("deit")
LSTM = Architecture("lstm")
GRU = Architecture("gru", held_out=True)
MIXER = Architecture("mixer")
SET_TRANSFORMER = Architecture("set-transformer")
RECOMMENDER = Architecture("recommender")

_GPT = partial(GPT, 768, 12, 50304, 1024)

PLAIN = (
    *NANOGPT.runs(
        "124m", _GPT, partial(tokens, 6, 1024, 50304), "amp/adamw-fused/clip fp32/adamw-forloop", _next_token
    ),
    *NANOGPT.runs(
        "recomputed", partial(_GPT, checkpointed=True), partial(tokens, 12, 640, 50304), "bf16/adamw/clip", _next_token
    ),
    *DEIT.runs("small", DeiT, partial(torch.randn, 64, 3, 224, 224), "amp/adamw-fused bf16/adamw", _smoothed_class),
    *LSTM.runs(
        "3", LSTMLanguageModel, partial(tokens, 40, 128, 33278), "fp32/sgd/clip amp/adamw bf16/adamw", _next_token
    ),
    *GRU.runs("both-ways", GRUTagger, partial(_frames, 300, 32), "fp32/adamw/clip amp/adamw"),
    *MIXER.runs("base", Mixer, partial(torch.randn, 48, 3, 224, 224), "amp/adamw fp32/sgd", _smoothed_class),
    *SET_TRANSFORMER.runs("6", SetTransformer, partial(_points, 32, 500), "fp32/adamw amp/adamw/clip"),
    *RECOMMENDER.runs("200k", Recommender, partial(_clicks, 2048), "fp32/adamw fp32/sgd bf16/adafactor", _clicked),
)
