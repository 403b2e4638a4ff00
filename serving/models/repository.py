"""The model repository: all models of a folder, for any number of readers and one change of each model at a time.

Readers see an immutable `RepositorySnapshot`. Each change replaces it in one assignment; readers never wait.
`serving.models.versions` decides which versions of a model are served, `serving.models.loader` loads them,
`serving.models.changes` gives each change a thread: a model whose backend hangs holds up no other.
"""

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

from convoy.cpus import free_memory
from serving.config import ControlMode, ServeConfig
from serving.errors import Internal, InvalidArgument, NotFound, ServingError, StartupError, Unavailable, quote
from serving.models.changes import ANYONE, LOAD_PATIENCE_S, Caller, Changes, LoadTurn, wait_for_room
from serving.models.devices import count_gpus
from serving.models.files import describe
from serving.models.folder import RepositoryFolder
from serving.models.loader import LoadSettings, Model
from serving.models.mirror import Mirror, open_location
from serving.models.promotions import Promotions
from serving.models.scanner import RepositoryFolders, check_name
from serving.models.slot import IndexEntry, Standing
from serving.models.snapshot import RepositorySnapshot, join_names
from serving.models.versions import ModelVersions

__all__ = ["IndexEntry", "Model", "Repository"]

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 3.0
"""For models that are loading."""
_UNLOAD_TIMEOUT_S = 60.0
"""For requests that are being computed."""
_POLL_PATIENCE_S = 30.0
"""After which polling goes on without a model that is loading."""
_SHUTTING_DOWN = "the server is shutting down"
_UNLOADED = "unloaded"


