"""A model from a Hugging Face config.json: transformers' own class, built from the configuration alone.

Nothing is downloaded, no weights are read here, and code that a configuration points to (``auto_map``) is never run.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from profiler.blame import explained
from profiler.contract import ModelSource, check_loss, default_loss
from profiler.errors import SourceError
from profiler.huggingface_batch import BatchMaker
from profiler.uncollected import uncollected

CONFIG_NAME = "config.json"

AUTO_CLASSES = (
    "ForMaskedLM ForSeq2SeqLM ForCausalLM ForImageTextToText ForSpeechSeq2Seq ForCTC ForImageClassification "
    "ForVideoClassification ForSemanticSegmentation ForAudioClassification ForPreTraining"
)
"""Transformers' AutoModel classes in the order in which they are asked, where a configuration names no class."""

NOT_A_MODEL = {
    "_class_name": "a diffusers configuration",
    "_diffusers_version": "a diffusers configuration",
    "peft_type": "an adapter's configuration (PEFT)",
    "tokenizer_class": "a tokenizer's configuration",
    "added_tokens": "a tokenizer",
    "image_processor_type": "an image processor's configuration",
    "feature_extractor_type": "a feature extractor's configuration",
    "processor_class": "a processor's configuration",
    "weight_map": "an index of weights",
    "zero_optimization": "a DeepSpeed configuration",
    "transformers_version": "a configuration without a model, such as generation_config.json",
}
"""What a JSON file without a model type is, by a key that tells, the surest first."""

ATTENTION = ("eager", "sdpa")
"""Attention that needs no further package."""

MODEL_FILE_LINES = """\
    from transformers import AutoConfig, AutoModel
    def build_model():
        config = AutoConfig.from_pretrained({folder!r}, trust_remote_code=True)
        return AutoModel.from_config(config, trust_remote_code=True)
    def example_batch(batch_size):
        return {{...: ...}}"""


class HuggingFaceSource(ModelSource):
    """A configuration and transformers' class for it."""

    def __init__(self, path: Path, config: Any, cls: type, assumptions: list[str], sequence_length: int | None) -> None:
        self.path = path
        self.name = path.parent.name if path.name == CONFIG_NAME else path.stem
        self._config, self._class = config, cls
        self._sequence_length = sequence_length
        self._assumptions = dict.fromkeys(assumptions)

    @classmethod
    def load(cls, path: Path, sequence_length: int | None = None, folder: Path | None = None) -> "HuggingFaceSource":
        """Read a configuration; raises SourceError if it is none of a model that transformers has.

        ``folder`` is its own where that was named, and its weights may be there.
        """
        data = _read(path)
        with uncollected():
            return cls._loaded(path, data, sequence_length, folder)

    @classmethod
    def _loaded(
        cls, path: Path, data: dict[str, Any], sequence_length: int | None, folder: Path | None
    ) -> "HuggingFaceSource":
        transformers = _transformers(path)  # with what it imports when it is asked for a class, most of the time here
        assumptions: list[str] = []
        config_class = _config_class(transformers, data, path)
        with explained(f"{path.name} is no configuration that transformers {transformers.__version__} accepts"):
            config = config_class.from_dict(_plain(data, assumptions))
            _for_training(config)
        model_class = _model_class(transformers, config, data.get("architectures"), assumptions)
        if not isinstance(config, model_class.config_class):
            parts = [c for c in _parts(config) if isinstance(c, model_class.config_class)]
            config = parts[0] if parts else config  # some classes take the configuration of a like model
        source = cls(path, config, model_class, assumptions, sequence_length)
        source.folder = folder
        return source

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The class, the batch and the loss, where the configuration leaves them open."""
        return (*self._assumptions, *self._batches.assumptions)

    @property
    def without_weights(self) -> str:
        """A configuration alone has none."""
        if self.folder is not None:
            return f"{self.folder} has no weights in safetensors files"
        return f"{self.path.name} has none; name its folder to start from safetensors files in it"

    def build(self) -> nn.Module:
        """The model with random weights, in the default dtype."""
        with explained(f"transformers can not build {self._class.__name__} from {self.path.name}"):
            model: nn.Module = self._class(self._config)
        return model

    def example_batch(self, batch_size: int) -> dict[str, Any]:
        """Random inputs, with labels where the class takes them, of the sizes in the configuration."""
        try:
            return self._batches.make(batch_size)
        except (RuntimeError, MemoryError) as error:  # its tensors are real, and must fit into this machine's memory
            reason = str(error).strip().rpartition("] ")[2] or type(error).__name__
            raise SourceError(
                f"a batch of {batch_size} samples for {self._class.__name__} can not be made here ({reason}); name "
                "fewer"
            ) from error

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Run the model on a batch; returns the loss."""
        try:
            return super().forward(model, batch)
        except SourceError as error:
            inputs = ", ".join(f"{k} {list(v.shape)}" for k, v in batch.items() if isinstance(v, torch.Tensor))
            sentence = (
                f"{error}; the batch that the configuration led to is {inputs}: correct the configuration, or write "
                "a model file with a batch that fits, see docs/model-file.md"
            )
            raise SourceError(sentence, error.traceback) from error

    def loss(self, outputs: Any, _batch: Any) -> torch.Tensor:
        """The loss of the outputs; where the class has none, the mean of its first floating-point output."""
        if getattr(outputs, "loss", None) is not None:
            return default_loss(outputs, self.path.name)
        for tensor in tree_leaves(tuple(outputs.values()) if hasattr(outputs, "values") else outputs):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.requires_grad:
                self._assume(f"{self._class.__name__} gives no loss: the mean of its first output is trained")
                return check_loss(tensor.mean(), "the mean of the outputs is")
        return default_loss(outputs, self.path.name)

    @cached_property
    def _batches(self) -> BatchMaker:
        return BatchMaker(self._config, self._class, self._sequence_length)

    def _assume(self, sentence: str) -> None:
        self._assumptions[sentence] = None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path.name} is not JSON: {error}") from error
    if isinstance(data, dict) and ("model_type" in data or "architectures" in data):
        return data
    known = data if isinstance(data, dict) else {}
    kind = next((kind for key, kind in NOT_A_MODEL.items() if key in known), "some other JSON file")
    raise SourceError(
        f"{path.name} is {kind}: a transformers {CONFIG_NAME} with a model_type, or a .py file, is what can be profiled"
    )


