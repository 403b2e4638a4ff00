"""What can go wrong, as one tree. The command line prints `str(error)` as one line and leaves with `exit_code`.

    TrainerError
    ├── ConfigError      what was asked for cannot be done: unknown name, impossible value, folder of another run
    │   └── MismatchError  the ranks were not started with the same code, settings, data and kind of hardware
    ├── DataError        a data set is missing, damaged or unreadable
    ├── CheckpointError  a run folder or a checkpoint cannot be read or written
    ├── DivergenceError  the loss is no longer a number
    ├── ExportError      a trained model is not published: it failed its check, or the repository cannot be written
    ├── DesyncError      the ranks' weights are not the same any more
    └── PeerError        another rank failed, and that rank tells the user why

`Interrupted`, by SIGTERM or Ctrl-C, is no error, and stands beside it.

Messages say what was wrong and what to do. Anything else that reaches the top is a defect, and is shown with its
traceback.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class TrainerError(Exception):
    """Root of all errors that a user can meet and act upon."""

    exit_code: ClassVar[int] = 1


class ConfigError(TrainerError):
    """The request itself is wrong. Exit code 2: trying again without a change is pointless."""

    exit_code = 2


class MismatchError(ConfigError):
    """The ranks were not started with the same. Exit code 2.

    Args:
        ranks: those that are not like the most; all, if no value is that of more than half.
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
    """A trained model is not published. Exit code 6; the run itself is as good as it was."""

    exit_code = 6


class DesyncError(TrainerError):
    """The ranks' weights differ. Exit code 7.

    Args:
        ranks: those that are not like the most; all, if no more than half are alike.
    """

    exit_code = 7

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class PeerError(TrainerError):
    """This rank leaves because another one failed first. Said nowhere: the first failure is what the user must see."""


class Interrupted(BaseException):
    """A signal asked the run to end. Exit code 128 + the signal's number, as shells do; the message is for the user.

    No Exception, as KeyboardInterrupt is none: it may be raised anywhere, and nobody who handles errors may keep it.

    Args:
        cause: the signal's name, or what else asked for the end, as if by that signal.
        outcome: what became of the command, and how to go on.
    """

    def __init__(self, cause: str, outcome: str, signal_number: int) -> None:
        super().__init__(f"{cause}: {outcome}")
        self.cause = cause
        self.signal_number = signal_number


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that does not exist, with the nearest ones that do."""
    names = list(known)
    by_lower = {known.lower(): known for known in names}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    return ConfigError(f"no {kind} {name!r}: {hint}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file or a folder: a full disk is the user's to mend.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
