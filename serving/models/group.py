"""The processes that serve the same models, and make the same changes of them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from serving.models.changes import Caller


class Done(Protocol):
    """Says what has been changed."""

    def __call__(self, verb: str, config: str | None = None) -> None:
        """Takes the change, as `serving.workers.messages.Change` has it."""


class Group(Protocol):
    """All processes, as one of them sees them."""

    def changing(self, name: str, caller: Caller) -> AbstractContextManager[Done]:
        """Context in which no other process changes a model. At its end, all make the change that this one has made.

        Raises:
            Cancelled, DeadlineExceeded: its caller did not wait for its turn.
        """


class Alone:
    """The group of a server that is one process."""

    @contextmanager
    def changing(self, name: str, caller: Caller) -> Iterator[Done]:
        yield _ignore


def _ignore(verb: str, config: str | None = None) -> None:
    pass
