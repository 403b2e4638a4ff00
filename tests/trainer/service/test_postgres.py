"""The store in a real PostgreSQL: all tests of the store, and two controllers that share it."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trainer.service.conftest import run_until
from tests.trainer.service.test_store import (  # noqa: F401 (run here with this module's store)
    test_a_change_from_a_state_that_has_passed_changes_nothing,
    test_a_controller_without_its_lease_changes_nothing,
    test_a_deleted_job_takes_its_events_and_never_gives_its_number,
    test_a_job_is_stored_whole_and_its_folder_has_its_number,
    test_a_key_submits_once_for_each_owner,
    test_events_are_numbered_without_gaps_by_all_that_append,
    test_every_state_that_may_follow_does_and_no_other,
    test_jobs_are_found_by_page_owner_and_state,
    test_others_jobs_do_not_exist,
    test_the_lease_has_one_holder_until_it_ends_or_is_given_up,
    test_the_queue_is_in_the_order_of_priorities_and_numbers,
    test_threads_that_submit_one_key_get_one_job,
)
from trainer.service.controller import Controller
from trainer.service.jobs import FINAL, JobSpec, JobState
from trainer.service.store import JobStore

pytestmark = pytest.mark.installs
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def postgres_programs() -> Path:
    """Returns the folder of PostgreSQL's programs, which it installs if they are not there."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin")):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
            subprocess.run(["apt-get", *command], check=True, capture_output=True, env=environment, timeout=300)
    return max(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """A server of its own on a Unix socket; yields the socket's folder."""
    programs = postgres_programs()
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    shutil.chown(folder, "postgres")
    as_postgres = ["runuser", "-u", "postgres", "--"]  # it refuses to run as root
    subprocess.run([*as_postgres, programs / "initdb", "-D", folder / "data", "-A", "trust"], check=True, **QUIET)  # type: ignore[call-overload]
    options = ["-D", folder / "data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
    process = subprocess.Popen([*as_postgres, programs / "postgres", *options], **QUIET)  # type: ignore[call-overload]
    until = time.monotonic() + 60
    while subprocess.run([programs / "pg_isready", "-h", folder], check=False, **QUIET).returncode:  # type: ignore[call-overload]
        assert time.monotonic() < until, "PostgreSQL did not start"
        time.sleep(0.1)
    yield folder
    process.terminate()
    process.wait(60)
    shutil.rmtree(folder)


@pytest.fixture
def url(server: Path, request: pytest.FixtureRequest) -> str:
    """The address of a new database."""
    name = f"jobs_{time.monotonic_ns()}"
    command = [postgres_programs() / "createdb", "-h", server, "-U", "postgres", name]
    subprocess.run(command, check=True, **QUIET)  # type: ignore[call-overload]
    return f"postgresql://postgres@/{name}?host={server}"


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as opened:
        yield opened


def test_two_controllers_share_a_store_and_each_job_runs_once(
    url: str, store: JobStore, tmp_path: Path, script: Callable[..., JobSpec]
) -> None:
    code = "open(run / 'starts', 'a').write('x'); (run / 'result.json').write_text('{}')"
    numbers = [store.add(script(code), owner="ada")[0].id for _ in range(4)]
    first = Controller(store, tmp_path)
    assert first.make_pass()
    first.resign()
    with JobStore(url) as other:
        second = Controller(other, tmp_path)
        for number in numbers:
            assert run_until(second, other, number, *FINAL).state is JobState.SUCCEEDED
        assert not first.make_pass()
    assert [(tmp_path / "runs" / str(number) / "starts").read_text() for number in numbers] == ["x"] * 4
