"""The state of the repository for its readers: an immutable snapshot of all models."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from serving.errors import InvalidArgument, NotFound, Unavailable, quote
from serving.models.loader import Model
from serving.models.slot import IndexEntry, ModelView, Standing, to_utf8


@dataclass(frozen=True, slots=True)
class RepositorySnapshot:
    """The ready versions and the index.

    Args:
        serving: each ready version by (name, version), and that of requests which name none also by (name, "").
        index: sorted by name and number.
        unhealthy: the models with a version that is loaded, but hangs or is broken in all its instances; such a version
            is not ready.
        is_read: whether the repository has been read. Before, no model is known, and none unknown.
        standings: by model.
    """

    serving: Mapping[tuple[str, str], Model] = field(default_factory=dict)
    index: tuple[IndexEntry, ...] = ()
    unhealthy: frozenset[str] = frozenset()
    is_read: bool = False
    standings: Mapping[str, Standing] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        views: Mapping[str, ModelView],
        unreadable: str = "",
        missing: Mapping[str, Mapping[int, str]] = MappingProxyType({}),
        *,
        is_read: bool = True,
    ) -> "RepositorySnapshot":
        """Puts together the views of all models.

        Args:
            views: by name, sorted.
            unreadable: why the whole repository cannot be read; empty if it can.
            missing: why versions are not in its copy, by model; version 0 is for the files beside the versions.
            is_read: whether it has been read at least once.
        """
        serving = {}
        index: list[IndexEntry] = []
        unhealthy = {
            name for name, view in views.items() if not all(model.batcher.is_healthy for model in view.ready.values())
        }
        for name, view in views.items():
            if name in unhealthy:
                view = _without_unhealthy(view)
            entries = _with_missing(name, view.entries, missing.get(name, {}))
            index += [replace(entry, cause=unreadable, retry_at=None) for entry in entries] if unreadable else entries
            for version, model in sorted(view.ready.items()):
                serving[name, str(version)] = model
            if view.default is not None:
                serving[name, ""] = view.ready[view.default]
        standings = {name: view.standing for name, view in views.items()}
        return cls(serving, tuple(index), frozenset(unhealthy), is_read, standings)

    def find(self, name: str, version: str, *, is_closing: bool) -> Model:
        """Finds a version by another spelling of its number, such as "01", or explains why it is not in `serving`.

        Args:
            is_closing: whether the repository is being closed.

        Raises:
            NotFound: the model or version does not exist; or `version` is empty, and none is ready or loading.
            InvalidArgument: the version is not a number.
            Unavailable: the version is not ready, a version is loading, or the repository is being closed or has not
                been read yet.
        """
        entries = self._entries(name)
        if not version:
            if is_closing or name in self.unhealthy or any(entry.state == "LOADING" for entry in entries):
                raise Unavailable(f"model '{name}' is not ready: {_reason(entries)}")
            # Triton's words and status code.
            raise NotFound(f"model '{name}' has no available versions: {_reason(entries)}")
        if not (version.isascii() and version.isdecimal() and len(version) < 19):
            raise InvalidArgument(f"version {quote(version)} of model '{name}' is not a number")
        number = str(int(version))
        if model := self.serving.get((name, number)):
            return model
        matching = [entry for entry in entries if entry.version == number]
        if not matching:
            versions = join_names([entry.version for entry in entries])
            raise NotFound(f"model '{name}' has no version {number}: it has {versions}")
        raise Unavailable(f"version {number} of model '{name}' is not ready: {_reason(matching)}")

    def versions(self, name: str) -> list[str]:
        """Returns the ready versions of a model, lowest number first.

        Raises:
            NotFound: the model does not exist.
            Unavailable: the repository has not been read yet.
        """
        self._entries(name)
        return sorted((version for model, version in self.serving if model == name and version), key=int)

    def ready_models(self) -> list[Model]:
        """Returns all ready versions, sorted by name and number."""
        ready = [model for (_, version), model in self.serving.items() if version]
        return sorted(ready, key=lambda model: (model.spec.name, int(model.version)))

    def _entries(self, name: str) -> list[IndexEntry]:
        entries = [entry for entry in self.index if entry.name == name]
        if not entries and not self.is_read:
            raise Unavailable(f"model {quote(name)} is not ready: the server is starting")
        if not entries:
            known = join_names({entry.name for entry in self.index})
            raise NotFound(f"unknown model {quote(name)}: this server has {known}")
        return entries


def join_names(names: Collection[str]) -> str:
    """Returns the first names, sorted, for use in a message."""
    shortened = sorted(names)[:8]
    return ", ".join([*shortened, "…"] if len(names) > len(shortened) else shortened) or "none"


def _reason(entries: Collection[IndexEntry]) -> str:
    """The state of the version that is loading, or else the reason why the newest is not ready."""
    newest = max(entries, key=lambda entry: int(entry.version or 0))
    entry = next((entry for entry in entries if entry.state == "LOADING"), newest)
    return entry.reason or entry.state.lower()


def _with_missing(name: str, entries: Collection[IndexEntry], missing: Mapping[int, str]) -> list[IndexEntry]:
    """Returns the entries of a model, and of its versions that are not in the copy of a remote repository."""
    reasons = {str(version or ""): to_utf8(reason) for version, reason in missing.items()}
    known = [
        replace(entry, cause=reason)
        if not entry.cause and (reason := reasons.get(entry.version) or reasons.get(""))
        else entry
        for entry in entries
        if entry.version or not missing
    ]
    new = [
        IndexEntry(name, version, "UNAVAILABLE", reason)
        for version, reason in reasons.items()
        if (version or not known) and version not in {entry.version for entry in known}
    ]
    return sorted([*known, *new], key=lambda entry: int(entry.version or 0))


def _without_unhealthy(view: ModelView) -> ModelView:
    """Returns the view of a model in which versions that hang or are broken are not ready."""
    failures = {str(version): model.batcher.failure for version, model in view.ready.items()}
    entries = (_explain(entry, failures.get(entry.version, "")) for entry in view.entries)
    ready = {version: model for version, model in view.ready.items() if not failures[str(version)]}
    return replace(view, ready=ready, entries=tuple(entries))


def _explain(entry: IndexEntry, failure: str) -> IndexEntry:
    """Returns the entry of a version that is not ready for a failure; the same entry if that is empty."""
    if not failure:
        return entry
    cause = f"the model {to_utf8(failure)}"
    return replace(
        entry, state="UNAVAILABLE", cause=f"{cause}; loading it again: {entry.cause}" if entry.cause else cause
    )
