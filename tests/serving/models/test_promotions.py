"""Versions are promoted, pinned and rolled back while they serve; what does not load, or cannot be written, changes
nothing."""

import errno
import json
import logging
import os
import shutil

import pytest

from convoy.promotion import PROMOTION_FILE, pin, read_promotion, write_promotion
from serving.errors import Internal, InvalidArgument, NotFound, Unavailable
from serving.models import offline
from serving.models.loader import LoadSettings
from serving.models.offline import find_model, list_models
from serving.models.repository import Repository
from serving.models_command import main as models_main
from serving.protocol.control import ControlService
from tests.serving.model_files import SCALE_CONFIG, scale, write_config, write_version
from tests.serving.models.test_repository import ask, eventually


@pytest.fixture
def folder(tmp_path):
    """A model with versions 1, 2 and 3, each of which multiplies by its number."""
    write_config(tmp_path / "models/m", SCALE_CONFIG)
    for version in (1, 2, 3):
        write_version(tmp_path / "models/m", version, scale(version), manifest={})
    return tmp_path / "models/m"


@pytest.fixture
def open_repository(folder):
    opened = []

    def open_it(mode="none", **arguments):
        settings = LoadSettings(device="cpu", num_threads=1)
        repository = Repository(folder.parent, settings, mode=mode, poll_interval_s=0.02, **arguments)
        opened.append(repository)
        repository.start()
        return repository

    yield open_it
    for repository in opened:
        repository.close()


def entries(repository):
    return {int(entry.version): (entry.state, entry.reason) for entry in repository.index(False)}


def test_a_promoted_version_serves_at_once_and_after_a_restart(folder, open_repository, caplog):
    caplog.set_level(logging.INFO)
    repository = open_repository()
    repository.promotions.promote("m", 2)
    assert (ask(repository, "m"), ask(repository, "m", "2")) == (2, 2)
    assert entries(repository) == {2: ("READY", ""), 3: ("UNAVAILABLE", "version 2 is promoted")}
    assert "m: version 2 is promoted (serving.json)" in caplog.text
    assert "m version 3 unloaded: version 2 is promoted" in caplog.text
    assert ask(open_repository(), "m") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "config.pbtxt", PROMOTION_FILE]


def test_a_roll_back_returns_to_what_served_before_and_a_repeated_call_changes_nothing(open_repository, caplog):
    caplog.set_level(logging.INFO)
    repository = open_repository()
    repository.promotions.promote("m", 1)
    repository.promotions.roll_back("m", 1)
    assert ask(repository, "m") == 3
    assert "m version 1 unloaded: rolled back from version 1 to version 3" in caplog.text
    repository.promotions.roll_back("m", 1)
    assert ask(repository, "m") == 3, "a client's retry"
    repository.promotions.roll_back("m")
    assert ask(repository, "m") == 2
    with pytest.raises(InvalidArgument, match="model 'm': version 2 serves, not 1"):
        repository.promotions.roll_back("m", 1)
    repository.promotions.roll_back("m")
    with pytest.raises(InvalidArgument, match="model 'm': there is no version to roll back to"):
        repository.promotions.roll_back("m")
    assert ask(repository, "m") == 1


def test_a_roll_back_leaves_the_version_that_serves_in_place_of_a_damaged_one(folder, open_repository):
    open_repository().promotions.promote("m", 3)
    good, files = (folder / "3/model.onnx").read_bytes(), folder / "3/model.onnx"
    files.write_bytes(b"no model")
    repository = open_repository()
    assert ask(repository, "m") == 2
    files.write_bytes(good)  # it loads now, but has not served before version 2
    repository.promotions.roll_back("m")
    assert ask(repository, "m") == 1


def test_a_roll_back_skips_versions_that_do_not_load(folder, open_repository):
    repository = open_repository()
    (folder / "2/model.onnx").write_bytes(b"no model")
    repository.promotions.roll_back("m")
    assert ask(repository, "m") == 1


