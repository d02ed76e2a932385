"""The errors of the planner, each a sentence a person can act on."""


class MemplanError(ValueError):
    """A machine, a wish or a profile stops the planner."""


class MachineError(MemplanError):
    """The machine that was described contradicts itself or the one that is here."""


class PlanningError(MemplanError):
    """No plan can be made from this profile with these wishes."""


class NothingFits(PlanningError):  # noqa: N818 - it reads as the sentence it is
    """Every candidate needs more memory than the machine has.

    ``tier`` (gpu, host or nvme) is the one that is short of the least, ``short_bytes`` by how much, and ``changes`` are
    changes of which each would do, as command-line options, the smallest of one tier first.
    """

    def __init__(self, message: str, tier: str, short_bytes: int, changes: tuple[str, ...]) -> None:
        super().__init__(message)
        self.tier = tier
        self.short_bytes = short_bytes
        self.changes = changes


class ConfigError(MemplanError):
    """A configuration of another program can not be read; says where."""


class RunDirectoryError(MemplanError):
    """A run's directory holds what must not be lost, or lacks what is needed."""


class TrainingFailed(MemplanError):  # noqa: N818 - it says what happened
    """Training ended in an error of the person's own code; ``traceback`` holds that code's lines."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


class LaunchError(MemplanError):
    """The processes of a training were started in a way that can not work."""
