"""The errors of the profiler, each a sentence a person can act on."""


class ProfilerError(ValueError):
    """Something in the user's model file, batch or profile stops the profiler."""


class SourceError(ProfilerError):
    """The model file can not be used: it raises, has no model, no example batch, or they do not fit together.

    ``traceback`` holds the lines of the user's own code that led to it, most recent last, or is empty.
    """

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class ProfileError(ProfilerError):
    """A profile file can not be read."""
