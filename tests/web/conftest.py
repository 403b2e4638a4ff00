"""A server with its page and small models, and the page of run folders."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Browser

from serving.config import ServeConfig
from serving.server import Server
from tests.serving.conftest import serve
from tests.web.browser import open_browser
from tests.web.models import write_digits, write_strange
from trainer.data import Dataset
from trainer.watch.server import build_app


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def page_models(tmp_path_factory: pytest.TempPathFactory, mini: Dataset) -> Path:
    """A repository with the models of `tests.web.models`."""
    repository = tmp_path_factory.mktemp("page-models")
    images = np.asarray(mini.train.images).reshape(-1, 28, 28)
    write_digits(repository, images, np.asarray(mini.train.labels, dtype=np.int64))
    write_strange(repository)
    return repository


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of images that users label; it does not exist at first."""
    return tmp_path_factory.mktemp("saved") / "corrected"


@pytest.fixture(scope="module")
def shown(page_models: Path, saved: Path) -> Iterator[Server]:
    """A server that shows its page and saves images."""
    for served in serve(config(page_models, save_images=saved)):
        yield served.server


@pytest.fixture(scope="module")
def port(shown: Server) -> int:
    return shown.http.port


def config(repository: Path, **options: object) -> ServeConfig:
    """Returns the configuration of a server on free ports."""
    given: dict[str, object] = {"model_repository": str(repository), "device": "cpu", "num_threads": 1}
    given |= {"grpc_port": 0, "http_port": 0, "metrics_port": 0, **options}
    return ServeConfig(**given)  # type: ignore[arg-type]


@contextmanager
def watched(*folders: Path, port: int = 0) -> Iterator[tuple[int, uvicorn.Server]]:
    """Context with the page of runs, and its port."""
    options = uvicorn.Config(build_app(folders), port=port, lifespan="off", log_level="error")
    listener = options.bind_socket()
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1], server
    server.should_exit = server.force_exit = True
    thread.join()
    listener.close()
