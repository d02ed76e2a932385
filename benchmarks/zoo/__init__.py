"""Real training configurations, from transformers' own classes and from plain PyTorch; nothing is downloaded."""

from benchmarks.zoo.configuration import Configuration
from benchmarks.zoo.convolution import CONVOLUTION
from benchmarks.zoo.language import LANGUAGE
from benchmarks.zoo.perception import PERCEPTION
from benchmarks.zoo.plain import PLAIN

CONFIGURATIONS: tuple[Configuration, ...] = (*LANGUAGE, *PERCEPTION, *CONVOLUTION, *PLAIN)

__all__ = ["CONFIGURATIONS", "Configuration"]
