"""All rules, and the order in which their findings are read."""

from collections.abc import Callable, Iterable, Iterator

from memplan.lint import batch, offload, optimizers, pinned, precision, sections, unknown, values, zero
from memplan.lint.document import Document
from memplan.lint.finding import Finding
from memplan.lint.view import Facts, View

Rule = Callable[[View], Iterable[Finding]]


def _unknown(view: View) -> Iterator[Finding]:
    yield from unknown.duplicate_keys(view.document)
    yield from unknown.unknown_keys(view.document)


RULES: tuple[Rule, ...] = (
    _unknown,
    values.known_keys,
    values.filled_by_others,
    batch.batch_sizes,
    precision.precision,
    zero.stages,
    zero.quantized,
    zero.zenflow,
    offload.devices,
    offload.paths,
    offload.buffers,
    offload.requests,
    pinned.pinned_memory,
    optimizers.optimizer,
    optimizers.scheduler,
    sections.activation_checkpointing,
    sections.compilation,
    sections.parallelism,
    sections.data_efficiency,
    sections.the_rest,
)


def lint_document(document: Document, facts: Facts | None = None) -> tuple[Finding, ...]:
    """Everything that the rules find, by line; pure."""
    view = View(document, facts or Facts())
    found = {finding: None for rule in RULES for finding in rule(view)}
    return tuple(sorted(found, key=lambda finding: finding.line))


def errors_in(document: Document, facts: Facts) -> list[Finding]:
    """Of the findings those with which DeepSpeed does not run."""
    return [finding for finding in lint_document(document, facts) if finding.severity == "error"]
