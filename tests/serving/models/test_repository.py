"""The repository as its readers see it: what is ready, what is not and why. No request is lost during a change."""

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from serving.config import ServeConfig
from serving.errors import Cancelled, DeadlineExceeded, Internal, InvalidArgument, NotFound, StartupError, Unavailable
from serving.inference.batcher import BatcherClosed
from serving.models import folder as folder_module
from serving.models import repository as repository_module
from serving.models import versions as versions_module
from serving.models.changes import Caller
from serving.models.loader import LoadSettings, load_version
from serving.models.repository import IndexEntry, Repository
from tests.serving.model_files import SCALE_CONFIG, scale, write_config, write_version
from tests.serving.models.one_row import OneRow

TIMEOUT_S = 60
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
    """Returns the factor that the model multiplies by. Retries, as the service does, if the version is replaced."""
    while True:
        job = OneRow(X)
        try:
            repository.get(name, version).batcher.submit(job)
        except BatcherClosed:
            continue
        assert job.answered.wait(TIMEOUT_S)
        return job.outputs[0][0][0]


def eventually(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_every_model_is_served_at_its_newest_version(models, open_repository):
    repository = open_repository(models)
    assert (ask(repository, "a"), ask(repository, "b"), ask(repository, "b", "2")) == (1, 2, 2)
    assert repository.is_ready()
    assert [(model.spec.name, model.version) for model in repository.ready_models()] == [("a", "1"), ("b", "2")]
    assert repository.index(ready_only=True) == [IndexEntry("a", "1", "READY", ""), IndexEntry("b", "2", "READY", "")]


def test_versions_are_sorted_by_number(models, open_repository):
    write_version(models / "b", 10, scale(10))
    write_config(models / "b", SCALE_CONFIG + "version_policy { all { } }")
    repository = open_repository(models)
    assert repository.versions("b") == ["1", "2", "10"]
    assert [ask(repository, "b", version) for version in ("", "1", "2", "10", "02")] == [10, 1, 2, 10, 2]
    with pytest.raises(NotFound, match="unknown model 'c': this server has a, b"):
        repository.versions("c")


def test_errors_name_the_missing_model_or_version(models, open_repository):
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
        with pytest.raises(InvalidArgument, match="of model 'b' is not a number"):
            repository.get("b", version)


def test_before_the_first_scan_no_model_is_unknown(models, open_repository):
    """Clients of several servers try again after UNAVAILABLE, and not after NOT_FOUND."""
    for name in ("a", "c"):
        with pytest.raises(Unavailable, match=f"model '{name}' is not ready: the server is starting"):
            Repository(models, LoadSettings(device="cpu", num_threads=1)).get(name)
    with pytest.raises(NotFound, match="unknown model 'c': this server has a, b"):
        open_repository(models).get("c")


@pytest.mark.parametrize("name", ["", ".", "..", "../models/a", "a/1", "/etc", "a\0", ".staging", "A", "x" * 100_000])
def test_reading_never_touches_the_file_system(models, open_repository, monkeypatch, name):
    repository = open_repository(models)

    def touched(*arguments):
        raise AssertionError("the file system was read")

    for function in ("scandir", "stat", "lstat", "open"):
        monkeypatch.setattr(os, function, touched)
    with pytest.raises(NotFound) as caught:
        repository.get(name)
    assert len(str(caught.value)) < 200
    monkeypatch.undo()


# ---- the start -------------------------------------------------------------------------------------------------------


def check(path, **arguments):
    Repository(path, LoadSettings(**arguments.pop("settings", {})), **arguments).check()


def test_a_start_that_cannot_succeed_is_reported_in_one_line(tmp_path, models, monkeypatch):
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
def test_poll_and_explicit_accept_an_empty_repository(tmp_path, mode, caplog):
    check(tmp_path, mode=mode)
    assert (f"no model in {tmp_path} yet" in caplog.text) is (mode == "poll")


def test_the_command_line_s_settings_reach_the_models(models):
    repository = Repository.from_config(
        ServeConfig(model_repository=models, device="cpu", num_threads=1, max_queue_size=3)
    )
    repository.start()
    try:
        assert repository.get("a").batcher._limits.max_queue_size == 3
    finally:
        repository.close()


def test_listeners_see_each_step_of_the_start(models, open_repository):
    repository = Repository(models, LoadSettings(device="cpu", num_threads=1, num_loads=1))
    seen = []
    answers = []

    def record():
        seen.append((repository.is_ready(), [entry.state for entry in repository.index(False)]))
        with contextlib.suppress(Unavailable):
            answers.append(repository.get("b"))

    repository.subscribe(record)
    generation = repository.generation
    repository.start()
    assert seen[0] == (False, ["LOADING", "LOADING"])
    assert (False, ["READY", "LOADING"]) in seen
    assert seen[-1] == (True, ["READY", "READY"])
    assert answers, "a model that is loading must be Unavailable, not NotFound"
    assert repository.generation > generation
    repository.close()
    assert seen[-1] == (False, ["UNAVAILABLE", "UNAVAILABLE"])
    with pytest.raises(Unavailable, match="model 'a' is not ready: the server is shutting down"):
        repository.get("a")


def test_a_failing_listener_does_no_harm(models, open_repository, caplog):
    repository = Repository(models, LoadSettings(device="cpu", num_threads=1))
    repository.subscribe(lambda: 1 / 0)
    repository.start()
    assert repository.is_ready()
    repository.close()
    assert "a listener of the repository failed" in caplog.text


def test_close_stops_the_loading_of_further_models(models):
    repository = Repository(models, LoadSettings(device="cpu", num_threads=1))
    closing = threading.Thread(target=repository.close)

    def close_once():
        if not closing.ident:
            closing.start()
            eventually(repository._closing.is_set)

    repository.subscribe(close_once)
    repository.start()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert repository.ready_models() == []


# ---- models that hang ------------------------------------------------------------------------------------------------


@pytest.fixture
def hang(monkeypatch):
    """Makes the loading of a model hang until the end of the test."""
    free = threading.Event()

    def hang_of(name):
        began = threading.Event()

        def load(folder, version, config, settings):
            if folder.name == name:
                began.set()
                free.wait(TIMEOUT_S)
            return load_version(folder, version, config, settings)

        monkeypatch.setattr(versions_module, "load_version", load)
        return began

    monkeypatch.setattr(repository_module, "_CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(repository_module, "_POLL_PATIENCE_S", 0.1)
    monkeypatch.setattr(repository_module, "LOAD_PATIENCE_S", 0.1)
    yield hang_of
    free.set()


def test_a_model_that_hangs_at_the_start_holds_up_no_other(models, hang):
    hang("a")
    repository = Repository(models, LoadSettings(device="cpu", num_threads=1), mode="poll", poll_interval_s=0.02)
    starting = threading.Thread(target=repository.start, daemon=True)
    starting.start()
    eventually(lambda: repository.index(ready_only=True) == [IndexEntry("b", "2", "READY", "")])
    assert (ask(repository, "b"), repository.is_ready()) == (2, False)
    write_version(models / "b", 3, scale(3), manifest={})
    eventually(lambda: ask(repository, "b") == 3)
    began = time.monotonic()
    repository.close()
    assert time.monotonic() - began < 10
    assert repository.ready_models() == []


def test_a_load_that_hangs_holds_up_no_other(models, open_repository, hang):
    repository = open_repository(models, mode="explicit")
    began = hang("a")
    errors = []

    def load():
        try:
            repository.load("a", caller=within(1))
        except DeadlineExceeded as error:
            errors.append(str(error))

    loading = threading.Thread(target=load)
    loading.start()
    assert began.wait(TIMEOUT_S)
    repository.load("b")
    assert ask(repository, "b") == 2
    repository.unload("b")
    with pytest.raises(DeadlineExceeded, match="the change of model 'a' waits for another change"):
        repository.load("a", caller=within(0.1))
    loading.join(TIMEOUT_S)
    assert errors == ["the deadline has passed: the change of model 'a' goes on; the index will show its result"]
    with pytest.raises(Unavailable, match="model 'a' is not ready: loading"):
        repository.get("a")


def within(seconds):
    return Caller(deadline=time.monotonic() + seconds)


def test_a_load_whose_caller_has_gone_is_not_made(models, open_repository):
    repository = open_repository(models, mode="explicit")
    with pytest.raises(Cancelled, match="the caller has gone: the change of model 'a' was not started"):
        repository.load("a", caller=Caller(is_cancelled=lambda: True))
    assert repository.index(False)[0] == IndexEntry("a", "", "UNAVAILABLE", "not loaded")


# ---- what cannot be read is not taken for absent ---------------------------------------------------------------------


def test_an_unreadable_repository_keeps_serving(models, open_repository, broken, caplog):
    caplog.set_level("INFO")
    repository = open_repository(models, mode="poll", poll_interval_s=0.01)
    reason = "the repository cannot be read: Stale file handle"
    broken[models] = errno.ESTALE
    eventually(lambda: repository.index(False)[0].reason == reason)
    broken[models] = errno.ESTALE
    time.sleep(0.1)
    assert (ask(repository, "a"), ask(repository, "b"), repository.is_ready()) == (1, 2, True)
    assert [(entry.state, entry.reason) for entry in repository.index(False)] == [("READY", reason)] * 2
    broken.clear()
    eventually(lambda: repository.index(False)[0].reason == "")
    write_version(models / "a", 2, scale(2), manifest={})
    eventually(lambda: ask(repository, "a") == 2)
    assert caplog.text.count(f"{reason}; the models that serve keep serving") == 1
    assert caplog.text.count("the repository can be read again") == 1


@pytest.mark.parametrize("fault", ["gone", "file", "link to nothing", "another file system"])
def test_a_repository_that_goes_away_keeps_serving(models, open_repository, monkeypatch, fault):
    repository = open_repository(models, mode="poll", poll_interval_s=0.01)
    models.rename(models.parent / "away")
    if fault == "file":
        models.touch()
    elif fault == "link to nothing":
        os.symlink("nowhere", models)
    elif fault == "another file system":  # what is left of a mount
        models.mkdir()
        real = folder_module.scan_repository
        monkeypatch.setattr(folder_module, "scan_repository", lambda path: replace(real(path), device=-1))
    eventually(lambda: "the repository cannot be read" in repository.index(False)[0].reason)
    time.sleep(0.1)
    assert (ask(repository, "a"), repository.is_ready(), len(repository.ready_models())) == (1, True, 2)


def test_an_unreadable_model_is_required_and_loaded_later(models, open_repository, broken):
    broken[models / "a"] = errno.EACCES
    repository = open_repository(models, mode="poll", poll_interval_s=0.02)
    assert not repository.is_ready()
    assert repository.index(False)[0].reason == "its folder cannot be read: Permission denied"
    assert ask(repository, "b") == 2
    time.sleep(0.1)
    assert not repository.is_ready(), "what is unknown is not removed from what readiness asks for"
    broken.clear()
    eventually(repository.is_ready)
    assert ask(repository, "a") == 1


def test_a_model_that_vanishes_before_the_start_is_still_required(models):
    repository = Repository(models, LoadSettings(device="cpu", num_threads=1), mode="explicit", models=("a", "b"))
    repository.check()
    (models / "b").rename(models.parent / "away")
    repository.start()
    assert (ask(repository, "a"), repository.is_ready()) == (1, False)
    assert repository.index(False)[1] == IndexEntry("b", "", "UNAVAILABLE", "its folder is gone")
    repository.close()


def test_an_unreadable_model_cannot_be_loaded_but_is_not_unknown(models, open_repository, broken):
    repository = open_repository(models, mode="explicit", models=("a",))
    broken[models / "a"] = errno.EIO
    with pytest.raises(Internal, match="failed to load 'a', its folder cannot be read: Input/output error"):
        repository.load("a")
    assert (ask(repository, "a"), repository.is_ready()) == (1, True)
    write_version(models / "new", 1, scale(1))
    broken[models / "new"] = errno.EIO
    with pytest.raises(Unavailable, match="model 'new' cannot be read in the repository: Input/output error"):
        repository.load("new")
    models.rename(models.parent / "away")
    with pytest.raises(Unavailable, match="model 'newer' cannot be read in the repository: No such file"):
        repository.load("newer")


@pytest.mark.parametrize("name", ["\\udc80", "\\ud800"])
def test_a_reason_can_be_sent_whatever_a_file_contains(models, open_repository, name):
    (models / "a/1/manifest.json").write_text(f'{{"files": {{"{name}": {{"sha256": "0"}}}}}}')
    repository = open_repository(models)
    (reason,) = [entry.reason for entry in repository.index(False) if entry.name == "a"]
    assert reason.encode().startswith(b"manifest.json")


def test_an_error_while_polling_does_not_end_it(models, open_repository, monkeypatch, caplog):
    repository = open_repository(models, mode="poll", poll_interval_s=0.01)
    monkeypatch.setattr(repository._folder, "scan", lambda: 1 / 0)
    eventually(lambda: "the repository could not be polled" in caplog.text)
    monkeypatch.undo()
    write_version(models / "a", 2, scale(2), manifest={})
    eventually(lambda: ask(repository, "a") == 2)


def test_an_editor_s_lock_hides_no_change_of_the_configuration(models, open_repository):
    os.symlink("user@host.4711:1", models / "a/.#config.pbtxt")
    os.symlink("nowhere", models / "a/link.txt")
    repository = open_repository(models, mode="explicit", models=("a",))
    write_config(models / "a", SCALE_CONFIG.replace("max_batch_size: 4", "max_batch_size: 2"))
    repository.load("a")
    assert repository.get("a").spec.max_batch_size == 2


# ---- explicit --------------------------------------------------------------------------------------------------------


def test_unloading_a_model_that_failed_changes_readiness_and_tells(models, open_repository):
    write_version(models / "broken", 1, b"no model")
    repository = open_repository(models, mode="explicit", models=("a", "broken"))
    seen = []
    repository.subscribe(lambda: seen.append((repository.generation, repository.is_ready())))
    generation = repository.generation
    repository.unload("broken")
    assert repository.generation > generation
    assert seen[-1] == (repository.generation, True), "the generation has grown when listeners are called"


def test_a_client_s_configuration_is_bounded(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("a",))
    before, index = repository.get("a"), repository.index(False)
    for name in ("a", "b"):
        with pytest.raises(InvalidArgument, match="'config' asks for 10000 as instances on one device: at most"):
            repository.load(name, '{"instance_group": [{"count": 10000}]}')
    assert (repository.get("a"), repository.index(False)) == (before, index)
    write_config(models / "a", SCALE_CONFIG.replace("max_batch_size: 4", "max_batch_size: 5000"))
    repository.load("a", '{"max_batch_size": 5000}')
    assert repository.get("a").spec.max_batch_size == 5000, "the operator's file allows as much"


def test_explicit_loads_only_the_initial_models(models, open_repository):
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
    assert repository.is_ready(), "a removed model must not make the server unready"
    assert repository.versions("a") == []
    with pytest.raises(Unavailable, match="version 1 of model 'a' is not ready: unloaded"):
        repository.get("a", "1")
    repository.unload("a")
    repository.load("a")
    assert ask(repository, "a") == 1


def test_load_updates_a_model(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("a",))
    before = repository.get("a")
    repository.load("a")
    assert repository.get("a") is before, "nothing has changed"
    write_version(models / "a", 2, scale(2))
    repository.load("a")
    assert (ask(repository, "a"), repository.versions("a")) == (2, ["2"])


def test_load_with_a_configuration(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("b",))
    repository.load("b", json.dumps({"versionPolicy": {"all": {}}, "maxBatchSize": 2}))
    assert repository.versions("b") == ["1", "2"]
    assert repository.get("b").spec.max_batch_size == 2
    repository.load("b")
    assert (repository.versions("b"), repository.get("b").spec.max_batch_size) == (["2"], 4)


def test_a_failed_load_gives_the_reason_and_the_serving_version_stays(models, open_repository):
    repository = open_repository(models, mode="explicit", models=("a",))
    write_version(models / "a", 2, b"no model")
    for _ in range(2):
        with pytest.raises(Internal, match=r"^failed to load 'a', version 2: ONNX Runtime cannot load"):
            repository.load("a")
    for config, reason in (
        ('{"ensemble_scheduling": {}}', "'ensemble_scheduling' in the configuration is not supported"),
        ('{"maxBatchSize": -1, "input": [{"name": "x"}], "output": [{"name": "y"}]}', "max_batch_size must not be"),
        ('{"backend": "nosuch"}', "failed to load 'a', .*backend 'nosuch' is not supported"),
    ):
        with pytest.raises(InvalidArgument, match=reason):
            repository.load("a", config)
    assert ask(repository, "a") == 1
    assert repository.is_ready()


@pytest.mark.parametrize("name", ["", "..", "../models/a", "/etc", "a/1", ".hidden", "a\0"])
def test_load_and_unload_reject_paths(models, open_repository, name):
    repository = open_repository(models, mode="explicit")
    for change in (repository.load, repository.unload):
        with pytest.raises(InvalidArgument, match="is not a valid model name"):
            change(name)


def test_load_and_unload_reject_unknown_models(models, open_repository):
    repository = open_repository(models, mode="explicit")
    for change in (repository.load, repository.unload):
        with pytest.raises(NotFound, match="there is no model 'c' in the repository"):
            change("c")
    for config in ("no json", '{"name": "other"}'):
        with pytest.raises(InvalidArgument):
            repository.load("a", config)


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_load_and_unload_need_explicit_mode(models, open_repository, mode):
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
    assert repository.is_ready(), "a removed model must not make the server unready"


def test_a_broken_newcomer_does_not_make_the_server_unready(models, open_repository):
    repository = open_repository(models, mode="poll", poll_interval_s=0.02)
    write_version(models / "new", 1, b"no model", manifest={})
    write_version(models / "a", 2, b"no model", manifest={})
    eventually(lambda: [entry.state for entry in repository.index(False)].count("UNAVAILABLE") == 2)
    assert repository.is_ready()
    assert ask(repository, "a") == 1


@pytest.mark.parametrize("mode", ["poll", "none"])
def test_only_polling_tries_again_what_may_pass(models, open_repository, monkeypatch, mode):
    attempts = []

    def load(folder, version, config, settings):
        attempts.append(folder.name)
        if attempts.count("a") < 4 and folder.name == "a":
            raise MemoryError("no room")
        return load_version(folder, version, config, settings)

    monkeypatch.setattr(versions_module, "load_version", load)
    repository = open_repository(models, mode=mode, poll_interval_s=0.01)
    if mode == "poll":
        eventually(repository.is_ready)
        assert attempts.count("a") == 4
    else:
        time.sleep(0.1)
        assert attempts.count("a") == 1
        assert [entry.reason for entry in repository.index(False)] == ["MemoryError: no room", ""]


def test_polling_without_changes_changes_nothing(models, open_repository):
    repository = open_repository(models, mode="poll", poll_interval_s=0.01)
    scans = []
    update = repository._poll_model
    repository._poll_model = lambda name: (update(name), scans.append(name))
    before = (repository.generation, repository.get("a"), repository.get("b"))
    eventually(lambda: len(scans) > 10)
    assert (repository.generation, repository.get("a"), repository.get("b")) == before


def test_no_request_is_lost_while_versions_are_swapped(models, open_repository):
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
            thread.join(TIMEOUT_S)
    assert errors == []
    assert set(answers) <= {1, 2, 3, 4, 5, 6, 7, 70}
    assert {1, 7, 70} <= set(answers)


def test_unload_under_load_answers_every_accepted_request(models, open_repository):
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
            job.answered.wait(TIMEOUT_S)

    threads = [threading.Thread(target=keep_submitting) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(taken) > 20)
    repository.unload("a")
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert refused.is_set()
    assert all(job.answered.is_set() and job.outputs == [[[1, 1, 1]]] for job in taken)


def test_a_load_whose_versions_do_not_exist_keeps_what_serves(models, open_repository):
    repository = open_repository(models, mode="explicit", models=["b"])
    override = '{"version_policy": {"specific": {"versions": [7]}}}'
    with pytest.raises(InvalidArgument, match=r"^failed to load 'b', version 7: .* no folder$"):
        repository.load("b", override)
    assert ask(repository, "b") == 2
    assert repository.is_ready()
    assert [entry.version for entry in repository.index(ready_only=False) if entry.name == "b"] == ["2"]


@pytest.mark.parametrize(("num_loads", "mode"), [(1, "none"), (4, "none"), (4, "poll")])
def test_models_load_side_by_side_at_the_start_and_on_poll(tmp_path, monkeypatch, num_loads, mode):
    """Slow to open, as from a disk: four at a time take a quarter of the time."""
    inside, most = [], []

    def load(folder, version, config, settings):
        inside.append(folder.name)
        most.append(len(inside))
        time.sleep(0.05)
        inside.remove(folder.name)
        return load_version(folder, version, config, settings)

    monkeypatch.setattr(versions_module, "load_version", load)
    names = [f"m{number}" for number in range(8)]
    for name in names if mode == "none" else names[:1]:
        write_config(tmp_path / name, SCALE_CONFIG)
        write_version(tmp_path / name, 1, scale(1), manifest={})
    settings = LoadSettings(device="cpu", num_threads=1, num_loads=num_loads)
    repository = Repository(tmp_path, settings, mode=mode, poll_interval_s=0.02)
    try:
        repository.start()
        for name in names[1:] if mode == "poll" else []:
            write_config(tmp_path / name, SCALE_CONFIG)
            write_version(tmp_path / name, 1, scale(1), manifest={})
        eventually(lambda: len(repository.ready_models()) == len(names))
        assert max(most) == num_loads if mode == "none" else max(most) > 1
    finally:
        repository.close()