def _transformers(path: Path) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise SourceError(
            f"a model is built from {path.name} by transformers, which is not installed: pip install transformers"
        ) from error
    return transformers


def _config_class(transformers: ModuleType, data: dict[str, Any], path: Path) -> Any:
    kind = data.get("model_type")
    known = transformers.CONFIG_MAPPING
    if kind in known:
        return known[kind]
    for name in _names(data.get("architectures")):
        found = getattr(getattr(transformers, name, None), "config_class", None)
        if kind is None and found is not None:
            return found
    what = f"its model_type {kind!r}" if kind is not None else f"its architectures {data.get('architectures')}"
    if "auto_map" in data:
        raise SourceError(
            f"{path.name}: transformers {transformers.__version__} does not have {what}, and the code that the "
            f"configuration points to is not run; if you trust it, write a model file:\n"
            + MODEL_FILE_LINES.format(folder=str(path.parent))
        )
    raise SourceError(
        f"{path.name}: transformers {transformers.__version__} does not have {what}; correct it, or if it is newer: "
        "pip install --upgrade transformers"
    )


def _plain(data: dict[str, Any], assumptions: list[str]) -> dict[str, Any]:
    """The configuration without what needs further packages."""
    data = dict(data)
    if data.pop("auto_map", None):
        assumptions.append("the configuration points to code of its own, which is not run: transformers' own class is")
    if data.pop("quantization_config", None):
        assumptions.append("the configuration's quantization is left out: the weights are those of the precision")
    further = [k for k in ("attn_implementation", "_attn_implementation") if data.get(k) not in (None, *ATTENTION)]
    assumptions += [f"attention is PyTorch's own, not {data.pop(key)}" for key in further]
    return data


def _for_training(config: Any) -> None:
    for part in (config, *_parts(config)):
        if getattr(part, "use_cache", None):
            part.use_cache = False
        # Names of tokens that a tokenizer's files would give, and that some losses ask for.
        if getattr(part, "pad_token_id", None) is None:
            end = getattr(part, "eos_token_id", None)
            known = isinstance(end, int) and 0 <= end < (getattr(part, "vocab_size", None) or 0)
            part.pad_token_id = end if known else 0
        if getattr(part, "is_encoder_decoder", False) and getattr(part, "decoder_start_token_id", None) is None:
            part.decoder_start_token_id = part.pad_token_id


def _parts(config: Any) -> Iterator[Any]:
    """The configurations inside of a composite one."""
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield value
            yield from _parts(value)


def _model_class(transformers: ModuleType, config: Any, architectures: Any, assumptions: list[str]) -> Any:
    for name in _names(architectures):
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    found = _automatic(transformers, config)
    why = f"transformers has no {architectures[0]}" if _names(architectures) else "the configuration names no class"
    assumptions.append(f"{why}: {found.__name__} is taken")
    return found


def _names(architectures: Any) -> list[str]:
    return [n for n in architectures if isinstance(n, str)] if isinstance(architectures, list) else []


def _automatic(transformers: ModuleType, config: Any) -> Any:
    for suffix in (*AUTO_CLASSES.split(), ""):
        mapping = getattr(transformers, f"AutoModel{suffix}")._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    raise SourceError(f"transformers has no model for a {type(config).__name__}; name its class under architectures")
