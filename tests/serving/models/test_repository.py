"""The repository as its callers see it: what is ready, what is not and why, and no request lost in between."""

import contextlib
import json
import shutil
import threading
import time

import numpy as np
import pytest

from serving.config import ServeConfig
from serving.errors import Internal, InvalidArgument, NotFound, StartupError, Unavailable
from serving.inference.batcher import BatcherClosed
from serving.models import repository as repository_module
from serving.models.loader import LoadSettings
from serving.models.repository import IndexEntry, Repository
from tests.serving.model_files import SCALE_CONFIG, scale, write_config, write_version
from tests.serving.test_loading import OneRow

PATIENCE_S = 60
X = np.ones((1, 3), np.float32)


@pytest.fixture
def models(tmp_path):
    """A repository of `a`, version 1, and `b`, versions 1 and 2."""
    for name, versions in (("a", [1]), ("b", [1, 2])):
        write_config(tmp_path / "models" / name, SCALE_CONFIG)
        for version in versions:
            write_version(tmp_path / "models" / name, version, scale(version))
    return tmp_path / "models"


@pytest.fixture
def open_repository():
    opened = []

    def open_it(path, **arguments):
        repository = Repository(path, LoadSettings(device="cpu", num_threads=1), **arguments)
        opened.append(repository)
        repository.check()
        repository.start()
        return repository

    yield open_it
    for repository in opened:
        repository.close()


def ask(repository, name, version=""):
    """The factor that the model multiplies by; as the service does it when a version is replaced meanwhile."""
    while True:
        job = OneRow(X)
        try:
            repository.get(name, version).batcher.submit(job)
        except BatcherClosed:
            continue
        assert job.answered.wait(PATIENCE_S)
        return job.outputs[0][0][0]


def eventually(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.01)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_every_model_is_served_at_its_newest_version(models, open_repository):
    repository = open_repository(models)
    assert (ask(repository, "a"), ask(repository, "b"), ask(repository, "b", "2")) == (1, 2, 2)
    assert repository.is_ready()
    assert [(model.spec.name, model.version) for model in repository.ready_models()] == [("a", "1"), ("b", "2")]
    assert repository.index(ready_only=True) == [IndexEntry("a", "1", "READY", ""), IndexEntry("b", "2", "READY", "")]


def test_versions_are_in_the_order_of_their_numbers(models, open_repository):
    write_version(models / "b", 10, scale(10))
    write_config(models / "b", SCALE_CONFIG + "version_policy { all { } }")
    repository = open_repository(models)
    assert repository.versions("b") == ["1", "2", "10"]
    assert [ask(repository, "b", version) for version in ("", "1", "2", "10", "02")] == [10, 1, 2, 10, 2]
    with pytest.raises(NotFound, match="unknown model 'c': this server has a, b"):
        repository.versions("c")


def test_what_is_not_there_has_a_name_and_a_status(models, open_repository):
    write_version(models / "broken", 3, b"no model")
    repository = open_repository(models)
    assert not repository.is_ready()
    with pytest.raises(NotFound, match="unknown model 'c': this server has a, b, broken"):
        repository.get("c")
    with pytest.raises(NotFound, match="model 'b' has no version 7: it has 2"):
        repository.get("b", "7")
    with pytest.raises(NotFound, match="model 'broken' has no available versions: ONNX Runtime cannot load"):
        repository.get("broken")
    with pytest.raises(Unavailable, match="version 3 of model 'broken' is not ready: ONNX Runtime cannot load"):
        repository.get("broken", "3")
    for version in ("latest", "-1", "1.0", "²", "9" * 5000):
        with pytest.raises(InvalidArgument, match="of model 'b' is no number"):
            repository.get("b", version)


@pytest.mark.parametrize("name", ["", ".", "..", "../models/a", "a/1", "/etc", "a\0", ".staging", "A", "x" * 100_000])
def test_names_are_looked_up_and_never_followed(models, open_repository, monkeypatch, name):
    repository = open_repository(models)

    def touched(*arguments):
        raise AssertionError("the file system was asked")

    for function in ("model_names", "has_model"):
        monkeypatch.setattr(repository_module, function, touched)
    with pytest.raises(NotFound) as caught:
        repository.get(name)
    assert len(str(caught.value)) < 200
    monkeypatch.undo()


# ---- the start -------------------------------------------------------------------------------------------------------


def check(path, **arguments):
    Repository(path, LoadSettings(**arguments.pop("settings", {})), **arguments).check()


