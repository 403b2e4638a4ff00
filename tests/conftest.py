"""What the tests share: a small real data set on disk, and ways to start the trainer as a user does."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from trainer.data import Dataset, load_dataset

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of data sets for this session; `mnist-mini` needs no network."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def mini(data_dir: Path) -> Dataset:
    """`mnist-mini`: 5,000 training and 1,000 test images of MNIST."""
    return load_dataset("mnist-mini", data_dir, say=lambda line: None)


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
def run_trainer(trainer_command: Callable[..., list[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run it to its end and return what it printed."""

    def run(*arguments: str, ranks: int = 1, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            trainer_command(*arguments, ranks=ranks),
            cwd=cwd,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB, where a test may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all that is left; there is room again when the file is gone."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel lets no file of this process become larger: what does not fit any more is cut short, then refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def clean_environment() -> dict[str, str]:
    """This process's environment without what pytest or a launcher may have put there."""
    mine = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST")
    return {name: value for name, value in os.environ.items() if name not in mine}