@pytest.mark.parametrize("by", ["server", "folder"])
def test_a_roll_back_skips_versions_that_the_policy_does_not_allow(folder, open_repository, by):
    with (folder / "config.pbtxt").open("a") as config:
        config.write("version_policy { specific { versions: [1, 3] } }")
    repository = open_repository()
    assert ControlService(repository).models("m").models[0].before == 1
    assert find_model(folder.parent, "m").state().before == 1
    if by == "server":
        repository.promotions.roll_back("m")
    else:
        find_model(folder.parent, "m").change("rollback", 0)
        repository.promotions.follow("m")
    assert ask(repository, "m") == 1


@pytest.mark.parametrize("verb", ["promote", "pin"])
def test_a_bad_version_changes_nothing(folder, open_repository, verb):
    repository = open_repository()
    write_version(folder, 4, scale(4), manifest={})  # exported since
    (folder / "2/model.onnx").write_bytes(b"no model")
    with pytest.raises(Internal, match=r"nothing has changed for model 'm': version 2: model\.onnx is damaged"):
        getattr(repository.promotions, verb)("m", 2)
    assert (ask(repository, "m"), read_promotion(folder)) == (3, None)
    with pytest.raises(NotFound, match="model 'm' has no version 7: it has 1, 2, 3, 4"):
        getattr(repository.promotions, verb)("m", 7)
    with pytest.raises(NotFound, match="unknown model 'n': this server has m"):
        getattr(repository.promotions, verb)("n", 1)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "$"),
        (errno.EROFS, r"\. Use 'convoy models' with '--model-repository PATH' where it can be written"),
        (errno.EACCES, r"\. Use 'convoy models' with '--model-repository PATH' where it can be written"),
    ],
)
@pytest.mark.parametrize("verb", ["promote", "pin", "roll_back"])
def test_a_choice_that_cannot_be_written_changes_nothing(folder, open_repository, monkeypatch, verb, number, advice):
    repository = open_repository()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(Internal, match=f"the model repository cannot be written: {os.strerror(number)}{advice}"):
        getattr(repository.promotions, verb)("m", 2 if verb != "roll_back" else 0)
    assert (ask(repository, "m"), read_promotion(folder)) == (3, None)
    assert entries(repository)[2] == ("UNAVAILABLE", "the version policy selects other versions")
    assert not list(folder.glob(".serving*"))


def test_a_version_that_failed_is_no_target_of_a_roll_back_when_a_newer_one_serves(folder, open_repository):
    repository = open_repository("poll")
    for version in (4, 5):
        write_version(folder, version, b"no model", manifest={})
    eventually(lambda: entries(repository).keys() == {3, 4, 5} and entries(repository)[5][1])
    write_version(folder, 5, scale(5), manifest={})
    eventually(lambda: ask(repository, "m") == 5)
    eventually(lambda: entries(repository)[3] == ("UNAVAILABLE", "the version policy selects other versions"))
    assert "ONNX Runtime cannot load" in entries(repository)[4][1]
    assert ControlService(repository).models("m").models[0].before == 3
    write_version(folder, 4, scale(4), manifest={})
    eventually(lambda: entries(repository)[4] == ("UNAVAILABLE", "the version policy selects other versions"))
    assert ControlService(repository).models("m").models[0].before == 4


def test_a_version_that_is_broken_is_loaded_again(folder, open_repository):
    repository = open_repository()
    broken = repository.get("m").batcher
    broken._instances[0].failure = "no device"
    repository.promotions.promote("m", 3)
    assert repository.get("m").batcher is not broken
    assert ask(repository, "m") == 3


def test_a_new_version_takes_over_unless_another_is_pinned(folder, open_repository):
    repository = open_repository("poll")
    repository.promotions.pin("m", 2)
    write_version(folder, 4, scale(4), manifest={})
    eventually(lambda: 4 in repository.standing("m")[1].present)
    assert ask(repository, "m") == 2
    with pytest.raises(InvalidArgument, match="version 2 is pinned: unpin it first, or pin version 4 instead"):
        repository.promotions.promote("m", 4)
    repository.promotions.unpin("m")
    eventually(lambda: ask(repository, "m") == 4)
    repository.promotions.roll_back("m")
    assert ask(repository, "m") == 2
    write_version(folder, 5, scale(5), manifest={})
    eventually(lambda: ask(repository, "m") == 5)


