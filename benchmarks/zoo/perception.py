"""Vision and speech models of transformers."""

from functools import partial
from typing import Any

import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from benchmarks.zoo.configuration import Architecture, pictures
from benchmarks.zoo.language import build


def _segmented(batch: int, size: int) -> dict[str, torch.Tensor]:
    return {**pictures(batch, size), "labels": torch.randint(0, 150, (batch, size, size))}


def _spoken(batch: int, samples: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, samples), "labels": torch.randint(1, 32, (batch, 60))}


def _transcribed(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(batch, 80, 3000), "labels": torch.randint(0, 51865, (batch, length))}


def _captioned(batch: int) -> dict[str, Any]:
    ids = torch.randint(0, 49408, (batch, 77))
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 224, 224), "return_loss": True}


VIT = Architecture("vit")
BEIT = Architecture("beit", held_out=True)
DINOV2 = Architecture("dinov2")
SWIN = Architecture("swin")
SEGFORMER = Architecture("segformer")
RESNET = Architecture("resnet")
CONVNEXT = Architecture("convnext", held_out=True)
CLIP = Architecture("clip", held_out=True)
WAV2VEC2 = Architecture("wav2vec2")
WHISPER = Architecture("whisper", held_out=True)

_VIT = partial(build, ViTForImageClassification, ViTConfig, num_labels=1000)
_BEIT = partial(
    build,
    BeitForImageClassification,
    BeitConfig,
    num_labels=1000,
    use_relative_position_bias=True,
    use_mask_token=False,
    layer_scale_init_value=0.1,
    drop_path_rate=0.1,
)
_DINOV2 = partial(
    build,
    Dinov2ForImageClassification,
    Dinov2Config,
    hidden_size=384,
    num_attention_heads=6,
    image_size=224,
    patch_size=14,
    drop_path_rate=0.2,
    num_labels=1000,
)
_SWIN = partial(build, SwinForImageClassification, SwinConfig, num_labels=1000)
_RESNET = partial(build, ResNetForImageClassification, ResNetConfig, num_labels=1000)
_CONVNEXT = partial(build, ConvNextForImageClassification, ConvNextConfig, num_labels=1000, drop_path_rate=0.1)
_SEGFORMER = partial(build, SegformerForSemanticSegmentation, SegformerConfig, num_labels=150)
_WAV2VEC2 = partial(build, Wav2Vec2ForCTC, Wav2Vec2Config, layerdrop=0.1, ctc_zero_infinity=True)
_WHISPER = partial(
    build,
    WhisperForConditionalGeneration,
    WhisperConfig,
    d_model=512,
    encoder_layers=6,
    decoder_layers=6,
    encoder_attention_heads=8,
    decoder_attention_heads=8,
    encoder_ffn_dim=2048,
    decoder_ffn_dim=2048,
    dropout=0.1,
)

PERCEPTION = (
    *VIT.runs("base", _VIT, partial(pictures, 32, 224), "fp32/adamw amp/adamw/clip bf16/sgd-momentum"),
    *VIT.runs(
        "384", partial(_VIT, image_size=384, checkpointed=True), partial(pictures, 24, 384), "amp/adamw fp32/adamw"
    ),
    *BEIT.runs("base", _BEIT, partial(pictures, 24, 224), "fp32/adamw amp/adamw/clip"),
    *DINOV2.runs("small", _DINOV2, partial(pictures, 64, 224), "amp/adamw-fused fp32/adamw/clip"),
    *SWIN.runs("tiny", _SWIN, partial(pictures, 32, 224), "fp32/adamw amp/adamw/clip bf16/adamw-fused"),
    *SEGFORMER.runs("b0", _SEGFORMER, partial(_segmented, 8, 512), "fp32/adamw amp/adamw"),
    *RESNET.runs(
        "50", _RESNET, partial(pictures, 64, 224), "fp32/sgd-momentum amp/sgd-momentum bf16/adamw amp-fp16/sgd"
    ),
    *CONVNEXT.runs("tiny", _CONVNEXT, partial(pictures, 32, 224), "fp32/adamw amp/adamw/clip"),
    *CLIP.runs("base", partial(build, CLIPModel, CLIPConfig), partial(_captioned, 64), "fp32/adamw amp/adamw/clip"),
    *WAV2VEC2.runs("base", _WAV2VEC2, partial(_spoken, 4, 160000), "fp32/adamw amp/adamw/clip"),
    *WHISPER.runs("base", _WHISPER, partial(_transcribed, 8, 100), "fp32/adamw amp-fp16/adamw/clip"),
    *WHISPER.runs("recomputed", partial(_WHISPER, checkpointed=True), partial(_transcribed, 16, 100), "bf16/adamw"),
)
