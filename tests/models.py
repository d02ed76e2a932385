"""Small models whose shapes provoke what streaming can get wrong."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

VOCABULARY = 61


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # No bias: a key's bias gets a gradient of pure rounding noise, which Adam blows up to full steps.
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.ln_1(x)).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    """A causal language model that returns its loss."""

    def __init__(self, layers: int = 4, width: int = 32, heads: int = 4, length: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.run(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class TiedGPT(GPT):
    """The head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.wte.weight


class FrozenGPT(GPT):
    """The embedding, one whole block and a part of another are not trained."""

    def __init__(self) -> None:
        super().__init__()
        for module in (self.wte, self.h[1], self.h[2].qkv, self.h[3].ln_1):
            module.requires_grad_(False)


class SkippingGPT(GPT):
    """A part gets no gradient in every third step, and one parameter never does."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(32, 32)
        self.h[1].never = nn.Parameter(torch.ones(7))
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss = super().forward(tokens)
        self.calls += 1
        if self.calls % 3:
            loss = loss + self.extra(self.wte(tokens)).square().mean()
        return loss


class LoopingGPT(GPT):
    """Every layer is called twice."""

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in (*self.h, *self.h):
            x = block(x)
        return self.head(self.ln_f(x))


def batches(count: int, batch_size: int = 4, length: int = 16, seed: int = 1) -> list[torch.Tensor]:
    """Token batches of shape (batch_size, length + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (batch_size, length + 1), generator=generator) for _ in range(count)]
