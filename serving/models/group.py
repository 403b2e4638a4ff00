"""The processes that serve the same models, and make the same changes of them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from serving.models.changes import Caller


class Group(Protocol):
    """All processes, as one of them sees them."""

    def changing(self, verb: str, name: str, caller: Caller, config: str | None = None) -> AbstractContextManager[None]:
        """Context in which this process changes a model, and no other one. At its end, all others make the change.

        If the caller leaves a change that goes on, they make it after that.

        Args:
            verb: as `serving.workers.messages.Change` has it.
            name: of the model.
            config: with which to load it.

        Raises:
            Internal: one could not.
            Cancelled, DeadlineExceeded: the caller did not wait for its turn.
        """


class Alone:
    """The group of a server that is one process."""

    def changing(self, verb: str, name: str, caller: Caller, config: str | None = None) -> AbstractContextManager[None]:
        return nullcontext()