class Repository:
    """The models of a folder. Thread-safe.

    Args:
        mode: "none" loads all models at the start, "poll" also follows changes of the folder, "explicit" loads the
            models that clients ask for.
        models: with mode "explicit", the models to load at the start.
        poll_interval_s: with mode "poll", the pause between two scans.
        mirror: keeps the folder as a copy of a remote repository.
    """

    def __init__(
        self,
        path: Path,
        settings: LoadSettings,
        *,
        mode: ControlMode = "none",
        models: Collection[str] = (),
        poll_interval_s: float = 2.0,
        mirror: Mirror | None = None,
    ) -> None:
        self.generation = 0
        """Grows with every change that readers can see."""
        self._path = path
        self._folder = RepositoryFolder(path, self._publish, mirror, self._known)
        self._settings = settings
        self._mode = mode
        self._initial_models = models
        self._poll_interval_s = poll_interval_s
        self._changes = Changes()
        self._turn = LoadTurn(LOAD_PATIENCE_S, settings.num_loads, free_memory)
        self.promotions = Promotions(self._changes, self._find, self._folder.write_promotion, self._folder.fetch)
        self._lock = threading.Lock()
        """For the attributes below; never held while a model is loaded or a folder is read."""
        self._models: dict[str, ModelVersions] = {}
        self._like: Mapping[str, Collection[int]] = {}
        self._required: frozenset[str] | None = None
        self._snapshot = RepositorySnapshot()
        self._was_ready = False
        self._listeners: list[Callable[[], None]] = []
        self._closing = threading.Event()
        self._poller: threading.Thread | None = None

    @classmethod
    def from_config(cls, config: ServeConfig) -> "Repository":
        """Creates the repository that the command line describes. Opens nothing yet."""
        path, mirror = open_location(config.model_repository, config.model_cache)
        return cls(
            path,
            LoadSettings.from_config(config),
            mode=config.model_control_mode,
            models=config.load_model,
            poll_interval_s=config.poll_interval_s,
            mirror=mirror,
        )

    # -- reading -----------------------------------------------------------------------------------------------------

    def get(self, name: str, version: str = "") -> Model:
        """Returns a ready version of a model; the newest if `version` is empty.

        Raises:
            NotFound: the model or version does not exist; or `version` is empty, and none is ready or loading.
            InvalidArgument: the version is not a number.
            Unavailable: the version is not ready, a version is loading, or the server is starting or shutting down.
        """
        snapshot = self._snapshot
        return snapshot.serving.get((name, version)) or snapshot.find(name, version, is_closing=self._closing.is_set())

    def versions(self, name: str) -> list[str]:
        """Returns the ready versions of a model, lowest number first.

        Raises:
            NotFound: the model does not exist.
            Unavailable: the server is starting.
        """
        return self._snapshot.versions(name)

    def ready_models(self) -> list[Model]:
        """Returns all ready versions, sorted by name and number."""
        return self._snapshot.ready_models()

    def is_ready(self) -> bool:
        """Returns whether every model to be loaded at the start, and not unloaded or removed since, is ready."""
        required, serving = self._required, self._snapshot.serving
        return required is not None and all((name, "") in serving for name in required)

    def is_unhealthy(self) -> bool:
        """Returns whether a loaded version hangs or is broken in all its instances: a new process may end that."""
        return bool(self._snapshot.unhealthy)

    def index(self, ready_only: bool) -> list[IndexEntry]:
        """Returns the repository index, sorted by name and number."""
        return [entry for entry in self._snapshot.index if not ready_only or entry.state == "READY"]

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Calls the listener after every change, one call at a time. A listener must neither block nor load."""
        self._listeners.append(listener)

    def standing(self, name: str) -> tuple[int | None, Standing]:
        """Returns the version that requests get which name none, and the operator's choice."""
        snapshot = self._snapshot
        serving = snapshot.serving.get((name, ""))
        return int(serving.version) if serving is not None else None, snapshot.standings.get(name, Standing())

    def _known(self, name: str) -> tuple[int | None, Collection[int]]:
        """Returns the version that serves, and those that do not load."""
        serving, standing = self.standing(name)
        return serving, standing.failed

    # -- start and end -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks that the server can start, without opening a model.

        Raises:
            StartupError: the folder is missing, unreadable or empty; a model to load is not in it; or GPUs are
                required and there are none.
        """
        if self._settings.device == "cuda" and not count_gpus():
            raise StartupError("--device cuda, but there is no CUDA device: use --device auto or cpu")
        folders = self._folder.check()
        names = folders.models
        if not names and not folders.unreadable and self._mode == "none":
            raise StartupError(
                f"no model in {self._folder.place}: a model is a folder with folders named 1, 2, … in it"
            )
        if not names and self._mode == "poll":
            logger.warning("no model in %s yet: the server reports ready without models", self._folder.place)
        for name in self._initial_models:
            if name not in names and name not in folders.unreadable:
                raise StartupError(f"no model {quote(name)} in {self._folder.place}, which has {join_names(names)}")

    def start(self) -> None:
        """Loads the initial models, a few at a time. If the mode is "poll", starts polling.

        Blocks until all are loaded. A failure is logged and shown in the index, and raises nothing. A folder that
        cannot be read, or is gone by now, is among the models that readiness requires.
        """
        folders = self._scan_until_readable()
        if folders is None:
            return
        names = sorted({*folders.models, *folders.unreadable, *self._initial_models})
        wanted = [name for name in names if self._mode != "explicit" or name in self._initial_models]
        with self._lock:
            self._models = {name: self._versions_of(name) for name in names}
            for name in wanted:
                self._models[name].mark_loading()
            self._required = frozenset(wanted)
        self._publish()
        loads: list[Future[None]] = []
        for name in wanted:
            wait_for_room(loads, self._settings.num_loads, LOAD_PATIENCE_S)
            loads.append(self._changes.submit(name, partial(self._load_first, name)))
        if self._mode == "poll":  # polling goes on without models that take long
            wait(loads, LOAD_PATIENCE_S)
        if self._mode == "poll" and not self._closing.is_set():
            self._poller = threading.Thread(target=self._poll, name="repository", daemon=True)
            self._poller.start()
        wait(loads)
        self._publish()

    def serve_like(self, models: Mapping[str, Collection[int]]) -> None:
        """Lets changes prefer the versions that others serve, whatever has been exported since, until called again.

        Args:
            models: versions by model, the one first that requests get which name none.
        """
        with self._lock:
            self._like = models
            for name, versions in self._models.items():
                versions.like = models.get(name, ())

    def close(self) -> None:
        """Finishes all requests and frees the models. Waits 3 seconds at most for a model that is loading."""
        self._closing.set()
        with self._lock:
            self._required = None
            models = list(self._models.values())
        loading = {each.name for each in models if self._changes.is_busy(each.name)}
        unloads = {each.name: self._changes.submit(each.name, partial(each.unload, _SHUTTING_DOWN)) for each in models}
        self._wait_for_close([unloads[name] for name in loading], "loading", _CLOSE_TIMEOUT_S)
        self._wait_for_close([unloads[name] for name in unloads.keys() - loading], "computing", _UNLOAD_TIMEOUT_S)
        if self._poller is not None:
            self._poller.join(_CLOSE_TIMEOUT_S)

    def _wait_for_close(self, unloads: Collection[Future[None]], doing: str, timeout_s: float) -> None:
        if wait(unloads, timeout_s).not_done:
            logger.warning("shutting down while a model is %s", doing)

    # -- loading and unloading ---------------------------------------------------------------------------------------

    def load(self, name: str, config: str | None = None, caller: Caller = ANYONE) -> None:
        """Loads a model, or updates it to the state of its folder. If that fails, the serving versions keep serving.

        Args:
            config: a ModelConfig as JSON, in place of the model's `config.pbtxt` until the next load.
            caller: is waited for no longer than its deadline. If it has gone, the load is not started.

        Raises:
            InvalidArgument: the name or the JSON is invalid, or the configuration asks for too much.
            NotFound: the model does not exist.
            Unavailable: the mode does not allow it, the repository cannot be read, or the server is shutting down.
            Internal: a version that should be served could not be loaded.
            ResourceExhausted: too many loads run or wait.
            DeadlineExceeded: the deadline has passed; a load that has started goes on.
            Cancelled: the caller has gone.
        """
        self._check_change(name)

        def change() -> None:
            self._folder.refresh()
            versions = self._get_or_add(name)
            if config is not None:
                versions.check_override(config)
            versions.mark_loading()
            versions.retry_failed()
            works = versions.override is None and bool(versions.ready())
            failures = self._load(versions, config)
            if not failures:
                return
            failures += self._folder.missing.get(name, {}).values()
            kind = InvalidArgument if config is not None and works else Internal  # with its own configuration, it loads
            raise kind(f"failed to load '{name}', {'; '.join(failures)}")

        self._changes.call(name, change, caller)

    def unload(self, name: str, caller: Caller = ANYONE) -> None:
        """Takes all versions of a model out of service. Blocks until their requests are finished.

        Args:
            caller: as for `load`.

        Raises:
            InvalidArgument: the name is invalid.
            NotFound: the model does not exist.
            Unavailable: the mode does not allow it, the repository cannot be read, or the server is shutting down.
            ResourceExhausted: too many changes run or wait.
            DeadlineExceeded: the deadline has passed; a change that has started goes on.
            Cancelled: the caller has gone.
        """
        self._check_change(name)

        def change() -> None:
            versions = self._get_or_add(name)
            self._require_no_more(name)
            versions.unload(_UNLOADED)

        self._changes.call(name, change, caller)

    def _check_change(self, name: str) -> None:
        check_name(name)
        if self._mode != "explicit":
            raise Unavailable(f"loading and unloading need --model-control-mode explicit; this server has {self._mode}")
        if self._closing.is_set():
            raise Unavailable(_SHUTTING_DOWN)

    def _get_or_add(self, name: str) -> ModelVersions:
        """Returns a model that a client names, which may be new in the folder."""
        if self._closing.is_set():
            raise Unavailable(_SHUTTING_DOWN)
        if name not in self._models:
            try:
                exists = self._folder.has_model(name)
            except OSError as error:
                raise Unavailable(f"model {quote(name)} cannot be read in the repository: {describe(error)}") from error
            if not exists:
                raise NotFound(f"there is no model {quote(name)} in the repository")
        return self._add(name)

    def _find(self, name: str) -> ModelVersions:
        """Returns a model whose promoted version is to change; in explicit mode, it may be new in the folder."""
        check_name(name)
        if self._mode == "explicit" or self._closing.is_set():
            return self._get_or_add(name)
        if name not in self._models:
            raise NotFound(f"unknown model {quote(name)}: this server has {join_names(self._models)}")
        return self._models[name]

    def _add(self, name: str) -> ModelVersions:
        with self._lock:
            return self._models.setdefault(name, self._versions_of(name))

    def _versions_of(self, name: str) -> ModelVersions:
        retry_s = self._poll_interval_s if self._mode == "poll" else None
        versions = ModelVersions(self._path / name, self._settings, self._publish, turn=self._turn, retry_s=retry_s)
        versions.like = self._like.get(name, ())
        return versions

    def _require_no_more(self, name: str) -> None:
        with self._lock:
            if self._required is not None:
                self._required -= {name}

    def _load_first(self, name: str) -> None:
        if not self._closing.is_set():
            self._load(self._models[name])

    def _load(self, versions: ModelVersions, override: str | None = None) -> list[str]:
        """Updates a model whose files are complete. While no version loads, fetches older ones if it is a copy."""
        present: tuple[int, ...] | None = None
        while True:
            failures = self._update(versions, stable=True, override=override)
            before, present = present, versions.view.standing.present
            if versions.ready() or present == before or self._closing.is_set():
                return failures
            self._folder.refresh()

    def _update(self, versions: ModelVersions, *, stable: bool, override: str | None = None) -> list[str]:
        try:
            return versions.update(stable=stable, override=override)
        except ServingError:
            raise
        except Exception:
            logger.exception("model '%s' could not be updated", versions.name)
            return versions.keep("the server failed while it updated the model; its log says why")

    # -- polling -----------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        while not self._closing.wait(self._poll_interval_s):
            try:
                self._poll_once()
            except Exception:  # a bug, or no more threads: polling goes on
                logger.exception("the repository could not be polled")

    def _poll_once(self) -> None:
        folders = self._folder.scan()
        if folders is None:
            return
        updates: list[Future[None]] = []
        for name in sorted({*folders.models, *folders.unreadable, *self._models}):
            if self._closing.is_set():
                return
            if not self._changes.is_busy(name):
                wait_for_room(updates, self._settings.num_loads, _POLL_PATIENCE_S)
                updates.append(self._changes.submit(name, partial(self._poll_model, name)))
        wait(updates, _POLL_PATIENCE_S)

    def _poll_model(self, name: str) -> None:
        """Updates one model, whose folder may be new or have been removed."""
        if self._closing.is_set():
            return
        versions = self._add(name)
        self._update(versions, stable=False)
        try:
            is_gone = not versions.ready() and not self._folder.has_model(name)
        except OSError:
            return
        if is_gone:
            with self._lock:
                del self._models[name]
            self._require_no_more(name)
            self._publish()

    def _scan_until_readable(self) -> RepositoryFolders | None:
        """Returns the folders as soon as the repository can be read; None if it is closed before."""
        while (folders := self._folder.scan()) is None:
            if self._closing.wait(self._poll_interval_s):
                return None
        return folders

    def _publish(self) -> None:
        """Replaces the snapshot of the readers and notifies the listeners if it differs.

        The generation grows after the snapshot is replaced: whoever reads it before the snapshot has seen the older
        state, and can tell so later.
        """
        with self._lock:
            views = {name: versions.view for name, versions in sorted(self._models.items())}
            before, was_ready = self._snapshot, self._was_ready
            is_read = before.is_read or self._required is not None
            self._snapshot = RepositorySnapshot.of(
                views, self._folder.unreadable, self._folder.missing, is_read=is_read
            )
            self._was_ready = self.is_ready()
            if (self._snapshot, self._was_ready) == (before, was_ready):
                return
            self.generation += 1
            for listener in self._listeners:
                try:
                    listener()
                except Exception:
                    logger.exception("a listener of the repository failed")
