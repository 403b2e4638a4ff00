"""The model repository: all models of a folder, for any number of readers and one change at a time.

Readers see one immutable `_View`, which every change replaces in one assignment; they never wait for a change.
How the versions of one model come and go is in `serving.models.versions`, how one is loaded in `serving.models.loader`.
"""

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serving.config import ControlMode, ServeConfig
from serving.errors import (
    Internal,
    InvalidArgument,
    LoadError,
    NotFound,
    ServingError,
    StartupError,
    Unavailable,
    quote,
)
from serving.models.config import parse_json
from serving.models.devices import count_gpus
from serving.models.loader import LoadSettings, Model
from serving.models.scanner import check_name, check_repository, has_model, model_names
from serving.models.versions import IndexEntry, ModelVersions

__all__ = ["IndexEntry", "Model", "Repository"]

logger = logging.getLogger(__name__)

_CLOSE_PATIENCE_S = 3.0
_UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class _View:
    """What readers see. `serving` has every ready version by (name, version), and the newest by (name, "")."""

    serving: Mapping[tuple[str, str], Model] = field(default_factory=dict)
    index: tuple[IndexEntry, ...] = ()


class Repository:
    """The models of a folder.

    Args:
        mode: "none": what is there at the start; "poll": follow the folder; "explicit": what callers ask for.
        models: with mode "explicit", what is loaded at the start.
    """

    def __init__(
        self,
        path: Path,
        settings: LoadSettings,
        *,
        mode: ControlMode = "none",
        models: Collection[str] = (),
        poll_interval_s: float = 2.0,
    ) -> None:
        self.generation = 0
        """Grows with every change that readers may see."""
        self._path = path
        self._settings = settings
        self._mode = mode
        self._asked = models
        self._poll_interval_s = poll_interval_s
        self._changing = threading.Lock()
        self._models: dict[str, ModelVersions] = {}
        self._required: set[str] | None = None
        self._view = _View()
        self._was_ready = False
        self._listeners: list[Callable[[], None]] = []
        self._leaving = threading.Event()
        self._poller: threading.Thread | None = None

    @classmethod
    def from_config(cls, config: ServeConfig) -> "Repository":
        """As the command line says."""
        settings = LoadSettings(
            device=config.device, num_threads=config.num_threads, max_queue_size=config.max_queue_size
        )
        return cls(
            config.model_repository,
            settings,
            mode=config.model_control_mode,
            models=config.load_model,
            poll_interval_s=config.poll_interval_s,
        )

    # -- what is served ----------------------------------------------------------------------------------------------

    def get(self, name: str, version: str = "") -> Model:
        """A model that is ready; its newest version if none is named.

        Raises:
            NotFound: no such model or version; or none is named, and none is ready or on its way.
            InvalidArgument: the version is no number.
            Unavailable: the version is known and not ready, or one is being loaded, or the server is leaving.
        """
        return self._view.serving.get((name, version)) or self._find(name, version)

    def versions(self, name: str) -> list[str]:
        """The ready ones, oldest first.

        Raises:
            NotFound: no such model.
        """
        view = self._view
        if not any(entry.name == name for entry in view.index):
            raise _unknown(name, view)
        return sorted((version for model, version in view.serving if model == name and version), key=int)

    def ready_models(self) -> list[Model]:
        """Every ready version, by name and number."""
        ready = [model for (_, version), model in self._view.serving.items() if version]
        return sorted(ready, key=lambda model: (model.spec.name, int(model.version)))

    def is_ready(self) -> bool:
        """Whether every model that was there or asked for at the start, and is not taken away since, can be asked."""
        required, serving = self._required, self._view.serving
        return required is not None and all((name, "") in serving for name in required)

    def index(self, ready_only: bool) -> list[IndexEntry]:
        """How every version stands, by name and number."""
        return [entry for entry in self._view.index if not ready_only or entry.state == "READY"]

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have it called after every change, on the thread that makes the change; it must not load or unload."""
        self._listeners.append(listener)

    def _find(self, name: str, version: str) -> Model:
        """The slow way: for versions written in another way, and to say what is wrong."""
        view = self._view
        entries = [entry for entry in view.index if entry.name == name]
        if not entries:
            raise _unknown(name, view)
        if not version:
            if self._leaving.is_set() or any(entry.state == "LOADING" for entry in entries):
                raise Unavailable(f"model '{name}' is not ready: {_why(entries)}")
            raise NotFound(f"model '{name}' has no available versions: {_why(entries)}")  # Triton's words and code
        if not (version.isascii() and version.isdecimal() and len(version) < 19):
            raise InvalidArgument(f"version {quote(version)} of model '{name}' is no number")
        number = str(int(version))
        if model := view.serving.get((name, number)):
            return model
        standing = [entry for entry in entries if entry.version == number]
        if not standing:
            raise NotFound(
                f"model '{name}' has no version {number}: it has {_list([entry.version for entry in entries])}"
            )
        raise Unavailable(f"version {number} of model '{name}' is not ready: {_why(standing)}")

    # -- life --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """See whether serving can begin; opens no model.

        Raises:
            StartupError: the folder is missing, unreadable or empty, a model asked for is not in it, or there is none
                of the GPUs asked for.
        """
        if self._settings.device == "cuda" and not count_gpus():
            raise StartupError("--device cuda, but there is no CUDA device: use auto or cpu")
        check_repository(self._path)
        names = model_names(self._path)
        if not names and self._mode == "none":
            raise StartupError(f"no model in {self._path}: a model is a folder with folders named 1, 2, … in it")
        if not names and self._mode == "poll":
            logger.warning("no model in %s yet: ready all the same, with nothing to serve", self._path)
        for name in self._asked:
            if name not in names:
                raise StartupError(f"no model {quote(name)} in {self._path}, which has {_list(names)}")

    def start(self) -> None:
        """Load what was asked for, one after the other; then follow the folder if the mode is "poll".

        Blocks until all is loaded. A model that fails is logged and stands in the index; nothing is raised.
        """
        with self._changing:
            self._models = {name: self._versions_of(name) for name in model_names(self._path)}
            wanted = [name for name in self._models if self._mode != "explicit" or name in self._asked]
            for name in wanted:
                self._models[name].announce()
            self._publish()
            for name in wanted:
                if not self._leaving.is_set():
                    self._models[name].update(settled=True)
            self._required = set(wanted)
            self._publish()
        if self._mode == "poll" and not self._leaving.is_set():
            self._poller = threading.Thread(target=self._poll, name="repository", daemon=True)
            self._poller.start()

    def close(self) -> None:
        """Finish what every model was given, and free them. A version that is being loaded is not waited for long."""
        self._leaving.set()
        if not self._changing.acquire(timeout=_CLOSE_PATIENCE_S):
            logger.warning("leaving while a model is being loaded")
            return
        try:
            self._required = None
            for versions in self._models.values():
                versions.drop("the server is leaving")
        finally:
            self._changing.release()
        if self._poller is not None:
            self._poller.join()

    # -- changes -----------------------------------------------------------------------------------------------------

    def load(self, name: str, config: str | None = None) -> None:
        """Load a model, or bring it up to date with its folder. What serves goes on serving if that fails.

        Args:
            config: a ModelConfig as JSON, in place of the model's `config.pbtxt` until the next load.

        Raises:
            InvalidArgument: no name of a model, or no such JSON.
            NotFound: no such model.
            Unavailable: the mode does not allow it.
            Internal: a version that should be served is not as it lies in the folder; says why.
        """
        self._check_change(name)
        if config is not None:
            try:
                parse_json(config, name)
            except LoadError as error:
                raise InvalidArgument(str(error)) from error
        with self._changing:
            versions = self._known(name)
            versions.announce()
            versions.try_again()
            failures = versions.update(settled=True, override=config)
        if failures:
            raise Internal(f"failed to load '{name}', {'; '.join(failures)}")

    def unload(self, name: str) -> None:
        """Take all versions of a model out of service, when they have finished what they were given.

        Raises:
            InvalidArgument: no name of a model.
            NotFound: no such model.
            Unavailable: the mode does not allow it.
        """
        self._check_change(name)
        with self._changing:
            versions = self._known(name)
            if self._required is not None:
                self._required.discard(name)
            versions.drop(_UNLOADED)

    def _check_change(self, name: str) -> None:
        check_name(name)
        if self._mode != "explicit":
            raise Unavailable(f"loading and unloading need --model-control-mode explicit; this server has {self._mode}")
        if self._leaving.is_set():
            raise Unavailable("the server is leaving")

    def _known(self, name: str) -> ModelVersions:
        if name not in self._models:
            if not has_model(self._path, name):
                raise NotFound(f"there is no model {quote(name)} in the repository")
            self._models[name] = self._versions_of(name)
        return self._models[name]

    def _versions_of(self, name: str) -> ModelVersions:
        return ModelVersions(self._path / name, self._settings, self._publish)

    def _poll(self) -> None:
        while not self._leaving.wait(self._poll_interval_s):
            with self._changing:
                for name in sorted({*model_names(self._path), *self._models}):
                    if self._leaving.is_set():
                        return
                    try:
                        self._follow(name)
                    except Exception:
                        logger.exception("model '%s' could not be looked at", name)

    def _follow(self, name: str) -> None:
        """One look at a model's folder, which may be new or gone."""
        versions = self._models.setdefault(name, self._versions_of(name))
        versions.update(settled=False)
        if not versions.ready() and not has_model(self._path, name):
            del self._models[name]
            if self._required is not None:
                self._required.discard(name)
            self._publish()

    def _publish(self) -> None:
        """Give readers a new view, and tell the listeners if it differs."""
        serving = {}
        index: list[IndexEntry] = []
        for name, versions in sorted(self._models.items()):
            index += versions.entries()
            for version, model in sorted(versions.ready().items()):
                serving[name, str(version)] = serving[name, ""] = model
        before, was_ready = self._view, self._was_ready
        self._view = _View(serving, tuple(index))
        self._was_ready = self.is_ready()
        if (self._view, self._was_ready) == (before, was_ready):
            return
        self.generation += 1
        for listener in self._listeners:
            try:
                listener()
            except Exception:
                logger.exception("a listener of the repository failed")


def _unknown(name: str, view: _View) -> ServingError:
    return NotFound(f"unknown model {quote(name)}: this server has {_list({entry.name for entry in view.index})}")


def _why(entries: Collection[IndexEntry]) -> str:
    """The state of what is under way, or else what is wrong."""
    entry = next((entry for entry in entries if entry.state == "LOADING"), max(entries, key=_number))
    return entry.reason or entry.state.lower()


def _number(entry: IndexEntry) -> int:
    return int(entry.version or 0)


def _list(names: Collection[str]) -> str:
    shown = sorted(names)[:8]
    return ", ".join([*shown, "…"] if len(names) > len(shown) else shown) or "none"