def test_a_running_server_follows_a_choice_in_the_folder(folder, open_repository):
    repository = open_repository("poll")
    model = find_model(folder.parent, "m")
    model.change("promote", 1)
    eventually(lambda: ask(repository, "m") == 1)
    first = repository.get("m")
    find_model(folder.parent, "m").change("pin", 1)
    eventually(lambda: repository.standing("m")[1].promotion.pinned)
    assert repository.get("m") is first, "not loaded again"


def test_a_version_that_is_pinned_in_the_folder_and_does_not_load_replaces_nothing(folder, open_repository):
    repository = open_repository("poll")
    write_version(folder, 2, b"no model", manifest={})
    write_promotion(folder, pin(None, 2, 3, [1, 2, 3]))
    eventually(lambda: "ONNX Runtime cannot load" in entries(repository).get(2, ("", ""))[1])
    assert ask(repository, "m") == 3


def test_a_promoted_version_that_does_not_load_replaces_nothing_and_an_older_one_serves_after_a_restart(
    folder, open_repository
):
    repository = open_repository("poll")
    find_model(folder.parent, "m").change("promote", 2)
    eventually(lambda: ask(repository, "m") == 2)
    write_version(folder, 2, b"no model", manifest={})
    eventually(lambda: "ONNX Runtime cannot load" in entries(repository)[2][1])
    assert ask(repository, "m") == 2, "the loaded files"
    assert ask(open_repository(), "m") == 1, "not 3, which 2 replaced"


def test_an_invalid_file_keeps_what_serves_and_serves_nothing_at_the_start(folder, open_repository):
    repository = open_repository("poll")
    (folder / PROMOTION_FILE).write_text("{")
    eventually(lambda: "serving.json cannot be read" in entries(repository)[3][1])
    assert ask(repository, "m") == 3
    other = open_repository()
    assert not other.is_ready()
    for each, serving in ((repository, 3), (other, 0)):
        (state,) = ControlService(each).models().models
        assert (state.serving, state.before) == (serving, 0)
        assert state.reason.startswith("serving.json cannot be read: it is not JSON")
    with pytest.raises(NotFound, match=r"no available versions: serving\.json cannot be read: it is not JSON"):
        other.get("m")
    with pytest.raises(InvalidArgument, match=r"model 'm': serving\.json cannot be read"):
        other.promotions.promote("m", 2)


def test_a_choice_selects_among_the_versions_of_the_policy(folder, open_repository):
    write_config(folder, SCALE_CONFIG + "version_policy { specific { versions: [ 1, 3 ] } }")
    repository = open_repository()
    assert (ask(repository, "m"), ask(repository, "m", "1")) == (3, 1)
    repository.promotions.promote("m", 1)
    assert (ask(repository, "m"), ask(repository, "m", "3")) == (1, 3), "both serve; 1 without a number"
    with pytest.raises(InvalidArgument, match="the version policy of model 'm' allows only 1, 3, not version 2"):
        repository.promotions.promote("m", 2)


def test_in_explicit_mode_a_promotion_loads_the_model(open_repository):
    repository = open_repository("explicit")
    repository.promotions.promote("m", 2)
    assert ask(repository, "m") == 2
    repository.unload("m")
    repository.load("m")
    assert ask(repository, "m") == 2
    repository.close()
    with pytest.raises(Unavailable, match="shutting down"):
        repository.promotions.promote("m", 3)


# ---- Without a server ------------------------------------------------------------------------------------------------


def test_a_folder_is_changed_without_a_server(folder):
    model = find_model(folder.parent, "m")
    assert (model.state().serving, model.state().before, model.state().choice) == (3, 2, "")
    model.change("pin", 1)
    state = find_model(folder.parent, "m").state()
    assert (state.serving, state.pinned, state.choice, state.before) == (1, True, "version 1 is pinned", 3)
    find_model(folder.parent, "m").change("rollback", 0)
    find_model(folder.parent, "m").change("unpin", 0)
    assert find_model(folder.parent, "m").state().choice == "rolled back from version 1 to version 3"


