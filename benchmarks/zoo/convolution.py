"""Convolution networks in plain PyTorch."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.zoo.configuration import Architecture


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, unless it is the last of a block, an activation."""

    def __init__(
        self, inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None
    ) -> None:
        conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outer), act or nn.Identity())


class Residual(nn.Module):
    """Adds its input, brought to the right shape, to what its body makes of it."""

    def __init__(self, body: nn.Module, skip: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.skip, self.act = body, skip or nn.Identity(), act or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, height, width] to the same with the body's channels and size."""
        return self.act(self.body(x) + self.skip(x))


def _head(channels: int, classes: int = 1000) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def resnext(channels_last: bool = False) -> nn.Module:
    """Bottlenecks of 32 groups: the shape of ResNeXt-50 32x4d."""
    layers: list[nn.Module] = [ConvNorm(3, 64, 7, 2, act=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1)]
    inner = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width, outer = 128 << stage, 256 << stage
        for number in range(depth):
            stride = 2 if stage and not number else 1
            body = nn.Sequential(
                ConvNorm(inner, width, 1, act=nn.ReLU(inplace=True)),
                ConvNorm(width, width, 3, stride, groups=32, act=nn.ReLU(inplace=True)),
                ConvNorm(width, outer, 1),
            )
            skip = None if number else ConvNorm(inner, outer, 1, stride)
            layers.append(Residual(body, skip, nn.ReLU(inplace=True)))
            inner = outer
    model = nn.Sequential(*layers, *_head(inner))
    return model.to(memory_format=torch.channels_last) if channels_last else model


def mobilenet() -> nn.Module:
    """Inverted bottlenecks with depthwise convolutions: the shape of MobileNetV2."""
    layers: list[nn.Module] = [ConvNorm(3, 32, 3, 2, act=nn.ReLU6())]
    inner = 32
    for expand, outer, depth, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for number in range(depth):
            stride, wide = (first_stride if not number else 1), inner * expand
            body = nn.Sequential(
                ConvNorm(inner, wide, 1, act=nn.ReLU6()),
                ConvNorm(wide, wide, 3, stride, groups=wide, act=nn.ReLU6()),
                ConvNorm(wide, outer, 1),
            )
            layers.append(Residual(body) if stride == 1 and inner == outer else body)
            inner = outer
    return nn.Sequential(*layers, ConvNorm(inner, 1280, 1, act=nn.ReLU6()), *_head(1280))


