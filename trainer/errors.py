"""The trainer's errors, as one tree. The command line prints `str(error)` as one line and exits with `exit_code`.

    TrainerError
    ├── ConfigError        the request cannot be met: an unknown name, an impossible value, a folder of another run
    │   ├── UserCodeError  the user's own code failed; the only message of several lines
    │   └── MismatchError  the ranks started with different code, settings, data or kinds of hardware
    ├── DataError          a data set is missing, damaged or unreadable
    ├── CheckpointError    a run folder or a checkpoint cannot be read or written
    ├── DivergenceError    the loss is not finite
    ├── ExportError        a trained model cannot be published
    ├── DesyncError        the ranks' weights differ
    └── PeerError          another rank failed first, and reports why

`Interrupted`, after SIGTERM or Ctrl-C, is not an error and not part of the tree.

A message says what is wrong and what to do. An OSError about a file that reaches the top is one line, too; any other
exception is a defect, and is printed with its traceback.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

_MAX_LISTED = 20
"""Names that a message lists where none is close to the one that was given."""


class TrainerError(Exception):
    """Root of all errors that a user can meet and act upon."""

    exit_code: ClassVar[int] = 1


class ConfigError(TrainerError):
    """The request itself is wrong. Exit code 2: retrying without a change is pointless."""

    exit_code = 2


class UserCodeError(ConfigError):
    """Code of the user's own failed. Exit code 2; the message has the lines of that code."""


def no_run(path: Path) -> ConfigError:
    """Returns the error about a path that is no folder of a run."""
    what = "holds no run" if os.path.isdir(path) else "is a file" if os.path.exists(path) else "does not exist"
    return ConfigError(f"{path} {what}: a run's folder has a config.json, and is in runs/ by default")


class MismatchError(ConfigError):
    """The ranks were started with different settings. Exit code 2.

    Args:
        ranks: the ranks that differ from the majority; all ranks, if there is no majority.
    """

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class DataError(TrainerError):
    """A data set is missing, damaged or unreadable. Exit code 3."""

    exit_code = 3


class CheckpointError(TrainerError):
    """A run folder or a checkpoint cannot be read or written. Exit code 4."""

    exit_code = 4


class DivergenceError(TrainerError):
    """The loss is not finite any more. Exit code 5."""

    exit_code = 5


class ExportError(TrainerError):
    """A trained model cannot be published. Exit code 6; the run itself is complete."""

    exit_code = 6


class DesyncError(TrainerError):
    """The ranks' weights differ. Exit code 7.

    Args:
        ranks: the ranks that differ from the majority; all ranks, if there is no majority.
    """

    exit_code = 7

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class PeerError(TrainerError):
    """Raised because another rank failed first. Never printed: the user must see the first failure."""


class Interrupted(BaseException):
    """A signal asked the run to end. Exit code 128 + the signal's number, as in shells.

    Not an Exception, like KeyboardInterrupt: it may be raised anywhere, and no error handler may catch it.

    Args:
        cause: the signal's name, or another reason to end as if by that signal.
        outcome: the state that the command leaves, and how to continue it.
    """

    def __init__(self, cause: str, outcome: str, signal_number: int) -> None:
        super().__init__(f"{cause}: {outcome}")
        self.cause = cause
        self.signal_number = signal_number


def first_line(error: BaseException) -> str:
    """Returns the first line of another package's error; its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: BaseException) -> str:
    """Returns the whole text of another package's error in one line; its class if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def list_names(names: Sequence[str], most: int = 3) -> str:
    """Returns the first names as a part of a line: `a, b, c and 7 more`."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unknown_name(kind: str, name: str, known: Iterable[str], *, listed_by: str = "") -> ConfigError:
    """Returns the error for a name that does not exist, with the closest names that do.

    Args:
        listed_by: a command that lists all names, for kinds that have many.
    """
    names = list(known)
    by_lower = {known.lower(): known for known in names}

    def closest(cutoff: float) -> list[str]:
        return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=cutoff)]

    if close := closest(0.5):
        hint = f"did you mean {' or '.join(close)}?"
    elif len(names) > _MAX_LISTED:
        hint = f"{listed_by} lists all" if listed_by else f"of {len(names)}, the closest are {', '.join(closest(0.0))}"
    else:
        hint = f"there are {', '.join(names)}"
    return ConfigError(f"no {kind} {name!r}: {hint}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context for code that writes a file or a folder: turns a full disk into an error that a user can act upon.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {_reason(error)}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context for code that reads a file and interprets its content; keeps apart which of the two failed.

    Raises:
        CheckpointError: it cannot be read, or its content is damaged.
    """
    try:
        yield
    except (OSError, UnicodeEncodeError) as error:  # the latter: some libraries take no path that is not UTF-8
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileExistsError):  # of mkdir
        return "a file is there"
    return (error.strerror if isinstance(error, OSError) else "") or str(error)