def test_a_roll_back_in_a_folder_takes_no_damaged_version_for_one_that_serves(folder):
    (folder / "3/model.onnx").write_bytes(b"no model")
    model = find_model(folder.parent, "m")
    state = model.state()
    assert (state.serving, state.before) == (2, 1)
    assert [(each.version, each.state) for each in state.versions] == [(1, ""), (2, ""), (3, "UNAVAILABLE")]
    assert "model.onnx is damaged" in state.versions[2].reason
    model.change("rollback", 0)
    state = find_model(folder.parent, "m").state()
    assert (state.serving, state.choice) == (1, "rolled back from version 2 to version 1")


def test_a_change_in_a_folder_reads_each_file_once(folder, monkeypatch):
    read = []
    verify = offline.verify_digests
    monkeypatch.setattr(
        offline, "verify_digests", lambda path, manifest: read.append(path.name) or verify(path, manifest)
    )
    find_model(folder.parent, "m").change("promote", 2)
    assert find_model(folder.parent, "m").state().serving == 2
    assert read == ["3", "2"]


def test_a_roll_back_in_a_folder_skips_damaged_versions(folder):
    (folder / "2/model.onnx").write_bytes(b"no model")
    assert find_model(folder.parent, "m").state().before == 1
    find_model(folder.parent, "m").change("rollback", 0)
    assert find_model(folder.parent, "m").state().serving == 1
    (folder / "1/model.onnx").write_bytes(b"no model")
    write_promotion(folder, pin(None, 3, 3, [1, 2, 3]))
    with pytest.raises(
        InvalidArgument, match=r"version 2: model\.onnx is damaged.*; version 1: model\.onnx is damaged"
    ):
        find_model(folder.parent, "m").change("rollback", 0)
    assert read_promotion(folder).version == 3


def test_a_folder_keeps_its_choice_if_the_change_is_impossible(folder):
    (folder / "2/model.onnx").write_bytes(b"no model")
    model = find_model(folder.parent, "m")
    for verb, version, error, reason in (
        ("promote", 2, InvalidArgument, r"model 'm': model\.onnx is damaged"),
        ("promote", 9, NotFound, "model 'm' has no version 9: it has 1, 2, 3"),
        ("unpin", 0, InvalidArgument, "model 'm': no version is pinned"),
    ):
        with pytest.raises(error, match=reason):
            model.change(verb, version)
    shutil.rmtree(folder / "1")
    shutil.rmtree(folder / "2")
    with pytest.raises(InvalidArgument, match="model 'm': there is no version to roll back to"):
        find_model(folder.parent, "m").change("rollback", 0)
    assert not (folder / PROMOTION_FILE).exists()
    with pytest.raises(NotFound, match="there is no model 'n' in"):
        find_model(folder.parent, "n")
    with pytest.raises(NotFound, match="there is no model repository"):
        list_models(folder.parent / "nowhere")
    (folder / PROMOTION_FILE).write_text(json.dumps([]))
    with pytest.raises(InvalidArgument, match=r"model 'm': serving\.json cannot be read"):
        find_model(folder.parent, "m")


def test_a_folder_lists_its_models_beside_invalid_ones(folder, capsys):
    write_config(folder.parent / "a", SCALE_CONFIG)
    write_version(folder.parent / "a", 1, scale(1), manifest={})
    (folder.parent / "a/config.pbtxt").write_text("what {")
    shutil.copytree(folder, folder.parent / "z")
    (folder.parent / "z" / PROMOTION_FILE).write_text("[]")
    invalid, valid, unknown = list_models(folder.parent)
    assert (invalid.name, invalid.serving, invalid.versions[0].state) == ("a", 0, "UNAVAILABLE")
    assert "what" in invalid.versions[0].reason
    assert (valid.name, valid.serving, unknown.name, unknown.serving) == ("m", 3, "z", 0)
    assert invalid.reason == invalid.versions[0].reason
    assert unknown.reason.startswith("serving.json cannot be read")
    with pytest.raises(SystemExit):
        models_main(["list", "--model-repository", str(folder.parent)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["m", "3", "1,", "2,", "3", "2"]
    assert "serving.json cannot be read" in lines[3]
