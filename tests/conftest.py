"""Fixtures and helpers of all tests: a small real data set on disk, and ways to start the trainer as a user does."""

import functools
import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hosts import why_no_namespaces
from tests.interpreter import Interpreter
from tests.requirements_of import missing_packages
from tests.time_limit import TimeLimit
from trainer.data import Dataset, load_dataset

# In a shell without job control, background commands ignore Ctrl-C, and the processes of the tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
PATIENCE_S = 600.0


_LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir", type=Path, help="folder of data sets, for tests of whole data sets [default: a new one]"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Limits the time of tests: a little more than `wait_for` waits, whose error says for what."""
    config.pluginmanager.register(TimeLimit(1.1 * PATIENCE_S, 3 * PATIENCE_S))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`: leaves out what has no such test, and what needs packages that are not installed.

    The conftest.py of a folder that is left out is not imported.
    """
    if config.option.markexpr != "gpu":
        return None
    if not _has_gpu_tests(collection_path):
        return True
    conftest = collection_path / "conftest.py"
    file = conftest if conftest != Path(__file__) and conftest.is_file() else collection_path
    if file.is_file() and (missing := missing_packages(file)):
        left_out = config.stash.setdefault(_LEFT_OUT, {})
        left_out[str(collection_path.relative_to(ROOT))] = missing
        return True
    return None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands what was left out to the process that prints it, from one of pytest-xdist's."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes what one of pytest-xdist's processes has left out; all leave out the same."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


@functools.cache
def _has_gpu_tests(path: Path) -> bool:
    """Returns whether a test file, or one in a folder or below, has a test that is marked `gpu`."""
    if path.is_dir():
        return any(map(_has_gpu_tests, path.rglob("test_*.py")))
    return path.match("test_*.py") and "mark.gpu" in path.read_text()


@pytest.fixture(autouse=True)
def restores_torch() -> Iterator[None]:
    """Restores what belongs to the process, and what loading or training in it sets: threads and precisions."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
    torch.backends.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"  # newer settings
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False  # older ones


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A cache of data sets for this session; `mnist-mini` needs no network."""
    given: Path | None = request.config.option.data_dir
    return given.absolute() if given is not None else tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def mini(data_dir: Path) -> Dataset:
    """`mnist-mini`: 5,000 training and 1,000 test images of MNIST."""
    return load_dataset("mnist-mini", data_dir, log=lambda line: None)


@pytest.fixture(scope="session")
def trainer_command(data_dir: Path) -> Callable[..., list[str]]:
    """The command line of a training run on `mnist-mini`: `trainer_command("--epochs", "1", ranks=2)`."""

    def command(*arguments: str, ranks: int = 1) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launcher = [sys.executable, *(torchrun if ranks > 1 else [])]
        known = ["--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu", "--no-export"]
        return [*launcher, str(ROOT / "trainer" / "main.py"), *known, *arguments]

    return command


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Runs Python command lines to their end, without the seconds of an import of torch."""
    with Interpreter(clean_environment()) as interpreter:
        yield interpreter


@pytest.fixture(scope="session")
def run_trainer(
    trainer_command: Callable[..., list[str]], interpreter: Interpreter
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the trainer to its end and returns the completed process."""

    def run(*arguments: str, ranks: int = 1, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        _, *command = trainer_command(*arguments, ranks=ranks)
        return interpreter.run(command, env=clean_environment(), cwd=cwd)

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB; the test is skipped where none may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def has_namespaces() -> bool:
    """Whether hosts are network namespaces; the end of the test report shows it."""
    return not why_no_namespaces()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Records the kind of hosts in the test's report, which pytest-xdist sends from the worker to the terminal."""
    if isinstance(item, pytest.Function) and "has_namespaces" in item.fixturenames:
        item.user_properties.append(("hosts", why_no_namespaces()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the kind of hosts, because addresses test less than network namespaces do."""
    reports = itertools.chain.from_iterable(terminalreporter.stats.values())
    properties_of_tests = [dict(report.user_properties) for report in reports if isinstance(report, pytest.TestReport)]
    for path, packages in terminalreporter.config.stash.get(_LEFT_OUT, {}).items():
        terminalreporter.write_line(f"left out, without the packages {', '.join(packages)}: {path}")
    for why in {properties["hosts"] for properties in properties_of_tests if "hosts" in properties}:
        less = f"addresses of 127.0.0.0/8, without names and DNS, and not network namespaces: {why}"
        terminalreporter.write_line(f"hosts were {less if why else 'network namespaces'}")


def before_listing(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Makes the next listing of a folder begin with `act`, as if another process did it at that moment."""
    iterdir = Path.iterdir

    def act_and_list(path: Path) -> Iterator[Path]:
        monkeypatch.setattr(Path, "iterdir", iterdir)
        act()
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", act_and_list)


def fill(disk: Path) -> Path:
    """Fills the disk with one file, which the test can remove to make room again."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Context that limits the size of this process's files: a write over the limit is cut short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def clean_environment() -> dict[str, str]:
    """Returns this process's environment without the variables of pytest and of launchers."""
    mine = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    mine |= {"PYTEST_CURRENT_TEST", "TORCH_CPP_LOG_LEVEL"}  # importing trainer/cli.py sets the latter
    return {name: value for name, value in os.environ.items() if name not in mine}


def free_port() -> int:
    """Returns a free port whose successor is free, too: for the host barrier of trainer/launch.py."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return port


def wait_for(what: str, holds: Callable[[], bool], give_up: Callable[[], bool] = lambda: False) -> None:
    """Waits until `holds` returns True. Fails, with `what`, after `PATIENCE_S` or when `give_up` returns True."""
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert not give_up(), f"there will be no {what}"
        assert time.monotonic() < until, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.05)
