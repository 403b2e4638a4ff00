"""Promotes, pins and rolls back the versions of models, while they serve.

    load the version beside the serving one -> write `serving.json` -> swap

A version that does not load changes nothing. `convoy.promotion` defines what each change means.
"""

import errno
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from convoy.promotion import (
    Promotion,
    PromotionError,
    pin,
    promote,
    roll_back,
    unpin,
)
from serving.errors import Internal, InvalidArgument, LoadError, NotFound, Unavailable
from serving.models.changes import ANYONE, Caller, Changes
from serving.models.files import describe
from serving.models.slot import Standing
from serving.models.versions import ModelVersions

logger = logging.getLogger(__name__)

_NOT_PERMITTED = (errno.EROFS, errno.EACCES, errno.EPERM)
_ELSEWHERE = (
    "Use 'convoy models' with '--model-repository PATH' where it can be written: this server follows in poll mode, or "
    "when it is started again"
)

Choose = Callable[[Promotion | None, int, int | None, Collection[int]], Promotion]
"""Takes the choice until now, the version, the one that serves, and all versions. Returns the new choice."""

Choices = Callable[[Standing, int | None], list[tuple[int, Promotion]]]
"""Takes what there is to choose from, and the version that serves. Returns the possible choices, the best first."""


@dataclass(frozen=True, slots=True)
class Promotions:
    """The changes of which version serves. Each runs as `serving.models.changes` runs it, and its errors are the same.

    Args:
        find: returns a model by its name, or raises a ServingError.
        write: makes a choice durable, in the folder of a model.
        fetch: brings a version of a remote repository, and what takes the place of those that do not load; returns why
            it cannot.
    """

    changes: Changes
    find: Callable[[str], ModelVersions]
    write: Callable[[Path, Promotion], None]
    fetch: Callable[[str, int], str]

    def promote(self, name: str, version: int, caller: Caller = ANYONE) -> None:
        """Lets a version serve until a newer one is exported.

        Raises:
            InvalidArgument: another version is pinned, or the version policy does not allow this one.
            NotFound: there is no such model or version.
            Unavailable: the model's folder cannot be read.
            Internal: the version cannot be loaded, or the choice not be written; nothing has changed.
        """
        self._call(name, partial(_one, promote, version), caller, version)

    def pin(self, name: str, version: int, caller: Caller = ANYONE) -> None:
        """Lets a version serve until it is unpinned. Raises as `promote`."""
        self._call(name, partial(_one, pin, version), caller, version)

    def unpin(self, name: str, caller: Caller = ANYONE) -> None:
        """Lets versions take over again that are newer than the pinned one. Raises as `promote`."""
        self._call(name, lambda standing, serving: [(0, unpin(standing.promotion))], caller)

    def roll_back(self, name: str, version: int = 0, caller: Caller = ANYONE) -> None:
        """Lets the version serve that served before, or else the next that loads. Raises as `promote`.

        Args:
            version: the version to leave, so that a call that is repeated changes nothing; 0 for whichever serves.
        """
        self._call(name, partial(_all_before, version), caller)

    def follow(self, name: str) -> None:
        """Lets the version serve that another process has chosen."""

        def change() -> None:
            versions = self.find(name)
            versions.update(stable=True, override=versions.override)

        self.changes.call(name, change, ANYONE)

    def _call(
        self,
        name: str,
        choices: Choices,
        caller: Caller,
        version: int = 0,
    ) -> None:
        """Makes the first choice whose version loads. Version 0 is not loaded.

        Args:
            version: to fetch from a remote repository, besides those that its policy selects.
        """

        def change() -> None:
            if problem := self.fetch(name, version):
                raise Unavailable(problem)
            versions = self.find(name)
            ready = list(versions.ready())
            try:
                choice = self._prepare(versions, choices)
            except OSError as error:
                raise Unavailable(f"the folder of model '{name}' cannot be read: {describe(error)}") from error
            except (PromotionError, LoadError) as error:
                raise InvalidArgument(f"model '{name}': {error}") from error
            self._write(versions, choice, ready)
            versions.update(stable=True, override=versions.override)

        self.changes.call(name, change, caller)

    def _prepare(self, versions: ModelVersions, choices: Choices) -> Promotion:
        """Returns the first choice whose version loads; it then serves beside the others."""
        serving, ready = versions.view.default, list(versions.ready())
        failures: dict[int, str] = {}
        while True:
            standing = versions.read_standing()
            left = [choice for choice in choices(standing, serving) if choice[0] not in failures]
            if not left:
                versions.unload_prepared(ready)
                reasons = "; ".join(f"version {version}: {reason}" for version, reason in failures.items())
                raise Internal(f"nothing has changed for model '{versions.name}': {reasons}")
            version, promotion = left[0]
            _check(versions.name, version, standing)
            if not version or not (reason := versions.prepare(version)):
                return promotion
            failures[version] = reason
            self.fetch(versions.name, 0)

    def _write(self, versions: ModelVersions, choice: Promotion, ready: list[int]) -> None:
        try:
            self.write(versions.folder, choice)
        except OSError as error:
            versions.unload_prepared(ready)
            reason = f"the model repository cannot be written: {describe(error)}"
            if error.errno in _NOT_PERMITTED:
                reason += f". {_ELSEWHERE}"
            raise Internal(f"nothing has changed for model '{versions.name}': {reason}") from error


def _one(choose: Choose, version: int, standing: Standing, serving: int | None) -> list[tuple[int, Promotion]]:
    return [(version, choose(standing.promotion, version, serving, standing.present))]


def _all_before(version: int, standing: Standing, serving: int | None) -> list[tuple[int, Promotion]]:
    promotion = standing.promotion
    if version and version != serving:
        if promotion is not None and (promotion.rolled_back_from, promotion.version) == (version, serving):
            return [(0, promotion)]
        raise PromotionError(f"version {serving} serves, not {version}")
    before = standing.before(serving)
    if not before:
        raise PromotionError("there is no version to roll back to")
    return [(target, roll_back(promotion, target, serving, standing.present)) for target in before]


def _check(name: str, version: int, standing: Standing) -> None:
    if version and version not in standing.present:
        known = ", ".join(map(str, standing.present)) or "none"
        raise NotFound(f"model '{name}' has no version {version}: it has {known}")
    if version and standing.allowed is not None and version not in standing.allowed:
        allowed = ", ".join(map(str, standing.allowed))
        raise InvalidArgument(f"the version policy of model '{name}' allows only {allowed}, not version {version}")