def test_a_start_that_cannot_succeed_is_one_line(tmp_path, models, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StartupError, match="there is no model repository"):
        check(tmp_path / "gone")
    with pytest.raises(StartupError, match=r"no model in .*/empty: a model is a folder with folders named 1, 2"):
        check(tmp_path / "empty")
    with pytest.raises(StartupError, match=r"no model 'c' in .*/models, which has a, b"):
        check(models, mode="explicit", models=("a", "c"))
    monkeypatch.setattr(repository_module, "count_gpus", lambda: 0)
    with pytest.raises(StartupError, match="--device cuda, but there is no CUDA device"):
        check(models, settings={"device": "cuda"})


@pytest.mark.parametrize("mode", ["poll", "explicit"])
def test_an_empty_repository_may_fill_later(tmp_path, mode, caplog):
    check(tmp_path, mode=mode)
    assert (f"no model in {tmp_path} yet" in caplog.text) is (mode == "poll")


def test_the_command_line_reaches_the_models(models):
    repository = Repository.from_config(
        ServeConfig(model_repository=models, device="cpu", num_threads=1, max_queue_size=3)
    )
    repository.start()
    try:
        assert repository.get("a").batcher._limits.max_queue_size == 3
    finally:
        repository.close()


def test_readiness_and_listeners_follow_the_start(models, open_repository):
    repository = Repository(models, LoadSettings(device="cpu", num_threads=1))
    seen = []
    answers = []

    def look():
        seen.append((repository.is_ready(), [entry.state for entry in repository.index(False)]))
        with contextlib.suppress(Unavailable):
            answers.append(repository.get("b"))

    repository.subscribe(look)
    generation = repository.generation
    repository.start()
    assert seen[0] == (False, ["LOADING", "LOADING"])
    assert (False, ["READY", "LOADING"]) in seen
    assert seen[-1] == (True, ["READY", "READY"])
    assert answers, "NotFound is no answer to who asks for a model that is being loaded"
    assert repository.generation > generation
    repository.close()
    assert seen[-1] == (False, ["UNAVAILABLE", "UNAVAILABLE"])
    with pytest.raises(Unavailable, match="model 'a' is not ready: the server is leaving"):
        repository.get("a")


def test_a_listener_that_fails_harms_nothing(models, open_repository, caplog):
    repository = Repository(models, LoadSettings(device="cpu", num_threads=1))
    repository.subscribe(lambda: 1 / 0)
    repository.start()
    assert repository.is_ready()
    repository.close()
    assert "a listener of the repository failed" in caplog.text


def test_leaving_while_models_are_being_loaded_loads_no_more(models):
    repository = Repository(models, LoadSettings(device="cpu", num_threads=1))
    leaving = threading.Thread(target=repository.close)

    def leave():
        if not leaving.ident:
            leaving.start()
            eventually(repository._leaving.is_set)

    repository.subscribe(leave)
    repository.start()
    leaving.join(PATIENCE_S)
    assert not leaving.is_alive()
    assert repository.ready_models() == []


# ---- explicit --------------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_loaded(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("a",))
    assert repository.is_ready()
    assert repository.index(False) == [
        IndexEntry("a", "1", "READY", ""),
        IndexEntry("b", "", "UNAVAILABLE", "not loaded"),
    ]
    with pytest.raises(NotFound, match="model 'b' has no available versions: not loaded"):
        repository.get("b")
    repository.load("b")
    assert ask(repository, "b") == 2


def test_unloading_and_loading_again(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("a", "b"))
    generation = repository.generation
    repository.unload("a")
    assert repository.generation > generation
    assert repository.index(False)[0] == IndexEntry("a", "1", "UNAVAILABLE", "unloaded")
    assert repository.is_ready(), "what was taken away on purpose is not missing"
    assert repository.versions("a") == []
    with pytest.raises(Unavailable, match="version 1 of model 'a' is not ready: unloaded"):
        repository.get("a", "1")
    repository.unload("a")
    repository.load("a")
    assert ask(repository, "a") == 1


def test_loading_brings_a_model_up_to_date(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("a",))
    before = repository.get("a")
    repository.load("a")
    assert repository.get("a") is before, "nothing has changed"
    write_version(models / "a", 2, scale(2))
    repository.load("a")
    assert (ask(repository, "a"), repository.versions("a")) == (2, ["2"])


def test_loading_with_a_configuration(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("b",))
    repository.load("b", json.dumps({"versionPolicy": {"all": {}}, "maxBatchSize": 2}))
    assert repository.versions("b") == ["1", "2"]
    assert repository.get("b").spec.max_batch_size == 2
    repository.load("b")
    assert (repository.versions("b"), repository.get("b").spec.max_batch_size) == (["2"], 4)


