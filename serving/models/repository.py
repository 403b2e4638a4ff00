"""The model repository: all models of a folder, for any number of readers and one writer at a time.

Readers see an immutable `RepositorySnapshot`. Each change replaces it in one assignment; readers never wait.
`serving.models.versions` decides which versions of a model are served, `serving.models.loader` loads them.
"""

import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from serving.config import ControlMode, ServeConfig
from serving.errors import Internal, InvalidArgument, LoadError, NotFound, StartupError, Unavailable, quote
from serving.models.config import parse_json
from serving.models.devices import count_gpus
from serving.models.loader import LoadSettings, Model
from serving.models.scanner import check_name, check_repository, has_model, model_names
from serving.models.snapshot import RepositorySnapshot, join_names
from serving.models.versions import IndexEntry, ModelVersions

__all__ = ["IndexEntry", "Model", "Repository"]

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 3.0
_SHUTTING_DOWN = "the server is shutting down"
_UNLOADED = "unloaded"


class Repository:
    """The models of a folder. Thread-safe.

    Args:
        mode: "none" loads all models at the start, "poll" also follows changes of the folder, "explicit" loads the
            models that clients ask for.
        models: with mode "explicit", the models to load at the start.
        poll_interval_s: with mode "poll", the pause between two scans.
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
        """Grows with every change that readers can see."""
        self._path = path
        self._settings = settings
        self._mode = mode
        self._initial_models = models
        self._poll_interval_s = poll_interval_s
        self._write_lock = threading.Lock()
        self._models: dict[str, ModelVersions] = {}
        self._required: set[str] | None = None
        self._snapshot = RepositorySnapshot()
        self._was_ready = False
        self._listeners: list[Callable[[], None]] = []
        self._closing = threading.Event()
        self._poller: threading.Thread | None = None

    @classmethod
    def from_config(cls, config: ServeConfig) -> "Repository":
        """Creates the repository that the command line describes. Opens nothing yet."""
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

    # -- reading -----------------------------------------------------------------------------------------------------

    def get(self, name: str, version: str = "") -> Model:
        """Returns a ready version of a model; the newest if `version` is empty.

        Raises:
            NotFound: the model or version does not exist; or `version` is empty, and none is ready or loading.
            InvalidArgument: the version is not a number.
            Unavailable: the version is not ready, a version is loading, or the server is shutting down.
        """
        snapshot = self._snapshot
        return snapshot.serving.get((name, version)) or snapshot.find(name, version, is_closing=self._closing.is_set())

    def versions(self, name: str) -> list[str]:
        """Returns the ready versions of a model, lowest number first.

        Raises:
            NotFound: the model does not exist.
        """
        return self._snapshot.versions(name)

    def ready_models(self) -> list[Model]:
        """Returns all ready versions, sorted by name and number."""
        return self._snapshot.ready_models()

    def is_ready(self) -> bool:
        """Returns whether every model to be loaded at the start, and not unloaded or removed since, is ready."""
        required, serving = self._required, self._snapshot.serving
        return required is not None and all((name, "") in serving for name in required)

    def index(self, ready_only: bool) -> list[IndexEntry]:
        """Returns the repository index, sorted by name and number."""
        return [entry for entry in self._snapshot.index if not ready_only or entry.state == "READY"]

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Calls the listener after every change, on the thread that made it. A listener must not load or unload."""
        self._listeners.append(listener)

    # -- start and end -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks that the server can start, without opening a model.

        Raises:
            StartupError: the folder is missing, unreadable or empty; a model to load is not in it; or GPUs are
                required and there are none.
        """
        if self._settings.device == "cuda" and not count_gpus():
            raise StartupError("--device cuda, but there is no CUDA device: use --device auto or cpu")
        check_repository(self._path)
        names = model_names(self._path)
        if not names and self._mode == "none":
            raise StartupError(f"no model in {self._path}: a model is a folder with folders named 1, 2, … in it")
        if not names and self._mode == "poll":
            logger.warning("no model in %s yet: the server reports ready without models", self._path)
        for name in self._initial_models:
            if name not in names:
                raise StartupError(f"no model {quote(name)} in {self._path}, which has {join_names(names)}")

    def start(self) -> None:
        """Loads the initial models one after the other, then starts polling if the mode is "poll".

        Blocks until all are loaded. A failure is logged and shown in the index, and raises nothing.
        """
        with self._write_lock:
            self._models = {name: self._versions_of(name) for name in model_names(self._path)}
            wanted = [name for name in self._models if self._mode != "explicit" or name in self._initial_models]
            for name in wanted:
                self._models[name].mark_loading()
            self._publish()
            for name in wanted:
                if not self._closing.is_set():
                    self._models[name].update(stable=True)
            self._required = set(wanted)
            self._publish()
        if self._mode == "poll" and not self._closing.is_set():
            self._poller = threading.Thread(target=self._poll, name="repository", daemon=True)
            self._poller.start()

    def close(self) -> None:
        """Finishes all requests and frees the models. Waits 3 seconds at most for a model that is loading."""
        self._closing.set()
        if not self._write_lock.acquire(timeout=_CLOSE_TIMEOUT_S):
            logger.warning("shutting down while a model is loading")
            return
        try:
            self._required = None
            for versions in self._models.values():
                versions.unload(_SHUTTING_DOWN)
        finally:
            self._write_lock.release()
        if self._poller is not None:
            self._poller.join()

    # -- loading and unloading ---------------------------------------------------------------------------------------

    def load(self, name: str, config: str | None = None) -> None:
        """Loads a model, or updates it to the state of its folder. If that fails, the serving versions keep serving.

        Args:
            config: a ModelConfig as JSON, in place of the model's `config.pbtxt` until the next load.

        Raises:
            InvalidArgument: the name or the JSON is invalid.
            NotFound: the model does not exist.
            Unavailable: the mode does not allow it, or the server is shutting down.
            Internal: a version that should be served could not be loaded.
        """
        self._check_change(name)
        if config is not None:
            try:
                parse_json(config, name)
            except LoadError as error:
                raise InvalidArgument(str(error)) from error
        with self._write_lock:
            versions = self._get_or_add(name)
            versions.mark_loading()
            versions.retry_failed()
            failures = versions.update(stable=True, override=config)
        if failures:
            raise Internal(f"failed to load '{name}', {'; '.join(failures)}")

    def unload(self, name: str) -> None:
        """Takes all versions of a model out of service. Blocks until their requests are finished.

        Raises:
            InvalidArgument: the name is invalid.
            NotFound: the model does not exist.
            Unavailable: the mode does not allow it, or the server is shutting down.
        """
        self._check_change(name)
        with self._write_lock:
            versions = self._get_or_add(name)
            if self._required is not None:
                self._required.discard(name)
            versions.unload(_UNLOADED)

    def _check_change(self, name: str) -> None:
        check_name(name)
        if self._mode != "explicit":
            raise Unavailable(f"loading and unloading need --model-control-mode explicit; this server has {self._mode}")
        if self._closing.is_set():
            raise Unavailable(_SHUTTING_DOWN)

    def _get_or_add(self, name: str) -> ModelVersions:
        if name not in self._models:
            if not has_model(self._path, name):
                raise NotFound(f"there is no model {quote(name)} in the repository")
            self._models[name] = self._versions_of(name)
        return self._models[name]

    def _versions_of(self, name: str) -> ModelVersions:
        return ModelVersions(self._path / name, self._settings, self._publish)

    def _poll(self) -> None:
        while not self._closing.wait(self._poll_interval_s):
            with self._write_lock:
                for name in sorted({*model_names(self._path), *self._models}):
                    if self._closing.is_set():
                        return
                    try:
                        self._poll_model(name)
                    except Exception:
                        logger.exception("model '%s' could not be polled", name)

    def _poll_model(self, name: str) -> None:
        """Updates one model, whose folder may be new or have been removed."""
        versions = self._models.setdefault(name, self._versions_of(name))
        versions.update(stable=False)
        if not versions.ready() and not has_model(self._path, name):
            del self._models[name]
            if self._required is not None:
                self._required.discard(name)
            self._publish()

    def _publish(self) -> None:
        """Replaces the snapshot of the readers and notifies the listeners if it differs."""
        serving = {}
        index: list[IndexEntry] = []
        for name, versions in sorted(self._models.items()):
            index += versions.entries()
            for version, model in sorted(versions.ready().items()):
                serving[name, str(version)] = serving[name, ""] = model
        before, was_ready = self._snapshot, self._was_ready
        self._snapshot = RepositorySnapshot(serving, tuple(index))
        self._was_ready = self.is_ready()
        if (self._snapshot, self._was_ready) == (before, was_ready):
            return
        self.generation += 1
        for listener in self._listeners:
            try:
                listener()
            except Exception:
                logger.exception("a listener of the repository failed")