class UNet(nn.Module):
    """Two convolutions a level, skips by concatenation, transposed convolutions on the way up."""

    def __init__(self, width: int = 48, levels: int = 5, classes: int = 21) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(self._pair(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[-2::-1])
        self.up = nn.ModuleList(self._pair(2 * w, w) for w in widths[-2::-1])
        self.out = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _pair(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(ConvNorm(inner, outer, 3, act=nn.ReLU()), ConvNorm(outer, outer, 3, act=nn.ReLU()))

    def forward(self, image: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] to logits [batch, classes, height, width]; the true classes are for the loss."""
        del classes
        skips: list[torch.Tensor] = []
        x = image
        for level, down in enumerate(self.down):
            x = down(functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat([skips.pop(), grow(x)], dim=1))
        return self.out(x)


def autoencoder() -> nn.Module:
    """Strided convolutions down, transposed ones up, as DCGAN's two halves."""
    widths = (3, 64, 128, 256, 512, 512)
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Conv2d(inner, outer, 4, 2, 1), nn.BatchNorm2d(outer), nn.LeakyReLU(0.2)]
    for inner, outer in zip(widths[:1:-1], widths[-2:0:-1], strict=False):
        layers += [nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(widths[1], 3, 4, 2, 1), nn.Tanh())


class TimedResidual(nn.Module):
    """A residual pair of convolutions with group norm, told the time by a vector."""

    def __init__(self, inner: int, outer: int, timing: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.time = nn.Linear(timing, outer)
        self.norm2, self.conv2 = nn.GroupNorm(32, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """[batch, inner, height, width] and [batch, timing] to [batch, outer, height, width]."""
        y = self.conv1(functional.silu(self.norm1(x)))
        y = y + self.time(functional.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(functional.silu(self.norm2(y))))


class PixelAttention(nn.Module):
    """Attention of every pixel to every pixel."""

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.GroupNorm(32, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, height, width] to the same."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        y = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(batch, channels, height, width))


class DiffusionUNet(nn.Module):
    """Predicts the noise in a picture, with attention below the highest resolution."""

    def __init__(self, channels: int = 4, width: int = 128, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.width, timing = width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, timing), nn.SiLU(), nn.Linear(timing, timing))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        inner, kept = width, [width]
        for level, outer in enumerate((width, 2 * width, 4 * width)):
            for _ in range(2):
                self.down.append(self._stage(inner, outer, timing, level > 0))
                inner = outer
                kept.append(inner)
            if level < 2:
                self.down.append(nn.Conv2d(inner, inner, 3, 2, 1))
                kept.append(inner)
        self.middle = self._stage(inner, inner, timing, True)
        for level, outer in enumerate((4 * width, 2 * width, width)):
            for number in range(3):
                self.up.append(self._stage(inner + kept.pop(), outer, timing, level < 2))
                inner = outer
                if number == 2 and level < 2:
                    self.up.append(nn.Conv2d(inner, inner, 3, padding=1))
        self.norm, self.last = nn.GroupNorm(32, inner), nn.Conv2d(inner, channels, 3, padding=1)

    @staticmethod
    def _stage(inner: int, outer: int, timing: int, attends: bool) -> nn.ModuleList:
        return nn.ModuleList([TimedResidual(inner, outer, timing), *([PixelAttention(outer)] if attends else [])])

    def _run(self, stage: Any, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        def run(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            x = stage[0](x, time)
            return stage[1](x) if len(stage) > 1 else x

        return checkpoint(run, x, time, use_reentrant=False) if self.checkpointed else run(x, time)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """[batch, channels, height, width] and times [batch] to the noise; the true one is for the loss."""
        del noise
        half = self.width // 2
        waves = torch.exp(-9.21 * torch.arange(half, device=time.device) / half) * time[:, None]
        timing = self.time(torch.cat([waves.sin(), waves.cos()], dim=-1).to(noisy.dtype))
        x = self.first(noisy)
        kept = [x]
        for stage in self.down:
            x = stage(x) if isinstance(stage, nn.Conv2d) else self._run(stage, x, timing)
            kept.append(x)
        x = self._run(self.middle, x, timing)
        for stage in self.up:
            if isinstance(stage, nn.Conv2d):
                x = stage(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
            else:
                x = self._run(stage, torch.cat([x, kept.pop()], dim=1), timing)
        return self.last(functional.silu(self.norm(x)))


def _pixel_classes(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(logits, batch["classes"])


def _first_class(logits: torch.Tensor, _: Any) -> torch.Tensor:
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def _same_picture(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return functional.mse_loss(outputs, batch)


def _noise_found(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return functional.mse_loss(outputs.float(), batch["noise"].float())


def _masks(batch: int, size: int) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(batch, 3, size, size), "classes": torch.randint(0, 21, (batch, size, size))}


def _noises(batch: int, size: int) -> dict[str, torch.Tensor]:
    shape = (batch, 4, size, size)
    return {"noisy": torch.randn(shape), "time": torch.randint(0, 1000, (batch,)), "noise": torch.randn(shape)}


def _channels_last(batch: int, size: int) -> torch.Tensor:
    return torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)


RESNEXT = Architecture("resnext")
MOBILENET = Architecture("mobilenet")
UNET = Architecture("unet")
AUTOENCODER = Architecture("autoencoder", held_out=True)
DIFFUSION = Architecture("diffusion-unet", held_out=True)

CONVOLUTION = (
    *RESNEXT.runs(
        "50", resnext, partial(torch.randn, 48, 3, 224, 224), "fp32/sgd-momentum amp-fp16/adamw", _first_class
    ),
    *RESNEXT.runs(
        "channels-last", partial(resnext, True), partial(_channels_last, 64, 224), "amp/sgd-momentum", _first_class
    ),
    *MOBILENET.runs(
        "v2", mobilenet, partial(torch.randn, 64, 3, 224, 224), "fp32/adamw amp/sgd-momentum", _first_class
    ),
    *UNET.runs("48", UNet, partial(_masks, 8, 256), "fp32/adamw amp/adamw bf16/adamw-forloop", _pixel_classes),
    *AUTOENCODER.runs(
        "64", autoencoder, partial(torch.randn, 64, 3, 128, 128), "fp32/adamw amp/adamw-forloop", _same_picture
    ),
    *DIFFUSION.runs("128", DiffusionUNet, partial(_noises, 16, 64), "fp32/adamw amp/adamw-fused/clip", _noise_found),
    *DIFFUSION.runs(
        "recomputed", partial(DiffusionUNet, checkpointed=True), partial(_noises, 32, 64), "bf16/adamw", _noise_found
    ),
)