def test_a_load_that_fails_says_why_and_what_serves_goes_on(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("a",))
    write_version(models / "a", 2, b"no model")
    for _ in range(2):
        with pytest.raises(Internal, match=r"^failed to load 'a', version 2: ONNX Runtime cannot load"):
            repository.load("a")
    with pytest.raises(Internal, match="'ensemble_scheduling' in the configuration is not supported"):
        repository.load("a", '{"ensemble_scheduling": {}}')
    assert ask(repository, "a") == 1
    assert repository.is_ready()


@pytest.mark.parametrize("name", ["", "..", "../models/a", "/etc", "a/1", ".hidden", "a\0"])
def test_names_that_lead_elsewhere_are_refused(models, open_repository, name):
    repository = open_repository(models, mode="explicit")
    for change in (repository.load, repository.unload):
        with pytest.raises(InvalidArgument, match="is no name of a model"):
            change(name)


def test_models_that_do_not_exist_cannot_be_changed(models, open_repository):
    repository = open_repository(models, mode="explicit")
    for change in (repository.load, repository.unload):
        with pytest.raises(NotFound, match="there is no model 'c' in the repository"):
            change("c")
    for config in ("no json", '{"name": "other"}'):
        with pytest.raises(InvalidArgument):
            repository.load("a", config)


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_changes_need_the_explicit_mode(models, open_repository, mode):
    repository = open_repository(models, mode=mode)
    for change in (repository.load, repository.unload):
        with pytest.raises(Unavailable, match=f"need --model-control-mode explicit; this server has {mode}"):
            change("a")


# ---- poll ------------------------------------------------------------------------------------------------------------


def test_polling_follows_the_folder(models, open_repository):
    repository = open_repository(models, mode="poll", poll_interval_s=0.02)
    write_version(models / "a", 2, scale(2), manifest={})
    eventually(lambda: repository.versions("a") == ["2"])
    write_version(models / "new", 1, scale(7))
    eventually(lambda: any(entry.name == "new" and entry.state == "READY" for entry in repository.index(False)))
    assert (ask(repository, "a"), ask(repository, "new")) == (2, 7)
    shutil.rmtree(models / "b")
    eventually(lambda: all(entry.name != "b" for entry in repository.index(False)))
    with pytest.raises(NotFound, match="unknown model 'b'"):
        repository.get("b")
    assert repository.is_ready(), "what was taken away on purpose is not missing"


def test_a_broken_newcomer_does_not_make_the_server_unready(models, open_repository):
    repository = open_repository(models, mode="poll", poll_interval_s=0.02)
    write_version(models / "new", 1, b"no model", manifest={})
    write_version(models / "a", 2, b"no model", manifest={})
    eventually(lambda: [entry.state for entry in repository.index(False)].count("UNAVAILABLE") == 2)
    assert repository.is_ready()
    assert ask(repository, "a") == 1


def test_polling_in_peace_changes_nothing(models, open_repository):
    repository = open_repository(models, mode="poll", poll_interval_s=0.01)
    scans = []
    update = repository._follow
    repository._follow = lambda name: (update(name), scans.append(name))
    before = (repository.generation, repository.get("a"), repository.get("b"))
    eventually(lambda: len(scans) > 10)
    assert (repository.generation, repository.get("a"), repository.get("b")) == before


def test_none_of_the_requests_is_lost_while_versions_are_swapped(models, open_repository):
    repository = open_repository(models, mode="poll", poll_interval_s=0.01)
    answers, errors = [], []
    done = threading.Event()

    def keep_asking():
        while not done.is_set():
            try:
                answers.append(ask(repository, "a"))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for version in range(2, 8):
            write_version(models / "a", version, scale(version), manifest={})
            eventually(lambda version=version: repository.get("a").version == str(version))
        write_version(models / "a", 7, scale(70), manifest={})
        eventually(lambda: 70 in answers[-4:])
    finally:
        done.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert errors == []
    assert set(answers) <= {1, 2, 3, 4, 5, 6, 7, 70}
    assert {1, 7, 70} <= set(answers)


def test_unloading_under_load_answers_everything_that_was_taken(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("a",))
    taken, refused = [], threading.Event()

    def keep_submitting():
        while True:
            job = OneRow(X)
            try:
                repository.get("a").batcher.submit(job)
            except (BatcherClosed, NotFound):
                refused.set()
                return
            taken.append(job)
            job.answered.wait(PATIENCE_S)

    threads = [threading.Thread(target=keep_submitting) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(taken) > 20)
    repository.unload("a")
    for thread in threads:
        thread.join(PATIENCE_S)
    assert refused.is_set()
    assert all(job.answered.is_set() and job.outputs == [[[1, 1, 1]]] for job in taken)
