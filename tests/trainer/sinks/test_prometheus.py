"""The page for Prometheus: what it shows, when, and that a port in use ends no training."""

import os
import socket
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import free_port, wait_for
from tests.trainer.sinks.sink_runs import run_folder
from trainer.sinks import open_sinks
from trainer.sinks.prometheus import FIGURES, NAMES


def scrape(port: int) -> dict[str, float]:
    """Returns the value of each metric; all have the run's name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"run"}
    return {sample.name: sample.value for sample in samples}


def is_open(port: int) -> bool:
    with socket.socket() as one:
        one.bind(("127.0.0.2", 0))  # one that gets the port itself as its own would connect to itself
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_the_page_shows_the_newest_figures_while_the_run_trains(tmp_path: Path) -> None:
    port, folder = free_port(), run_folder(tmp_path / "run")
    checkpoint = folder.path / "checkpoints/step-00000045"
    checkpoint.mkdir(parents=True)
    os.utime(checkpoint, (1e9, 1e9))
    address = f"127.0.0.1:{port}"
    with open_sinks(folder, (), steps=(45, 450), is_main=True, log=pytest.fail, metrics_address=address) as sinks:
        wait_for("the page", lambda: is_open(port))
        first = scrape(port)
        assert (first["convoy_training_step"], first["convoy_training_num_steps"]) == (45, 450)
        assert first["convoy_training_last_checkpoint_timestamp_seconds"] == 1e9
        assert "convoy_training_validation_accuracy" not in first
        assert not any(name in first for name, _ in FIGURES.values())
        foreign = urllib.request.Request(f"http://{address}/metrics", headers={"Host": f"evil.example:{port}"})
        with pytest.raises(HTTPError, match="403"):
            urllib.request.urlopen(foreign, timeout=30)
        figures = {"loss": 0.5, "accuracy": 0.75, "lr_factor": 1.0, "images_per_second": 1e3, "seconds": 2.0}
        sinks.write("step", step=50, epoch=2, **figures)
        sinks.write("epoch", step=90, epoch=2, train_loss=0.4, val_loss=0.6, val_accuracy=0.7)
        wait_for("the epoch", lambda: scrape(port)["convoy_training_step"] == 90)
        last = scrape(port)
    assert last.keys() == NAMES
    assert last["convoy_training_loss"] == 0.5
    assert last["convoy_training_validation_accuracy"] == 0.7
    assert (
        last["convoy_training_last_progress_timestamp_seconds"]
        >= first["convoy_training_last_progress_timestamp_seconds"]
    )
    assert not is_open(port)


def test_a_port_in_use_is_one_warning_and_the_training_continues(tmp_path: Path) -> None:
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with open_sinks(
            run_folder(tmp_path), (), steps=(0, 450), is_main=True, log=lines.append, metrics_address=address
        ) as sinks:
            for step in range(1000):
                sinks.write("step", step=step, epoch=1, loss=1.0)
    assert len(lines) == 1
    assert lines[0].startswith("warning: --metrics-address failed: ")
    assert lines[0].endswith("; the training continues without it")


def test_other_ranks_open_no_port(tmp_path: Path) -> None:
    port = free_port()
    with open_sinks(
        run_folder(tmp_path), (), steps=(0, 450), is_main=False, log=pytest.fail, metrics_address=f"127.0.0.1:{port}"
    ) as sinks:
        sinks.write("step", step=1, epoch=1, loss=1.0)
        assert not is_open(port)
