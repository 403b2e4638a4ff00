"""The class labels of a model: one line of a text file for each class."""

import logging
from collections import Counter
from pathlib import Path

from serving.errors import LoadError, TransientLoadError, quote
from serving.models.files import describe, read_text
from serving.models.spec import ModelSpec

logger = logging.getLogger(__name__)


def read_labels(folder: Path, spec: ModelSpec) -> dict[str, list[str]]:
    """Returns the labels of each output that has a label file, in the order of the classes. Warns of odd ones.

    Args:
        folder: the model's.

    Raises:
        TransientLoadError: a file cannot be read.
        LoadError: a file does not exist, or is no text.
    """
    labels = {output: _read_file(folder / filename) for output, filename in spec.label_files.items()}
    for output in spec.outputs:
        if output.name in labels:
            for warning in _warnings(labels[output.name], output.shape[-1] if output.shape else -1):
                logger.warning("%s: %s %s", spec.name, spec.label_files[output.name], warning)
    return labels


def _read_file(file: Path) -> list[str]:
    """Returns the lines without empty ones at the end. Only ends of lines divide them, so that no class moves."""
    try:
        text = read_text(file)
    except OSError as error:
        raise TransientLoadError(f"the labels in {file.name} cannot be read: {describe(error)}") from error
    except ValueError as error:
        raise LoadError(f"the labels in {file.name} cannot be read: {error}") from error
    if text is None:
        raise LoadError(f"the labels in {file.name} cannot be read: there is no such file")
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _warnings(labels: list[str], num_classes: int) -> list[str]:
    """Returns what is odd about the labels.

    Args:
        num_classes: -1 if it is not known.
    """
    warnings = []
    if num_classes not in (-1, len(labels)):
        warnings.append(f"has {len(labels)} labels, but there are {num_classes} classes")
    if repeated := [label for label, count in Counter(labels).items() if count > 1 and label]:
        warnings.append(f"has the label {quote(repeated[0])} more than once")
    if "" in labels:
        warnings.append(f"has no label for class {labels.index('')}")
    return warnings
