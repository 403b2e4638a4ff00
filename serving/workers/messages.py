"""What the supervisor and its workers tell each other."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from serving.config import ServeConfig

# Calls of a worker: its argument, and what it returns.
STATE = "state"  # State
FAILED = "failed"  # str: why the worker cannot start
BEGIN = "begin"  # str: a model; returns whether the worker may change it, after a moment if another one does
END = "end"  # (str, Change | None, bool): the model, the change for the others, and whether this worker has made it

# Calls of the supervisor.
METRICS = "metrics"  # returns the worker's metric families
CHANGE = "change"  # Change
MAY_BE_READY = "may be ready"  # bool: whether all workers are ready


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the models that all workers make.

    Args:
        verb: load, unload, or follow: which version serves has been chosen, and is written in the model's folder.
        config: of a model to load, as JSON, in place of its file.
    """

    verb: str
    model: str
    config: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A worker's state.

    Args:
        models: the versions of each model that are ready, the one first that requests get which name none.
    """

    is_ready: bool = False
    is_live: bool = True
    models: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The first message to a worker.

    Args:
        number: of the worker, from 1.
        changes: that the workers have made since the start.
        models: as of the `State` of the workers that serve already.
    """

    number: int
    config: ServeConfig
    changes: tuple[Change, ...] = ()
    models: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
