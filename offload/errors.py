"""The errors of the offload runtime, each a sentence a person can act on."""


class OffloadError(ValueError):
    """A plan, a model, a tier or a checkpoint stops the runtime."""


class PlanError(OffloadError):
    """A plan contradicts itself, can not be read, or was made for another model."""


class TierError(OffloadError):
    """A memory tier can not hold what the plan puts there: too small, missing, or not writable."""


class CorruptionError(OffloadError):
    """Bytes read back differ from the bytes that were written."""


class CheckpointError(OffloadError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another model."""


class WeightsError(OffloadError):
    """Files of weights are missing, damaged, or of another model."""


class RankLost(OffloadError):  # noqa: N818 - it says what happened
    """Another rank has ended, or keeps the others waiting: training can not go on."""


class DeviceMemoryError(OffloadError, MemoryError):
    """The device ran out of memory in a step. The engine can go on, with less at a time: the step begins anew."""
