"""An example batch for a transformers model, from its configuration and the signature of its forward."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from profiler.errors import SourceError

LONGEST_DECODED, LONGEST_ENCODED = 2048, 512
"""Tokens of a sequence where nobody asks for a length and the configuration allows more."""
AUDIO_SAMPLES = 160_000
"""10 s at 16 kHz."""
CTC_LABELS = 32
IMAGE_SIZE, CHANNELS, FRAMES = 224, 3, 16

LENGTH_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "max_target_positions",
)
IMAGE_NAMES = ("image_size", "img_size", "input_size", "crop_size")
PER_SAMPLE = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
    "SpeechClassification",
    "ForMultipleChoice",
    "ForXVector",
    "ForSequenceClassificationHead",
)
"""Ends of the names of classes that take one label a sample."""
WITHOUT_LABELS = ("Detection", "Estimation", "MaskedImageModeling", "FrameClassification", "Segmentation", "Matching")
"""Parts of the names of classes whose labels no configuration tells; semantic segmentation is told apart before."""


class BatchMaker:
    """Makes batches; ``assumptions`` says what the configuration leaves open."""

    def __init__(self, config: Any, model_class: Any, sequence_length: int | None) -> None:
        self._config, self._class = config, model_class
        self._name: str = model_class.__name__
        self._asked = sequence_length
        self._parameters = inspect.signature(model_class.forward).parameters
        self._assumptions: dict[str, None] = {}
        main = getattr(model_class, "main_input_name", "input_ids")
        self._main: str = main[0] if isinstance(main, list | tuple) else main

    @property
    def assumptions(self) -> tuple[str, ...]:
        """One sentence each."""
        return tuple(self._assumptions)

    def make(self, batch_size: int) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        names = [self._main]
        names += [n for n, p in self._parameters.items() if p.default is p.empty and n in MAKERS]
        if self._main == "pixel_values" and self._name.endswith("ForConditionalGeneration"):
            names += [n for n in ("input_ids",) if n in self._parameters]
        if self._name.endswith("CTC") and self._main == "input_features":
            names += [n for n in ("attention_mask",) if n in self._parameters]
        if "return_loss" in self._parameters:
            names += [n for n in ("input_ids", "pixel_values", "input_features") if n in self._parameters]
        elif self._main == "input_ids" and {"pixel_values", "input_features"} & self._parameters.keys():
            self._assume("the batch is text alone, without images or audio")
        batch: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            if name not in MAKERS:
                raise SourceError(
                    f"no example batch is known for {self._name}, whose input is {name}: write a model file with "
                    f"build_model() and example_batch(batch_size), see docs/model-file.md"
                )
            batch[name] = MAKERS[name](self, batch_size)
        return batch | self._targets(batch, batch_size)

    def _targets(self, batch: dict[str, Any], batch_size: int) -> dict[str, Any]:
        """What leads to a loss, as far as the class takes it."""
        has = self._parameters
        if "return_loss" in has:
            return {"return_loss": True}
        if "start_positions" in has and "end_positions" in has:
            return {name: torch.zeros(batch_size, dtype=torch.long) for name in ("start_positions", "end_positions")}
        out: dict[str, Any] = {}
        if "labels" in has and (labels := self._labels(batch, batch_size)) is not None:
            out["labels"] = labels
        if "next_sentence_label" in has and out:
            out["next_sentence_label"] = torch.zeros(batch_size, dtype=torch.long)
        if not out and "decoder_input_ids" in has:
            out["decoder_input_ids"] = self._tokens(batch_size, self._decoded_length())
        return out

    def _labels(self, batch: dict[str, Any], batch_size: int) -> torch.Tensor | None:
        name, classes = self._name, self._classes()
        if name.endswith(PER_SAMPLE) or "ImageClassification" in name:
            return self._sample_labels(batch_size, classes)
        if name.endswith("SemanticSegmentation"):
            return torch.randint(0, classes, (batch_size, *batch["pixel_values"].shape[-2:]))
        if name.endswith("TokenClassification"):
            return torch.randint(0, classes, batch["input_ids"].shape[:2])
        if name.endswith("NextSentencePrediction"):
            return torch.zeros(batch_size, dtype=torch.long)
        if any(part in name for part in WITHOUT_LABELS):
            return None
        if name.endswith("CTC"):
            return self._tokens(batch_size, CTC_LABELS)
        if "input_ids" in batch and "decoder_input_ids" not in self._parameters:
            return batch["input_ids"]
        return self._tokens(batch_size, self._decoded_length())

    def _sample_labels(self, batch_size: int, classes: int) -> torch.Tensor:
        kind = getattr(self._config, "problem_type", None)
        if kind == "multi_label_classification":
            return torch.zeros(batch_size, classes)
        if kind == "regression" or (classes == 1 and kind is None):
            return torch.zeros(batch_size) if classes == 1 else torch.zeros(batch_size, classes)
        return torch.randint(0, classes, (batch_size,))

    def _classes(self) -> int:
        return int(getattr(self._config, "num_labels", None) or 2)

    def _text(self) -> Any:
        """The part of the configuration that speaks of text."""
        for name in ("text_config", "decoder", "text_encoder", "thinker_config", "llm_config", "language_config"):
            part = getattr(self._config, name, None)
            if hasattr(part, "to_dict"):
                return part
        return self._config

    def _vision(self) -> Any:
        for name in ("vision_config", "encoder", "backbone_config"):
            part = getattr(self._config, name, None)
            if hasattr(part, "to_dict") and _first(part, IMAGE_NAMES) is not None:
                return part
        return self._config

    def _tokens(self, batch_size: int, length: int) -> torch.Tensor:
        """Random token ids, none of a special meaning, the last the end of the sequence where there is one."""
        text = self._text()
        vocabulary = int(_first(text, ("vocab_size", "n_vocab", "n_tokens")) or 2)
        special = {
            value
            for part in (text, self._config)
            for name, value in vars(part).items()
            if name.endswith(("_token_id", "_token_index", "_id")) and isinstance(value, int)
        }
        plain = next((i for i in reversed(range(vocabulary)) if i not in special), 0)
        tokens = torch.randint(0, vocabulary, (batch_size, length))
        for value in special:
            tokens[tokens == value] = plain
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < vocabulary:
            tokens[:, -1] = end
        return tokens

    def _length(self) -> int:
        """Tokens of a sequence."""
        longest = _first(self._text(), LENGTH_NAMES)
        longest = longest if isinstance(longest, int) and longest > 0 else None
        if self._asked is not None:
            if longest is not None and self._asked > longest:
                self._assume(f"sequences of {self._asked} tokens are longer than the configuration's {longest}")
            return self._asked
        decodes = hasattr(self._class, "prepare_inputs_for_generation") and "decoder_input_ids" not in self._parameters
        limit = LONGEST_DECODED if decodes and not self._name.endswith("MaskedLM") else LONGEST_ENCODED
        # A model that names no maximum may go through its sequence step by step, which takes long to trace.
        length = min(longest or LONGEST_ENCODED, limit)
        self._assume(f"sequences have {length} tokens; --seq changes that")
        return length

    def _decoded_length(self) -> int:
        """Tokens of a decoder's sequence, whose configuration may allow fewer than the encoder's."""
        longest = getattr(self._text(), "max_target_positions", None)
        return longest if isinstance(longest, int) and self._asked is None else self._length()

    def _input_ids(self, batch_size: int) -> torch.Tensor:
        tokens = self._tokens(batch_size, self._length())
        if not self._name.endswith("MultipleChoice"):
            return tokens
        self._assume("every question has 2 choices")
        return tokens[:, None].expand(-1, 2, -1).contiguous()

    def _pixels(self, batch_size: int) -> torch.Tensor:
        vision = self._vision()
        size = _first(vision, IMAGE_NAMES)
        if isinstance(size, dict):
            size = (size.get("height", IMAGE_SIZE), size.get("width", IMAGE_SIZE))
        if size is None:
            self._assume(f"images have {IMAGE_SIZE} x {IMAGE_SIZE} pixels, of which the configuration says nothing")
        height, width = size if isinstance(size, list | tuple) else (size or IMAGE_SIZE,) * 2
        channels = _first(vision, ("num_channels", "in_channels", "in_chans")) or CHANNELS
        frames = getattr(vision, "num_frames", None)
        shape = (channels, height, width) if frames is None else (frames, channels, height, width)
        return torch.randn(batch_size, *shape)

    def _videos(self, batch_size: int) -> torch.Tensor:
        vision = self._vision()
        size = _first(vision, (*IMAGE_NAMES,)) or IMAGE_SIZE
        frames = _first(vision, ("num_frames", "frames_per_clip")) or FRAMES
        return torch.randn(batch_size, frames, getattr(vision, "num_channels", CHANNELS), size, size)

    def _waves(self, batch_size: int) -> torch.Tensor:
        bins, frames = getattr(self._config, "num_mel_bins", None), getattr(self._config, "max_length", None)
        if bins and frames:
            return torch.randn(batch_size, frames, bins)
        samples = self._asked or AUDIO_SAMPLES
        self._assume(f"audio has {samples} samples (10 s at 16 kHz are {AUDIO_SAMPLES}); --seq changes that")
        return torch.randn(batch_size, samples)

    def _features(self, batch_size: int) -> torch.Tensor:
        """Spectrograms, in the layout that the configuration's own names point to."""
        config = _first(self._config, ("audio_config", "encoder_config")) or self._config
        if bins := getattr(config, "spec_size", None):
            return torch.randn(batch_size, 1, 1001, getattr(config, "num_mel_bins", bins))
        if width := getattr(config, "feature_projection_input_dim", None):
            return torch.randn(batch_size, self._frames(), width)
        if width := getattr(config, "input_feat_per_channel", None):
            return torch.randn(batch_size, self._frames(), width * getattr(config, "input_channels", 1))
        bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
        if bins and positions:
            return torch.randn(batch_size, bins, 2 * positions)
        if bins:
            return torch.randn(batch_size, self._frames(), bins)
        raise SourceError(
            f"no example batch is known for {self._name}, whose configuration does not tell the shape of its input "
            "features: write a model file with build_model() and example_batch(batch_size), see docs/model-file.md"
        )

    def _whole(self, batch_size: int) -> torch.Tensor:
        return torch.ones(batch_size, self._frames(), dtype=torch.long)

    def _frames(self) -> int:
        frames = 1000
        self._assume(f"audio has {frames} frames of features (10 s)")
        return frames

    def _decoder_input_ids(self, batch_size: int) -> torch.Tensor:
        return self._tokens(batch_size, self._decoded_length())

    def _masked_patches(self, batch_size: int) -> torch.Tensor:
        vision = self._vision()
        size, patch = _first(vision, IMAGE_NAMES) or IMAGE_SIZE, getattr(vision, "patch_size", 16)
        patches = (size // patch) ** 2
        if frames := getattr(vision, "num_frames", None):
            patches *= frames // getattr(vision, "tubelet_size", 1)
        mask = torch.zeros(batch_size, patches, dtype=torch.bool)
        mask[:, : patches // 2] = True
        self._assume("half of the patches are masked")
        return mask

    def _assume(self, sentence: str) -> None:
        self._assumptions[sentence] = None


def _first(config: Any, names: Any) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


MAKERS: dict[str, Callable[[BatchMaker, int], torch.Tensor]] = {
    "input_ids": BatchMaker._input_ids,
    "decoder_input_ids": BatchMaker._decoder_input_ids,
    "pixel_values": BatchMaker._pixels,
    "pixel_values_videos": BatchMaker._videos,
    "input_values": BatchMaker._waves,
    "input_features": BatchMaker._features,
    "attention_mask": BatchMaker._whole,
    "bool_masked_pos": BatchMaker._masked_patches,
}
