"""The errors of watching a run, each a sentence a person can act on."""


class RunError(ValueError):
    """A directory is not that of a run, or a file that every run has is missing from it or can not be read."""
