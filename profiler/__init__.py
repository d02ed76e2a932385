"""What a model costs: FLOPs and memory by layer, and the peak of a training step, without a GPU."""

from profiler.uncollected import uncollected

with uncollected():  # of the million objects of torch that stay: the search takes a fifth of the import
    from profiler.contract import ModelSource, call_model
    from profiler.errors import ProfileError, ProfilerError, SourceError
    from profiler.optimizers import OPTIMIZERS
    from profiler.profile import ActivationPoint, LayerProfile, ModelProfile, ParameterProfile, PhasePeaks
    from profiler.run import profile_model, profile_source
    from profiler.source import load_source
    from profiler.trace import PRECISIONS

__all__ = [
    "OPTIMIZERS",
    "PRECISIONS",
    "ActivationPoint",
    "LayerProfile",
    "ModelProfile",
    "ModelSource",
    "ParameterProfile",
    "PhasePeaks",
    "ProfileError",
    "ProfilerError",
    "SourceError",
    "call_model",
    "load_source",
    "profile_model",
    "profile_source",
]
