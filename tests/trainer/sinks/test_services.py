"""Weights & Biases and MLflow, without a network: what they get, continued runs, and failures that are one warning."""

import importlib.util
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE_S
from tests.trainer.sinks.sink_runs import COLOUR, GREY, opened, write_epochs
from trainer.errors import ConfigError, Interrupted
from trainer.sinks import Mistake, background, check_installed, fan_out
from trainer.sinks.background import BackgroundSink, SinkFailure


@pytest.fixture(autouse=True)
def _is_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CLOSE_TIMEOUT_S", dict.fromkeys(background.CLOSE_TIMEOUT_S, PATIENCE_S))


@pytest.mark.filterwarnings("ignore")  # of the package
def test_a_continued_training_continues_the_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    with opened(tmp_path, "wandb") as sinks:
        write_epochs(sinks, 1)
    time.sleep(1)  # each start has a folder, named after its second
    with opened(tmp_path, "wandb", from_step=45) as sinks:
        write_epochs(sinks, 2)
        sinks.show_mistakes([GREY, COLOUR], step=90)
    wandb.teardown()  # ends its own process, which writes
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.stem for file in files] == [f"run-{(tmp_path / 'wandb-run-id').read_text().strip()}"] * 2
    first, second = (file.read_bytes() for file in files)
    assert b"validation/accuracy" in first
    assert b"recipe" in first
    assert b"taken for dog" in second


@pytest.mark.filterwarnings("ignore")  # of the package
def test_a_continued_training_continues_the_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes seconds to make
    with suppress(Interrupted), opened(tmp_path, "mlflow") as sinks:
        write_epochs(sinks, 1, 2)
        raise Interrupted("SIGTERM", "saved", 15)
    client, run_id = mlflow.MlflowClient(), (tmp_path / "mlflow-run-id").read_text().strip()
    assert client.get_run(run_id).info.status == "KILLED"
    with opened(tmp_path, "mlflow", from_step=45) as sinks:
        write_epochs(sinks, 2)
        sinks.show_mistakes([GREY, COLOUR, replace(GREY, label="𠀀" * 63)], step=90)  # a folder's longest name
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == tmp_path.name
    assert run.data.params["recipe.augment.shift"] == "2"
    assert {metric.step for metric in client.get_metric_history(run_id, "validation/accuracy")} == {45, 90}
    images = client.list_artifacts(run_id, "mistakes")
    assert [Path(image.path).name for image in images] == [
        "01-cat-as-dog.png",
        "02-ä-b-as--c-.png",
        f"03-{'𠀀' * 50}.png",
    ]


class _Recorder:
    """A sink that remembers its calls, and fails or waits where it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.calls: list[tuple[Any, ...]] = []

    def write(self, kind: str, *, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.calls.append((kind, step, epoch, dict(values), threading.current_thread().name))
        if step == self.fail_at:
            raise RuntimeError("the server\nsays no")

    def show_mistakes(self, mistakes: Sequence[Mistake], *, step: int) -> None:
        self.calls.append(("mistakes", step))

    def close(self, outcome: str) -> None:
        self.calls.append((outcome,))


def test_calls_arrive_in_order_in_a_thread() -> None:
    recorder = _Recorder()
    sink = BackgroundSink(lambda: recorder)
    sink.write("step", step=1, epoch=1, values={"loss": 1.0})
    sink.show_mistakes([], step=1)
    sink.close("finished")
    assert recorder.calls == [("step", 1, 1, {"loss": 1.0}, "sink"), ("mistakes", 1), ("finished",)]


def test_a_service_that_fails_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training and the other sinks go on."""
    recorders = {"wandb": _Recorder(fail_at=45), "mlflow": _Recorder()}
    monkeypatch.setattr(fan_out, "_open_service", lambda name, run: recorders[name])
    printed: list[str] = []
    with opened(tmp_path, "wandb", "mlflow", log=printed.append) as sinks:
        write_epochs(sinks, 1)
        until = time.monotonic() + 60
        while not printed and time.monotonic() < until:
            write_epochs(sinks, 2)
            time.sleep(0.01)
    assert printed == ["warning: --log-to wandb failed: the server says no; the training continues without it"]
    assert [call[1] for call in recorders["wandb"].calls] == [45]
    assert recorders["mlflow"].calls[-1] == ("finished",)
    assert recorders["mlflow"].calls[1][1] == 90


def test_a_service_that_cannot_be_opened_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, run: object) -> None:
        raise SystemExit("not logged in")

    monkeypatch.setattr(fan_out, "_open_service", refuse)
    printed: list[str] = []
    with opened(tmp_path, "wandb", log=printed.append):
        pass
    assert printed == ["warning: --log-to wandb failed: not logged in; the training continues without it"]


def test_a_service_that_never_answers_delays_the_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CLOSE_TIMEOUT_S", {"finished": 0.1})
    monkeypatch.setattr(background, "MAX_WAITING", 5)
    answers = threading.Event()

    def open_slowly() -> _Recorder:
        answers.wait(PATIENCE_S)
        return _Recorder()

    sink = BackgroundSink(open_slowly)
    for step in range(5):
        sink.write("step", step=step, epoch=1, values={})
    with pytest.raises(SinkFailure, match="5 metrics wait to be written"):
        sink.write("step", step=5, epoch=1, values={})
    with pytest.raises(SinkFailure, match="not all metrics were written within 0 s"):
        sink.close("finished")
    answers.set()


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(("wandb", "mlflow"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--log-to mlflow needs the package mlflow: pip install '\.\[mlflow\]' in"):
        check_installed(("mlflow",))
