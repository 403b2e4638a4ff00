"""`convoy jobs`, with an engine whose jobs do what a training leaves, at once."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.service.script_engine import ScriptEngine
from trainer.service import engines
from trainer.service.commands import jobs_command
from trainer.service.engines.engine import Plan
from trainer.service.jobs import JobSpec

CODE = (
    "import sys, pathlib, time; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True); print('one'); print('two');"
    '(run / \'metrics.jsonl\').write_text(\'{"kind": "epoch", "step": 9, "epoch": 3, "val_accuracy": 0.875}\\n\');'
    "(run / 'result.json').write_text('{\"test_accuracy\": 0.75}') if 'fails' not in run.name else sys.exit(2)"
)


class QuickEngine(ScriptEngine):
    def plan(self, spec: JobSpec) -> Plan:
        return Plan((sys.executable, "-c", CODE, spec.run_folder), (f"in {spec.working_folder}",))


@pytest.fixture
def jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line; returns the exit code, the output and the error."""
    monkeypatch.setitem(engines._OURS, "quick", "tests.trainer.service.test_commands:QuickEngine")
    monkeypatch.setattr("trainer.service.embedded.pass_command", lambda _: [])
    monkeypatch.chdir(tmp_path)
    Path("jobs.db").touch()
    Path("empty").touch()

    def run(line: str) -> tuple[int, str, str]:
        verb, *rest = shlex.split(line)
        store = [] if "--service" in rest else ["--store", "jobs.db"]
        with pytest.raises(SystemExit) as end:
            jobs_command([verb, *store, *rest])
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run


def test_a_job_from_its_submission_to_its_deletion(jobs: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    run_folder = tmp_path / "runs" / "job-1-cifar10"
    code, out, _ = jobs("submit --engine quick --gpus 1 --recipe cifar10 -- --epochs 3")
    assert (code, out) == (0, f"job 1, starting on quick: {run_folder}\n")
    code, out, _ = jobs("watch 1")
    assert code == 0
    assert [line.split("  ", 1)[1] for line in out.splitlines() if "running" not in line] == [
        "queued",
        "starting",
        "epoch 3  val_accuracy 87.50 %",
        "succeeded: test accuracy 75.00 %",
    ]
    heading, row = jobs("list")[1].splitlines()
    assert heading.split() == ["JOB", "STATE", "ENGINE", "GPUS", "AGE", "PROGRESS", "TRAINING"]
    assert "succeeded  quick   1" in row
    assert "epoch 3, validation 87.50 %  --recipe cifar10 --epochs 3" in row
    _, out, _ = jobs("show 1")
    for text in (
        "succeeded: test accuracy 75.00 %",
        f"run folder    {run_folder}",
        "asks for 1 GPUs",
        "exit code     0",
    ):
        assert text in out
    assert jobs("logs 1")[1] == "one\ntwo\n"
    assert jobs("logs 1 --tail 1 --follow")[1] == "two\n"
    assert jobs("logs 1 --rank 0")[1] == "one\ntwo\n"
    assert jobs("logs 1 --rank 1")[2] == "error: rank 1: the job has the rank 0 only\n"
    assert json.loads(jobs("list --json")[1])["figures"]["val_accuracy"] == 0.875
    assert jobs("delete 1")[1] == f"job 1 is deleted; its run stays in {run_folder}\n"
    assert run_folder.is_dir()
    assert jobs("list")[1] == "no jobs\n"
    assert jobs("list --state running queued")[1] == "no jobs that are running or queued\n"


def test_a_failed_job_gives_exit_code_1_and_can_be_tried_again(jobs: Callable[..., tuple[int, str, str]]) -> None:
    jobs("submit --engine quick --run-dir fails --cpus 1")
    code, out, _ = jobs("watch 1")
    assert code == 1
    assert out.splitlines()[-1].endswith("failed: the request cannot be met")
    assert jobs("cancel 1")[2] == "error: job 1 has ended: it is FAILED\n"
    code, out, _ = jobs("retry 1")
    assert (code, out) in ((0, "job 1: starting\n"), (0, "job 1: running\n"))


def test_a_job_whose_folder_is_gone_is_shown(
    jobs: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    store = f"--store {tmp_path / 'jobs.db'}"
    assert jobs(f"submit {store} --engine quick --cpus 1 --run-dir {tmp_path / 'run'}")[0] == 0
    monkeypatch.chdir(tmp_path)
    assert jobs("watch 1")[0] == 0
    (tmp_path / "work").rmdir()
    code, out, _ = jobs("show 1")
    assert (code, "command" in out, "succeeded: test accuracy 75.00 %" in out) == (0, False, True)


def test_a_dry_run_shows_the_command_and_a_key_submits_once(jobs: Callable[..., tuple[int, str, str]]) -> None:
    assert "runs/job-{id}-mnist" in jobs("submit --engine quick --dry-run")[1]
    assert jobs("list")[1] == "no jobs\n"
    for _ in range(2):
        assert jobs("submit --engine quick --key k")[1].startswith("job 1,")
    assert "more" not in jobs("list --limit 1")[1]
    jobs("submit --engine quick")
    assert jobs("list --limit 1")[1].splitlines()[-1] == "more: convoy jobs list --before 2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("submit --gpus 9 --engine quick", "--gpus 9: this machine has 2"),
        ("submit --gpus -1", "--gpus -1: must be at least 0"),
        ("submit --memory-gb nan", "--memory-gb nan: must be at least 0"),
        (f"submit --priority {2**40}", f"priority {2**40}: must be at most 2147483647"),
        (f"show {2**40}", f"job {2**40}: must be at least 0, and at most 2147483647"),
        ("list --before -1", "--before -1: must be at least 0"),
        ("list --service http://localhost:8003", "must be HOST:PORT"),
        ("list --service localhost:99999", "must be HOST:PORT"),
        ("list --service :8003", "must be HOST:PORT"),
        ("list --service ''", "must be HOST:PORT"),
        ("list --service localhost --store x.db", "--store x.db: the service localhost has its own"),
        ("list --tls-ca /dev/null", "--token-file and --tls-ca are for a service"),
        ("list --service localhost --token-file empty", "empty must hold one token"),
        ("list --service localhost --tls-ca empty", "empty does not hold a certificate"),
        ("submit --engine moon", "--engine moon: there are"),
        ("submit --engine quick --key 'a\tb'", "key: must be at most 255 printable characters"),
        ("submit --nodes 99999999999", "--nodes 99999999999: must be a number of hosts"),
        ("submit -- --run-dir x", "--run-dir after the --: give --run-dir before the --"),
        ("submit -- --epochs many", "options of convoy train: "),
        ("submit -- --recipe cifer10", "did you mean cifar10"),
        ("show 7", "there is no job 7"),
        ("list --store jobs.bd", "--store jobs.bd does not exist: convoy jobs submit makes it"),
        ("submit --store .", "cannot be opened: Is a directory"),
        ("list --service 'a\x07'", "must be HOST:PORT"),
        ("logs 7", "there is no job 7"),
    ],
)
def test_a_mistake_is_one_line(line: str, message: str, jobs: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = jobs(line)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert message in err
