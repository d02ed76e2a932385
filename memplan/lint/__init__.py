"""The linter: what is wrong with a DeepSpeed configuration before it runs, and the same configuration as data."""

from memplan.lint.config import DsConfig, read_ds_config
from memplan.lint.finding import Finding
from memplan.lint.rules import lint_document
from memplan.lint.view import Facts

__all__ = ["DsConfig", "Facts", "Finding", "lint_document", "read_ds_config"]
