"""The store in a real PostgreSQL: all tests of the store, and two controllers that share it."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.trainer.service.conftest import run_until
from tests.trainer.service.service_process import COUNTS, Service, kill_while_jobs_run, spec
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
    test_services_that_create_one_new_store_at_once_agree_on_it_and_one_leads,
    test_the_lease_has_one_holder_until_it_ends_or_is_given_up,
    test_the_queue_is_in_the_order_of_priorities_and_numbers,
    test_threads_that_submit_one_key_get_one_job,
)
from trainer.errors import TrainerError
from trainer.service.client import RemoteJobs
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


class Server:
    """A PostgreSQL server of its own, on a Unix socket in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._programs = postgres_programs()
        shutil.chown(folder, "postgres")
        self._run("initdb", "-D", folder / "data", "-A", "trust")
        self.start()

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        self._run("pg_ctl", "start", "-w", "-D", self.folder / "data", "-o", options, "-l", self.folder / "log")

    def crash(self) -> None:
        """Ends it at once, as a crash does."""
        self._run("pg_ctl", "stop", "-m", "immediate", "-D", self.folder / "data")

    def create_database(self) -> str:
        """Returns the address of a new database."""
        name = f"jobs_{time.monotonic_ns()}"
        self._run("createdb", "-h", self.folder, name)
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = ["runuser", "-u", "postgres", "--", str(self._programs / program), *map(str, arguments)]
        subprocess.run(command, check=True, timeout=120, **QUIET)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    running = Server(folder)
    yield running
    running.crash()
    shutil.rmtree(folder)


@pytest.fixture
def url(server: Server) -> str:
    return server.create_database()


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


def test_a_service_that_is_killed_again_and_again_starts_each_job_once(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    kill_while_jobs_run(url, tmp_path, engine="script", num_jobs=8, num_kills=6)


def test_a_database_that_crashes_delays_answers_and_loses_nothing(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    service = Service(url)
    try:
        with closing(RemoteJobs(service.address)) as jobs:
            job = jobs.submit(spec(tmp_path, COUNTS), owner="")
            while jobs.get(job.id).state is not JobState.RUNNING:
                time.sleep(0.05)
            server.crash()
            with pytest.raises(TrainerError, match="the store of the jobs cannot be used"):
                jobs.get(job.id)
            time.sleep(2.0)  # the job ends meanwhile
            server.start()
            assert list(jobs.watch(job.id))[-1].data["state"] is JobState.SUCCEEDED
        assert (tmp_path / "runs" / str(job.id) / "starts").read_text() == "x"
    finally:
        service.kill()
    assert sum("the store of the jobs cannot be used" in line for line in service.lines) >= 1
    assert any("the store can be used again" in line for line in service.lines)
